"""PyramidDrop (arXiv 2410.17247): FastV in stages, fewer visual tokens the deeper the block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...tokens import DropTokens
from ...tokens.method import View
from .checks import expect_share


@dataclass(frozen=True)
class PyramidDrop(DropTokens):
    """Keep, at each stage, those visual tokens to which the last instruction token attends most in the block before.

    keep      share that each stage keeps of what the one before left, in (0, 1] (the paper's lambda, 0.5)
    layers    the first block of each stage; None: a quarter, half and three quarters of the depth (8, 16, 24 of 32)
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
