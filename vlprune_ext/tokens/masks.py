"""Attention masks of fewer tokens, in the form in which transformers gave them.

A mask is None (all tokens, or all up to each), [B, T] of valid keys (flash attention), or [B, 1, Tq, Tk], bool or
additive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops


def _like(seen: Tensor, given: Tensor | None) -> Tensor:
    """A bool mask in the dtype of another."""
    if given is None or given.dtype == torch.bool:
        return seen
    if given.dim() == 2:
        return seen.to(given.dtype)
    return torch.zeros(seen.shape, dtype=given.dtype, device=given.device).masked_fill_(~seen, _never(given))


def _never(given: Tensor) -> float:
    return torch.finfo(given.dtype).min


def shrink(given: Tensor | None, index: Tensor, valid: Tensor | None, flash: bool) -> Tensor | None:
    """The mask of the tokens ``index`` [B, K], of which those that are not ``valid`` count for nothing."""
    batch, keep = index.shape
    if given is None:
        if valid is None:
            return None
        if flash:
            return valid
        order = torch.ones(keep, keep, dtype=torch.bool, device=index.device).tril()
        # A filler sees itself, so that no row is empty.
        own = torch.eye(keep, dtype=torch.bool, device=index.device)
        return (order & valid[:, None] | own)[:, None]
    if given.dim() == 2:
        mask = ops.compact_tokens(index, [given])[0]
        return mask if valid is None else mask * valid.to(mask.dtype)
    given = given.expand(batch, -1, -1, -1) if given.shape[0] == 1 else given
    rows = ops.compact_tokens(index, [given], [2])[0]
    mask = ops.compact_tokens(index, [rows], [3])[0]
    if valid is None:
        return mask
    if mask.dtype == torch.bool:
        return mask & valid[:, None, None]
    return mask.masked_fill(~valid[:, None, None], _never(mask))


def extend(
    given: Tensor | None, tokens: int, valid: Tensor | None, held: int, left: int, hidden: Tensor, flash: bool
) -> Tensor | None:
    """The mask of the new tokens ``hidden`` [B, new, D].

    Of the ``held`` entries in the cache, the first ``left`` are what a prefill of ``tokens`` left, those that are
    ``valid`` [B, left].
    """
    if valid is None and given is None:
        return None
    batch, new = hidden.shape[:2]
    if given is None:
        rest = torch.ones(new, held - left + new, dtype=torch.bool, device=hidden.device).tril(held - left)
        given, tokens = (rest[-1:] if flash else rest[None, None]), 0
    rest = given[..., tokens:].expand(batch, *given.shape[1:-1], -1)
    if valid is None:
        valid = torch.ones(batch, left, dtype=torch.bool, device=hidden.device)
    before = _like(valid if given.dim() == 2 else valid[:, None, None], given)
    return torch.cat([before.expand(*rest.shape[:-1], -1), rest], -1)
