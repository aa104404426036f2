"""What left, as the user of `prune_tokens` sees it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Pruning:
    """What the last prompt lost: the object that ``with prune_tokens(..) as pruning`` gives.

    tower     whose blocks see fewer tokens
    blocks    how many it has
    visual    [B, T] bool, the visual tokens of the input; in a vision tower, its patches
    kept      block -> [B, T] bool, the tokens that enter it; of a key-value cache, those that any head keeps
    """

    tower: str = ""
    blocks: int = 0
    visual: Tensor | None = None
    kept: dict[int, Tensor] = field(default_factory=dict)
    _count: dict[int, Tensor] = field(default_factory=dict, repr=False)  # visual tokens left, of each head on average

    def begin(self, visual: Tensor) -> None:
        self.visual = visual
        self.kept, self._count = {}, {}

    def note(self, layer: int, index: Tensor, valid: Tensor) -> None:
        """Tokens at ``index`` [B, K] are left from a block on, those that are ``valid``."""
        self._note(layer, index, valid, heads=1)

    def note_cache(self, layer: int, index: Tensor, valid: Tensor | None) -> None:
        """Entries at ``index`` [B, H, K] are left in the cache of a block, those that are ``valid`` [B, K]."""
        heads = index.shape[1]
        stays = torch.ones_like(index[:, 0], dtype=torch.bool) if valid is None else valid
        self._note(layer, index.flatten(1), stays.repeat(1, heads), heads)

    def _note(self, layer: int, index: Tensor, valid: Tensor, heads: int) -> None:
        visual = self._seen()
        found = torch.zeros_like(visual, dtype=torch.int32)
        self.kept[layer] = found.scatter_add_(1, index, valid.int()) > 0
        self._count[layer] = (visual.gather(1, index) & valid).sum() / heads

    def share(self) -> float:
        """The visual tokens that a block sees, as a share of those of the input, averaged over the tower's blocks."""
        everything = float(self._seen().sum())
        now, total = everything, 0.0
        for layer in range(self.blocks):
            now = float(self._count.get(layer, now))
            total += now
        return total / (self.blocks * everything)

    def left(self, sample: int = 0) -> Tensor:
        """[P] bool: which of a sample's visual tokens are there at last."""
        visual = self._seen()
        last = self.kept[max(self.kept)] if self.kept else visual
        return last[sample][visual[sample]]

    def _seen(self) -> Tensor:
        if self.visual is None:
            raise ValueError("nothing was pruned yet: run the model within the context")
        return self.visual
