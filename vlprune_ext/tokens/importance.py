"""Token importance from the attention that tokens receive (CoMP, arXiv 2604.02956, eqs. 6 and 7)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops


def token_importance(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    head_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    key_weight: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Return token importance ``S_i = Norm(sum_n max_h m_h A_hni)``: CoMP, arXiv 2604.02956, eqs. (6) and (7).

    A are the attention weights, n the query tokens, h the heads; without ``head_mask``, eq. (6), with it, eq. (7). Norm
    divides by the sum, so that a sample's scores sum to one. Head masks multiply A after the softmax, where a pruned
    head contributes 0; zeroed queries before it would give uniform attention.

    Parameters
    ----------
    query : Tensor [B, H, Tq, d], fp32/fp16/bf16
        Queries, after any rotary embedding.
    key : Tensor [B, Hkv, T, d], dtype of query
        Keys, likewise; Hkv divides H (grouped-query attention).
    lse : Tensor [B, H, Tq], fp32
        Log-sum-exp of the attention logits, as `ops.attention_importance` takes it.
    head_mask : Tensor [H] or [B, H], floating point, optional
        m, in [0, 1]: 0 for a pruned head, between for one whose mask is being annealed.
    query_mask : Tensor [B, Tq], bool, optional
        False for padding, which is left out of the sum over queries.
    key_weight : Tensor [B, T], floating point, optional
        Weight of each key in the softmax, as in ``lse``: 0 for padding, between for a token whose mask is being
        annealed.
    causal : bool
        Queries attend to earlier keys only.
    scale : float, optional
        Factor of the attention logits, d**-0.5 by default.

    Returns
    -------
    Tensor [B, T], fp32
        All 0 for a sample whose tokens receive no attention.
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
