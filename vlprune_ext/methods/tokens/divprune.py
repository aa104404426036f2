"""DivPrune (arXiv 2503.02175): keep the most diverse visual tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ... import ops
from ...tokens import DropTokens
from ...tokens.method import View
from .checks import expect_share, expect_whole


@dataclass(frozen=True)
class DivPrune(DropTokens):
    """Drop redundant visual tokens: keep a diverse subset by greedy max-min cosine distance.

    Tokens are chosen one by one, each as far as possible from the nearest one chosen before.

    Source: DivPrune (arXiv 2503.02175).

    Parameters
    ----------
    keep : float
        Share of the visual tokens that are kept, in (0, 1] (the paper's default is 0.098).
    layer : int
        First block that sees fewer tokens; 0, as published: before the language model.
    positions : {"keep", "renumber"}
        Position ids of the kept tokens: their own, or renumbered from the pruned block on.
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
