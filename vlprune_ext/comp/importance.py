"""The collaborative importance metric of CoMP (arXiv 2604.02956): tokens weigh parameters, and heads weigh tokens.

Equation numbers are the paper's.
"""

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


def token_weights(importance: Tensor, cls: int = 0) -> Tensor:
    """How much each token's activations count in eq. (4): class tokens 1, the others their share of the rest.

    importance [B, T], from `token_importance`; cls: how many class tokens there are in front. Returns [B, T].
    """
    rest = importance[:, cls:]
    total = rest.sum(1, keepdim=True)
    share = torch.where(total > 0, rest / total, rest)
    return torch.cat([torch.ones_like(importance[:, :cls]), share], 1)


class ChannelImportance:
    """What the input channels of a projection are worth: ``S_i = (1/d) sum_j |W_ji| ||X_i||``, eq. (3).

    With weights the norm is ``sqrt(sum_n w_n X_ni^2)``, eq. (4). Both are means over samples, so that scores do not
    grow with their number. Activations come batch by batch; none are kept.

    weight  [d, C], fp32/fp16/bf16: the output projection of an attention or an MLP
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.total = torch.zeros(weight.shape[1], device=weight.device)
        self.samples = 0

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """A batch of what enters the projection.

        x [B, T, C]; weights [B, T]: `token_weights` of an attention's own tokens, for an MLP of the next layer's; zeros
        leave padding out.
        """
        self.samples += len(x)
        ops.column_norm_sq_(self.total, x.flatten(0, 1), None if weights is None else weights.float().flatten())

    def value(self) -> Tensor:
        """[C], fp32. Raises ValueError if nothing was added."""
        if self.samples == 0:
            raise ValueError("activations: none came; expected at least one batch [B, T, C]")
        return self.weight.detach().float().abs().mean(0) * (self.total / self.samples).sqrt()
