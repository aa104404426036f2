"""Argument checks that the ops share; messages say what came and what was expected."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from .. import _native

INT32_MAX = 2**31 - 1


def shape(tensor: Tensor) -> str:
    """Format a tensor's shape as "[2, 3]", also with symbolic sizes."""
    return "[" + ", ".join(str(size) for size in tensor.shape) + "]"


def expect_tensors(**values: object) -> None:
    """Raise TypeError for an argument that is no tensor, before the dispatcher does in words of its own."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; expected a tensor")


def expect_int(name: str, value: object) -> int:
    """Return an argument as an int; a SymInt as it is, so that tracing does not specialise it."""
    if type(value) is int or isinstance(value, torch.SymInt):  # which operator.index would fix to one number
        return value  # type: ignore[return-value]
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} is {value!r}; expected an int") from None


def check_tensors(**tensors: Tensor) -> None:
    """Raise unless all tensors have the same device and the same supported dtype."""
    (first, reference), *others = tensors.items()
    if reference.dtype not in _native.DTYPES:
        raise TypeError(f"{first} has dtype {reference.dtype}; expected float32, float16 or bfloat16")
    if reference.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{first} is on {reference.device}; expected a CPU or CUDA tensor")
    for name, tensor in others:
        if tensor.dtype != reference.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected {reference.dtype} as {first}")
        if tensor.device != reference.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {reference.device} as {first}")


def check_beside(
    name: str, tensor: Tensor, dtype: torch.dtype, shapes: list[list[int]], what: str, of: str, other: Tensor
) -> None:
    """Raise unless a tensor has this dtype, one of these shapes, and the device of ``other``.

    Parameters
    ----------
    name : str
        Its name in messages.
    tensor : Tensor
        Checked.
    dtype : torch.dtype
        Expected.
    shapes : list of list of int
        Expected, any of them.
    what : str
        What the shape corresponds to, for the message.
    of : str
        Name of ``other``.
    other : Tensor
        Has the expected device.
    """
    expect_tensors(**{name: tensor})
    if tensor.dtype != dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected {str(dtype).removeprefix('torch.')}")
    if list(tensor.shape) not in shapes:
        expected = " or ".join(str(sizes) for sizes in shapes)
        raise ValueError(f"{name} has shape {shape(tensor)}; expected {expected}, {what}")
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}; expected {other.device} as {of}")


def rows(tensor: Tensor) -> Tensor:
    """Return the tensor with a contiguous last dimension, a copy if need be; any row stride."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def may_read(tensor: Tensor) -> bool:
    """Return whether a tensor's values can be read: not in tracing or graph capture, nor those of a fake tensor."""
    if torch.compiler.is_compiling() or tensor.device.type == "meta":
        return False
    if isinstance(tensor, torch._subclasses.FakeTensor):
        return False
    return not (tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing())
