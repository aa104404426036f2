"""What replay can do to a block. Every method asks what the objective becomes if one of these is done."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DropHead:
    """Remove attention heads of one block (key/value heads with their query heads, under grouped queries)."""

    tower: str
    layer: int
    heads: tuple[int, ...]
    cross: bool = False  # the heads of the cross attention

    @property
    def kind(self) -> str:
        return "cross_head" if self.cross else "head"

    @property
    def units(self) -> tuple[int, ...]:
        return self.heads


@dataclass(frozen=True)
class DropNeurons:
    """Remove neurons of one block's MLP."""

    tower: str
    layer: int
    neurons: tuple[int, ...]

    @property
    def kind(self) -> str:
        return "neurons"

    @property
    def units(self) -> tuple[int, ...]:
        return self.neurons


@dataclass(frozen=True)
class DropLayer:
    """Remove a whole block: the residual stream passes it by."""

    tower: str
    layer: int

    @property
    def kind(self) -> str:
        return "layer"

    @property
    def units(self) -> tuple[int, ...]:
        return ()


Intervention = DropHead | DropNeurons | DropLayer
