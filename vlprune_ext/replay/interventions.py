"""What replay can do to a block. Every method asks what the objective becomes if one of these is done.

An intervention carries its own behaviour: the engine walks the blocks and asks it for outputs. A new one is one class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..anatomy import Site
from ..ops import leave_one_out, perturb
from .streams import stacked
from .suffix import Stopped


class Intervention(ABC):
    """One change of one block.

    site        kind of the site whose input and result have to be known; None: none
    runs_block  whether its block runs, at least in part, under each variant
    stacks      whether variants run side by side, stacked on the batch axis
    """

    tower: str
    layer: int
    site: str | None = None
    runs_block = True
    stacks = True

    def check(self) -> None:  # noqa: B027
        """Raise ValueError for an intervention that does nothing."""

    @property
    def key(self) -> Hashable:
        """Interventions on one block with the same key are worked out together."""
        return (type(self), self.site)

    @staticmethod
    @abstractmethod
    def outputs(at: Stopped, changes: Sequence[Any]) -> Tensor:
        """Return what the model gives for each row under each of V changes of one key, [V * B, ...]."""


class _DropUnits(Intervention):
    """Removes units of one site: its output without what they contribute, ``y' = y - x_g W_g^T``."""

    @property
    def kind(self) -> str:
        """The kind of the site."""
        raise NotImplementedError

    @property
    def units(self) -> tuple[int, ...]:
        """The units that are removed."""
        raise NotImplementedError

    @property
    def site(self) -> str:  # type: ignore[override]
        return self.kind

    def check(self) -> None:
        if not self.units:
            raise ValueError(f"interventions: {self} drops nothing")

    @staticmethod
    def outputs(at: Stopped, changes: Sequence[_DropUnits]) -> Tensor:
        kind = changes[0].kind
        site, units = at.block.sites[kind], [change.units for change in changes]
        if any(not 0 <= unit < site.units for drop in units for unit in drop):
            raise ValueError(f"interventions: {kind} of {at.name}, expected units below {site.units}")
        x, base = at.at_site(kind)
        out = leave_units_out(x.reshape(-1, x.shape[-1]), site, base.reshape(-1, base.shape[-1]), units)
        return at.finish_from_site(kind, out.view(len(units) * base.shape[0], *base.shape[1:]), len(units))


@dataclass(frozen=True)
class DropHead(_DropUnits):
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
class DropNeurons(_DropUnits):
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
class DropLayer(Intervention):
    """Remove a whole block: the residual stream passes it by."""

    tower: str
    layer: int
    runs_block = False

    @property
    def kind(self) -> str:
        return "layer"

    @property
    def units(self) -> tuple[int, ...]:
        """None: the block goes as a whole."""
        return ()

    @staticmethod
    def outputs(at: Stopped, changes: Sequence[DropLayer]) -> Tensor:
        return at.finish_after(stacked(at.stream, len(changes)), len(changes))


Removal = DropHead | DropNeurons | DropLayer  # what a plan can carry out


@dataclass(frozen=True)
class PerturbWeight(Intervention):
    """Add ``sign * eps * z`` to one matrix of a block, z ~ N(0, 1) of `ops.perturb`'s stream (ECoFLaP).

    The weight is not written. Nothing in the block is shared by variants: it runs once for each, and only what leaves
    it is stacked.

    matrix  path of the linear layer in the block
    """

    tower: str
    layer: int
    matrix: str
    seed: int
    tensor_id: int
    eps: float
    sign: int  # 1 or -1

    @staticmethod
    def outputs(at: Stopped, changes: Sequence[PerturbWeight]) -> Tensor:
        leaving = []
        pair: tuple[Any, tuple[Tensor, Tensor]] | None = None  # both signs come from one draw
        for change in changes:
            module: Any = at.block.module.get_submodule(change.matrix)
            draw = (change.matrix, change.seed, change.tensor_id, change.eps)
            if pair is None or pair[0] != draw:
                pair = (draw, perturb(module.weight, change.seed, change.tensor_id, change.eps))
            weight = pair[1][0 if change.sign > 0 else 1]
            leaving.append(at.run_block(module, partial(F.linear, weight=weight, bias=module.bias)))
        return at.finish_after(torch.cat(leaving), len(changes))


@dataclass(frozen=True)
class Within(Intervention):
    """Run a block, and all that comes after it, within a context: whatever holds there.

    CoMP raises a threshold in it. What blocks before ``layer`` do has to be the same inside and outside. Nothing can be
    shared or stacked.
    """

    tower: str
    layer: int
    context: Callable[[], AbstractContextManager[object]]
    stacks = False

    @staticmethod
    def outputs(at: Stopped, changes: Sequence[Within]) -> Tensor:
        return torch.cat([at.finish_within(change.context()) for change in changes])


def leave_units_out(x: Tensor, site: Site, base: Tensor, drops: Sequence[tuple[int, ...]]) -> Tensor:
    """``base`` without the part that each set of units contributes.

    x      [N, units * width]  input of the site's output projection
    base   [N, D]              its output
    drops  V sets of units
    Returns [V, N, D].
    """
    weight, width = site.out.weight, site.width
    size = len(drops[0])
    # Aligned runs of units, such as single heads or consecutive groups of neurons, are read in place.
    runs = [tuple(range(drop[0], drop[0] + size)) for drop in drops]
    if list(drops) == runs and site.units % size == 0 and all(drop[0] % size == 0 for drop in drops):
        return leave_one_out(x, weight, base, size * width, groups=[drop[0] // size for drop in drops])
    longest = max(len(drop) for drop in drops)
    columns = torch.zeros(len(drops), longest, width, dtype=torch.long)
    valid = torch.zeros(len(drops), longest, width, dtype=torch.bool)
    for i, drop in enumerate(drops):
        columns[i, : len(drop)] = torch.tensor(drop)[:, None] * width + torch.arange(width)
        valid[i, : len(drop)] = True
    index = columns.flatten().to(x.device)
    gathered = x[:, index] * valid.flatten().to(x.device)
    return leave_one_out(gathered, weight[:, index], base, longest * width)
