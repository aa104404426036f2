"""Streams and what modules return, copied and narrowed: what stacks variants on the batch axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Output = Tensor | tuple[Any, ...]  # what a block or a site's module returns: a tensor, or a tuple that begins with one
Rows = Tensor | int  # of each sample of [B, T, D]: some [B, K], or one
T = TypeVar("T")


def stacked(value: T, copies: int) -> T:
    """Every tensor in ``value`` repeated ``copies`` times along its first dimension."""
    return pytree.tree_map_only(Tensor, lambda t: t.repeat(copies, *[1] * (t.dim() - 1)) if t.dim() else t, value)


def blank(value: T, copies: int = 1) -> T:
    """The shape of ``stacked(value, copies)`` without its memory: for results that nothing will read.

    Ones, since there are models that take images of zeros for padding.
    """
    return pytree.tree_map_only(
        Tensor, lambda t: t.new_ones(()).expand(copies * t.shape[0], *t.shape[1:]) if t.dim() else t, value
    )


def first(output: Output) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def with_first(output: Output, tensor: Tensor, copies: int = 1, fill: Callable = stacked) -> Output:
    """A module's result with its first tensor exchanged, and ``copies`` of the rest.

    Of the rest, what has a first dimension of one, such as the position bias that T5 hands from block to block, is the
    same for every row and stays as it is; it broadcasts.
    """
    if isinstance(output, Tensor):
        return tensor
    shared = pytree.tree_map_only(Tensor, lambda t: t if t.shape[:1] == (1,) else fill(t, copies), output[1:])
    return (tensor, *shared)


def take(x: Tensor, rows: Rows) -> Tensor:
    """[B, T, D] -> [B, K, D]: some rows of each sample."""
    if isinstance(rows, int):
        return x.narrow(1, rows % x.shape[1], 1)
    return x[torch.arange(x.shape[0], device=x.device)[:, None], rows]


def put(x: Tensor, rows: Rows, length: int) -> Tensor:
    """[B, K, D] -> [B, T, D] that `take` turns back; what the other rows hold is nothing."""
    if isinstance(rows, int) or rows.shape[1] == 1:
        return x.expand(-1, length, -1)
    whole = x.new_zeros(x.shape[0], length, x.shape[2])
    whole[torch.arange(x.shape[0], device=x.device)[:, None], rows] = x
    return whole
