"""Residual streams and module outputs, repeated along the batch dimension for stacked variants, or narrowed to rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Output = Tensor | tuple[Any, ...]  # of a block or a site's module: a tensor, or a tuple that begins with one
Rows = Tensor | int  # positions in T of each sample of [B, T, D]: [B, K] int64, or the same one for all samples
T = TypeVar("T")


def stacked(value: T, copies: int) -> T:
    """Repeat every tensor in ``value`` (a pytree) ``copies`` times along its first dimension.

    Parameters
    ----------
    value : tensor or pytree of tensors
        Other leaves and scalars (0-dimensional tensors) are kept.
    copies : int
        Number of repeats.
    """
    return pytree.tree_map_only(Tensor, lambda t: t.repeat(copies, *[1] * (t.dim() - 1)) if t.dim() else t, value)


def blank(value: T, copies: int = 1) -> T:
    """Return placeholders of the shapes of ``stacked(value, copies)`` without its memory, for what nothing reads.

    They hold ones, since some models take images of zeros for padding.

    Parameters
    ----------
    value : tensor or pytree of tensors
        As in `stacked`.
    copies : int
        Number of repeats.
    """
    return pytree.tree_map_only(
        Tensor, lambda t: t.new_ones(()).expand(copies * t.shape[0], *t.shape[1:]) if t.dim() else t, value
    )


def first(output: Output) -> Tensor:
    """Return a module output's first tensor: the hidden states."""
    return output if isinstance(output, Tensor) else output[0]


def with_first(output: Output, tensor: Tensor, copies: int = 1, fill: Callable = stacked) -> Output:
    """Return a module's output with its first tensor replaced, and ``copies`` of the rest.

    Tensors of the rest with a first dimension of 1, such as the position bias that T5 passes from block to block, are
    shared by all rows and broadcast: they are not repeated.

    Parameters
    ----------
    output : Tensor or tuple
        What the module returned.
    tensor : Tensor
        Takes the place of its first tensor.
    copies : int
        Number of repeats of the rest.
    fill : callable (tensor, copies) -> Tensor
        `stacked`, or `blank` where nothing reads the rest.
    """
    if isinstance(output, Tensor):
        return tensor
    shared = pytree.tree_map_only(Tensor, lambda t: t if t.shape[:1] == (1,) else fill(t, copies), output[1:])
    return (tensor, *shared)


def take(x: Tensor, rows: Rows) -> Tensor:
    """Gather rows [B, K, D] of each sample of [B, T, D]."""
    if isinstance(rows, int):
        return x.narrow(1, rows % x.shape[1], 1)
    return x[torch.arange(x.shape[0], device=x.device)[:, None], rows]


def put(x: Tensor, rows: Rows, length: int) -> Tensor:
    """Scatter rows [B, K, D] into [B, length, D], the inverse of `take`; values of other rows are undefined."""
    if isinstance(rows, int) or rows.shape[1] == 1:
        return x.expand(-1, length, -1)
    whole = x.new_zeros(x.shape[0], length, x.shape[2])
    whole[torch.arange(x.shape[0], device=x.device)[:, None], rows] = x
    return whole
