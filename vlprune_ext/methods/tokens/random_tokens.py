"""Random token pruning: the baseline of every token method."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ...tokens import DropTokens
from ...tokens.method import View
from .checks import expect_share, expect_whole


@dataclass(frozen=True)
class RandomTokens(DropTokens):
    """Drop random visual tokens, drawn by seed and input ids: the same for a sample in every batch.

    Parameters
    ----------
    keep : float
        Share of the visual tokens that are kept, in (0, 1].
    layer : int
        First block that sees fewer tokens; 0: before the language model.
    seed : int
        Seed of the draw.
    positions : {"keep", "renumber"}
        Position ids of the kept tokens: their own, or renumbered from block ``layer`` on.
    """

    keep: float = 0.5
    layer: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        expect_share("keep", self.keep)
        expect_whole("layer", self.layer)
        expect_whole("seed", self.seed)

    def stages(self, blocks: int) -> dict[int, float]:
        return {self.layer: self.keep}

    def score(self, view: View) -> Tensor:
        assert view.ids is not None
        counts = view.visual.sum(1).tolist()
        rows = [self._draw(ids[ids != 0].long(), count) for ids, count in zip(view.ids.cpu(), counts, strict=True)]
        score = torch.zeros(view.visual.shape, dtype=torch.float32, device=view.visual.device)
        return score.masked_scatter(view.visual, torch.cat(rows).to(score))

    def _draw(self, ids: Tensor, count: int) -> Tensor:
        """Return uniform scores [count] that depend on the seed and one sample's input ids only."""
        key = zlib.crc32(ids.numpy().tobytes(), self.seed)
        return torch.rand(count, generator=torch.Generator().manual_seed(key), dtype=torch.float32)
