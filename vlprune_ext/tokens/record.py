"""What left, as the user of `prune_tokens` sees it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Pruning:
    """What the last prompt lost: the object that ``with prune_tokens(..) as pruning`` gives.

    visual    [B, T] bool, the visual tokens of the input; for a vision tower, all of its tokens
    kept      block -> [B, T] bool, the tokens that enter it; of a key-value cache, those that any head keeps
    """

    visual: Tensor | None = None
    kept: dict[int, Tensor] = field(default_factory=dict)

    def begin(self, visual: Tensor) -> None:
        self.visual = visual
        self.kept = {}

    def dropped(self, layer: int, index: Tensor, valid: Tensor) -> None:
        assert self.visual is not None
        found = self.visual.new_zeros(self.visual.shape, dtype=torch.int32)
        self.kept[layer] = found.scatter_add_(1, index, valid.int()) > 0

    def evicted(self, layer: int, index: Tensor, valid: Tensor | None) -> None:
        heads = index.shape[1]
        stays = torch.ones_like(index[:, 0], dtype=torch.bool) if valid is None else valid
        self.dropped(layer, index.flatten(1), stays.repeat(1, heads))

    def share(self, blocks: int) -> float:
        """The visual tokens that a block sees, as a share of those of the input, averaged over ``blocks`` blocks."""
        if self.visual is None:
            raise ValueError("nothing was pruned yet: run the model within the context")
        all_of_them = int(self.visual.sum())
        now, total = 1.0, 0.0
        for layer in range(blocks):
            if layer in self.kept:
                now = int((self.kept[layer] & self.visual).sum()) / all_of_them
            total += now
        return total / blocks
