"""What tokens are worth by the attention that they receive (CoMP, arXiv 2604.02956, eqs. 6 and 7)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops


def token_importance(
    query: Tensor,  # [B, H, Tq, d]
    key: Tensor,  # [B, Hkv, T, d]
    lse: Tensor,  # [B, H, Tq]
    *,
    head_mask: Tensor | None = None,  # [H] or [B, H]
    query_mask: Tensor | None = None,  # [B, Tq]
    key_weight: Tensor | None = None,  # [B, T]
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """What tokens are worth: ``S_i = Norm(sum_n max_h m_h A_hni)``, eq. (6), and with ``head_mask`` eq. (7).

    A is the attention, n the tokens that ask, h the heads; Norm divides by the sum, so that a sample's scores sum to
    one. Masks of heads weigh A after the softmax, where a pruned head says nothing; before it, zeroed queries would say
    that all tokens are alike.

    Parameters
    ----------
    query, key, lse : as `ops.attention_importance` takes them
    head_mask : [H] or [B, H], floating point, optional
        m, in [0, 1]: 0 for a head that is gone, between for one that is going.
    query_mask : bool, optional
        False for padding, which does not ask.
    key_weight : floating point, optional
        How many times each token counts as a key in A, as in ``lse``: 0 for padding, between for a token that is going.

    Returns
    -------
    [B, T], fp32
        0 for all tokens of a sample that receive nothing.
    """
    if head_mask is not None:
        head_mask = head_mask.float().reshape(-1, head_mask.shape[-1]).to(query.device)
    received = ops.attention_importance(
        query,
        key,
        lse,
        head_weight=head_mask,
        query_weight=None if query_mask is None else query_mask.float(),
        reduce="max",
        causal=causal,
        key_mask=None if key_weight is None else key_weight > 0,
        scale=scale,
    )
    if key_weight is not None:
        received = received * key_weight
    total = received.sum(1, keepdim=True)
    return torch.where(total > 0, received / total, received)
