"""DivPrune (arXiv 2503.02175): the visual tokens that differ most from each other stay."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ... import ops
from ...tokens import DropTokens
from ...tokens.method import View
from .checks import expect_share, expect_whole


@dataclass(frozen=True)
class DivPrune(DropTokens):
    """Keep visual tokens chosen one by one, each as far as possible (cosine) from the nearest one chosen before.

    keep     share of the visual tokens that stay, in (0, 1] (the paper's default is 0.098)
    layer    the first block that sees fewer tokens; 0, as published: before the language model
    """

    keep: float = 0.5
    layer: int = 0

    def __post_init__(self) -> None:
        expect_share("keep", self.keep)
        expect_whole("layer", self.layer)

    def stages(self, blocks: int) -> dict[int, float]:
        return {self.layer: self.keep}

    def score(self, view: View) -> Tensor:
        return ops.diverse_tokens(view.states, view.count, candidate=view.visual).float()
