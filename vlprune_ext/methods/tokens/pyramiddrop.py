"""PyramidDrop (arXiv 2410.17247): drop visual tokens in stages, more the deeper the block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...tokens import DropTokens
from ...tokens.method import View
from .checks import expect_share


@dataclass(frozen=True)
class PyramidDrop(DropTokens):
    """Drop visual tokens in stages, by the attention that the last instruction token gives them in the block before.

    Source: PyramidDrop (arXiv 2410.17247), published with ``keep=0.5, layers=(8, 16, 24)`` of 32 blocks.

    Parameters
    ----------
    keep : float
        Share of the remaining visual tokens that each stage keeps, in (0, 1] (the paper's lambda, 0.5).
    layers : tuple of int, optional
        First block of each stage, ascending. None: a quarter, half and three quarters of the depth.
    positions : {"keep", "renumber"}
        Position ids of the kept tokens: their own, or renumbered from the first stage on.
    """

    keep: float = 0.5
    layers: tuple[int, ...] | None = None
    reads_attention: ClassVar[bool] = True

    def __post_init__(self) -> None:
        expect_share("keep", self.keep)
        if self.layers is None:
            return
        blocks = self.layers if isinstance(self.layers, tuple) and all(type(i) is int for i in self.layers) else ()
        if not blocks or list(blocks) != sorted(set(blocks)):
            raise ValueError(f"layers is {self.layers!r}; expected a tuple of blocks in ascending order, each once")

    def stages(self, blocks: int) -> dict[int, float]:
        layers = self.layers if self.layers is not None else sorted({max(1, blocks * i // 4) for i in (1, 2, 3)})
        return {layer: self.keep ** (stage + 1) for stage, layer in enumerate(layers)}

    def score(self, view: View) -> Tensor:
        assert view.received is not None
        return view.received
