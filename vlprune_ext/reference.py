"""The ops of ``vlprune_ext.ops`` in plain torch: slow and obviously right, in the dtype of their inputs.

Use them to check a result (float64 in, float64 out) or to read what an op does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["leave_one_out", "retrieval_rank"]


def leave_one_out(
    x: Tensor,  # [N, G*g]
    weight: Tensor,  # [D, G*g]
    base: Tensor,  # [N, D]
    group_size: int,
    groups: Sequence[int] | None = None,
) -> Tensor:  # [V, N, D]
    """``base - x_g @ weight_g.T`` for each group g; see :func:`vlprune_ext.ops.leave_one_out`."""
    if groups is None:
        groups = range(x.shape[1] // group_size)
    out = base.new_empty((len(groups), *base.shape))
    for i, group in enumerate(groups):
        columns = slice(group * group_size, (group + 1) * group_size)
        out[i] = base - x[:, columns] @ weight[:, columns].T
    return out


def retrieval_rank(
    query: Tensor,  # [V, N, D] or [N, D]
    gallery: Tensor,  # [V or 1, M, D] or [M, D]
    positives: Tensor,  # [N] or [N, P]
) -> Tensor:  # [V, N] or [N]
    """Gallery items that score strictly higher than the best positive; see :func:`vlprune_ext.ops.retrieval_rank`."""
    scores = query @ gallery.transpose(-1, -2)  # [V, N, M] or [N, M]
    rows = positives if positives.dim() == 2 else positives[:, None]
    index = rows.clamp(min=0).expand(*scores.shape[:-1], rows.shape[1])
    of_positives = scores.gather(-1, index).masked_fill(rows < 0, -torch.inf)  # [.., N, P]
    best = of_positives.amax(dim=-1, keepdim=True)
    return (scores > best).sum(dim=-1).to(torch.int32)
