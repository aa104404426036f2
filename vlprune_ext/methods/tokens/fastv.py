"""FastV (arXiv 2403.06764): visual tokens to which the last token attends least leave after a few blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...tokens import DropTokens
from ...tokens.method import View
from .checks import expect_share, expect_whole


@dataclass(frozen=True)
class FastV(DropTokens):
    """Keep the visual tokens that the last instruction token attends to most, mean of heads, in block ``layer - 1``.

    layer    the first block that sees fewer tokens (the paper's K, 2)
    keep     share of the visual tokens that stay, in (0, 1] (the paper's 1 - R)

    With cross-attention (BLIP) all tokens of the question ask: the last one has not seen more than the others.
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
