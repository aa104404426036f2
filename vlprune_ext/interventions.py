"""What replay can do to a block. Every method asks what the objective becomes if one of these is done."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
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


@dataclass(frozen=True)
class PerturbWeight:
    """Add ``sign * eps * z`` to one matrix of a block, z ~ N(0, 1) of `ops.perturb`'s stream (ECoFLaP).

    matrix  path of the linear layer in the block
    """

    tower: str
    layer: int
    matrix: str
    seed: int
    tensor_id: int
    eps: float
    sign: int  # 1 or -1

    @property
    def kind(self) -> str:
        return "weight"

    @property
    def units(self) -> tuple[int, ...]:
        return ()


@dataclass(frozen=True)
class Within:
    """Run a block, and all that comes after it, within a context: whatever holds there.

    CoMP raises a threshold in it. What blocks before ``layer`` do has to be the same inside and outside.
    """

    tower: str
    layer: int
    context: Callable[[], AbstractContextManager[object]]

    @property
    def kind(self) -> str:
        return "context"

    @property
    def units(self) -> tuple[int, ...]:
        return ()


Intervention = DropHead | DropNeurons | DropLayer | PerturbWeight | Within
