"""Record of the tokens kept within `prune_tokens`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Pruning:
    """Record of the latest prompt's kept tokens: what ``with prune_tokens(...) as pruning`` yields.

    Attributes
    ----------
    tower : str
        The tower whose blocks see fewer tokens.
    blocks : int
        Its number of blocks.
    visual : Tensor [B, T], bool
        True for visual tokens of the input; in a vision tower, for patches.
    kept : dict of Tensor [B, T], bool
        Block -> True for tokens that enter it; for a KV cache, for those that any head keeps.
    """

    tower: str = ""
    blocks: int = 0
    visual: Tensor | None = None
    kept: dict[int, Tensor] = field(default_factory=dict)
    _count: dict[int, Tensor] = field(default_factory=dict, repr=False)  # block -> visual tokens kept, mean over heads

    def begin(self, visual: Tensor) -> None:
        """Start the record of a new prompt, with its visual tokens [B, T] bool."""
        self.visual = visual
        self.kept, self._count = {}, {}

    def note(self, layer: int, index: Tensor, valid: Tensor) -> None:
        """Record the tokens kept from a block on.

        Parameters
        ----------
        layer : int
            The first block that they enter.
        index : Tensor [B, K], int64
            Positions of the kept tokens.
        valid : Tensor [B, K], bool
            False for padding among them.
        """
        self._note(layer, index, valid, heads=1)

    def note_cache(self, layer: int, index: Tensor, valid: Tensor | None) -> None:
        """Record the KV-cache entries that a block keeps.

        Parameters
        ----------
        layer : int
            The block.
        index : Tensor [B, H, K], int64
            Positions that each of H key-value heads keeps.
        valid : Tensor [B, K], bool, or None
            False for padding among them; None: there is none.
        """
        heads = index.shape[1]
        stays = torch.ones_like(index[:, 0], dtype=torch.bool) if valid is None else valid
        self._note(layer, index.flatten(1), stays.repeat(1, heads), heads)

    def _note(self, layer: int, index: Tensor, valid: Tensor, heads: int) -> None:
        """Record kept entries [B, heads * K] and the number of visual ones among them."""
        visual = self._seen()
        found = torch.zeros_like(visual, dtype=torch.int32)
        self.kept[layer] = found.scatter_add_(1, index, valid.int()) > 0
        self._count[layer] = (visual.gather(1, index) & valid).sum() / heads

    def share(self) -> float:
        """Return the ratio of the input's visual tokens that a block sees, mean over the tower's blocks."""
        everything = float(self._seen().sum())
        now, total = everything, 0.0
        for layer in range(self.blocks):
            now = float(self._count.get(layer, now))
            total += now
        return total / (self.blocks * everything)

    def left(self, sample: int = 0) -> Tensor:
        """Return the mask [P] bool of a sample's visual tokens that are kept to the last block."""
        visual = self._seen()
        last = self.kept[max(self.kept)] if self.kept else visual
        return last[sample][visual[sample]]

    def _seen(self) -> Tensor:
        """Return the visual tokens of the latest prompt; raise ValueError before the first one."""
        if self.visual is None:
            raise ValueError("nothing was pruned yet: run the model within the context")
        return self.visual
