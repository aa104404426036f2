"""Collaborative importance metric of CoMP (arXiv 2604.02956): token importances weigh the activations of units.

Equation numbers are the paper's. The other direction, heads that weigh tokens, is in `tokens.importance`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops


def token_weights(importance: Tensor, cls: int = 0) -> Tensor:
    """Return the weight of each token's activations in eq. (4): 1 for class tokens, the importance share for others.

    Parameters
    ----------
    importance : Tensor [B, T], fp32
        From `token_importance`.
    cls : int
        Class tokens in front.

    Returns
    -------
    Tensor [B, T], fp32
        The weights; those of the other tokens sum to 1, unless all are 0.
    """
    rest = importance[:, cls:]
    total = rest.sum(1, keepdim=True)
    share = torch.where(total > 0, rest / total, rest)
    return torch.cat([torch.ones_like(importance[:, :cls]), share], 1)


class ChannelImportance:
    """Accumulate the importance of a projection's input channels: ``S_i = (1/d) sum_j |W_ji| ||X_i||``, eq. (3).

    With token weights the norm is ``sqrt(sum_n w_n X_ni^2)``, eq. (4). Both are means over samples, so that scores do
    not grow with the number of samples. Activations come batch by batch; none are stored.

    Parameters
    ----------
    weight : Tensor [d, C], fp32/fp16/bf16
        The output projection of an attention or an MLP.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.total = torch.zeros(weight.shape[1], dtype=torch.float32, device=weight.device)
        self.samples = 0

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add a batch of the projection's inputs.

        Parameters
        ----------
        x : Tensor [B, T, C]
            Activations.
        weights : Tensor [B, T], optional
            `token_weights`: for an attention those of its own layer's tokens, for an MLP those of the next layer's; 0
            excludes padding. None: all 1.
        """
        self.samples += len(x)
        ops.column_norm_sq_(self.total, x.flatten(0, 1), None if weights is None else weights.float().flatten())

    def value(self) -> Tensor:
        """Return the importance of each channel.

        Returns
        -------
        Tensor [C], fp32

        Raises
        ------
        ValueError
            No batch was added.
        """
        if self.samples == 0:
            raise ValueError("activations: none came; expected at least one batch [B, T, C]")
        return self.weight.detach().float().abs().mean(0) * (self.total / self.samples).sqrt()
