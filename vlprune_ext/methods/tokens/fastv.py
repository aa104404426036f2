"""FastV (arXiv 2403.06764): drop the visual tokens of least attention after a few blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...tokens import DropTokens
from ...tokens.method import View
from .checks import expect_share, expect_whole


@dataclass(frozen=True)
class FastV(DropTokens):
    """Drop visual tokens after block ``layer - 1`` by the attention that the last instruction token gives them there.

    The importance score is the mean over heads. With cross-attention (BLIP) all tokens of the question are queries: the
    last one has not seen more than the others.

    Source: FastV (arXiv 2403.06764).

    Parameters
    ----------
    layer : int
        First block that sees fewer tokens (the paper's K, 2).
    keep : float
        Share of the visual tokens that are kept, in (0, 1] (the paper's 1 - R).
    positions : {"keep", "renumber"}
        Position ids of the kept tokens: their own, or renumbered from block ``layer`` on.
    """

    layer: int = 2
    keep: float = 0.5
    reads_attention: ClassVar[bool] = True

    def __post_init__(self) -> None:
        expect_share("keep", self.keep)
        expect_whole("layer", self.layer)

    def stages(self, blocks: int) -> dict[int, float]:
        return {self.layer: self.keep}

    def score(self, view: View) -> Tensor:
        assert view.received is not None
        return view.received
