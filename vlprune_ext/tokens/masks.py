"""Attention masks gathered for the kept tokens, in the form in which transformers passes them.

A mask is None (full or causal attention, implied), [B, T] of valid keys (flash attention), or [B, 1, Tq, Tk], bool or
additive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops


def _like(seen: Tensor, given: Tensor | None) -> Tensor:
    """Cast a bool mask to the form of ``given``: bool, 0/1 of its dtype, or additive."""
    if given is None or given.dtype == torch.bool:
        return seen
    if given.dim() == 2:
        return seen.to(given.dtype)
    return torch.zeros(seen.shape, dtype=given.dtype, device=given.device).masked_fill_(~seen, _never(given))


def _never(given: Tensor) -> float:
    """Return the additive value that masks a key in the mask's dtype."""
    return torch.finfo(given.dtype).min


def shrink(given: Tensor | None, index: Tensor, valid: Tensor | None, flash: bool) -> Tensor | None:
    """Gather an attention mask at the kept tokens.

    Parameters
    ----------
    given : Tensor [B, T] or [B or 1, 1, T, T], bool, integer or additive, or None
        The mask of the longer sequence.
    index : Tensor [B, K], int64
        Positions of the kept tokens.
    valid : Tensor [B, K], bool, or None
        False for padding entries, which no query attends to; None: there are none.
    flash : bool
        Whether the attention is flash attention, which takes [B, K] masks.

    Returns
    -------
    Tensor or None
        [B, K], or [B, 1, K, K]; None where causal attention without a mask suffices.
    """
    batch, keep = index.shape
    if given is None:
        if valid is None:
            return None
        if flash:
            return valid
        order = torch.ones(keep, keep, dtype=torch.bool, device=index.device).tril()
        # Padding attends to itself, so that no row of the softmax is empty.
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
    """Build the attention mask of new tokens over a pruned KV cache.

    Parameters
    ----------
    given : Tensor [B, T] or [B or 1, 1, new, T], or None
        The mask over the full sequence, T tokens, cached and new.
    tokens : int
        Length of the prefill in the full sequence.
    valid : Tensor [B, left], bool, or None
        False for padding among the kept prefill entries; None: there is none.
    held : int
        Entries in the cache.
    left : int
        Leading entries of these that come from the prefill.
    hidden : Tensor [B, new, D]
        States of the new tokens.
    flash : bool
        Whether the attention is flash attention, which takes masks [B, held + new].

    Returns
    -------
    Tensor or None
        [B, held + new], or [B, 1, new, held + new]; None where no mask is needed.
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
