"""PLPHP (arXiv 2502.14504): each block's cache keeps as many visual tokens as the block looks at, each head its own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...tokens import EvictTokens
from ...tokens.method import CacheView, share
from .checks import expect_part, expect_share, expect_whole


@dataclass(frozen=True)
class PLPHP(EvictTokens):
    """Per-layer, per-head pruning of visual tokens in the key-value cache, after the prefill.

    keep      share that a block keeps whose attention to visual tokens is ordinary, in (0, 1] (r, 0.4)
    spread    how much more, or less, of that a block keeps that looks at them much, or little (0.75: 0.7 and 0.1)
    high      share of the last instruction token's attention from which a block looks much (0.25)
    low       and below which it looks little (0.1)
    skip      blocks in front that keep all (2)

    Numbers as second-hand sources give them. A head keeps those visual tokens to which the last instruction token
    attends most; under grouped queries the attention of a key head's queries counts together.
    """

    keep: float = 0.4
    spread: float = 0.75
    high: float = 0.25
    low: float = 0.1
    skip: int = 2

    def __post_init__(self) -> None:
        expect_share("keep", self.keep)
        for name in ("spread", "high", "low"):
            expect_part(name, getattr(self, name))
        expect_whole("skip", self.skip)
        if self.spread == 1 or self.low > self.high:
            raise ValueError(
                f"spread is {self.spread}, low {self.low} and high {self.high}; expected spread < 1 and low <= high"
            )

    def starts(self, blocks: int) -> int:
        return self.skip

    def evict(self, view: CacheView) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        on_vision = (view.received * view.visual[:, None]).sum((1, 2)) / view.received.sum((1, 2))
        counts = []
        for looked, (visual, everything) in zip(on_vision.tolist(), view.counts, strict=True):
            more = self.spread if looked >= self.high else -self.spread if looked < self.low else 0.0
            counts.append(everything - visual + share(min(1.0, self.keep * (1 + more)), visual))
        index, valid = view.choose(view.received, counts)
        return index, valid, *view.at(index)
