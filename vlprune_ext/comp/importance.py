"""The collaborative importance metric of CoMP (arXiv 2604.02956): tokens weigh parameters.

Equation numbers are the paper's. Heads that weigh tokens are in `tokens.importance`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops


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
