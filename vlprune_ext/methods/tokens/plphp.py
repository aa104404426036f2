"""PLPHP (arXiv 2502.14504): KV cache pruning per layer and per head, by attention to the image."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...tokens import EvictTokens
from ...tokens.method import CacheView, share
from .checks import expect_part, expect_share, expect_whole


@dataclass(frozen=True)
class PLPHP(EvictTokens):
    """Prune visual tokens from the KV cache after the prefill: retention rate per layer, selection per head.

    A layer that attends to the image much keeps more. Within a layer, each head keeps the visual tokens to which the
    last instruction token attends most; under grouped queries the attention of a key head's queries is summed.

    Source: PLPHP (arXiv 2502.14504); numbers as second-hand sources give them.

    Parameters
    ----------
    keep : float
        Retention rate of a layer of ordinary attention to the image, in (0, 1] (r, 0.4).
    spread : float
        Relative change of the rate in layers of high or low attention: ``keep * (1 + spread)`` or ``keep * (1 -
        spread)`` (0.75: 0.7 and 0.1).
    high : float
        Share of the last instruction token's attention that falls on visual tokens, from which a layer counts as high
        (0.25).
    low : float
        The same share, below which a layer counts as low (0.1).
    skip : int
        First layers, whose cache is not pruned (2).
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
