"""Interventions on a block that replay evaluates: ablation of heads, neurons or the block, and weight perturbation.

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

    Attributes
    ----------
    tower : str
        The tower.
    layer : int
        Its block.
    site : str or None
        Kind of the site whose output projection's input and result are needed; None: none.
    runs_block : bool
        Whether the block runs, at least in part, for each variant.
    stacks : bool
        Whether variants run together, stacked on the batch dimension.
    """

    tower: str
    layer: int
    site: str | None = None
    runs_block = True
    stacks = True

    def check(self) -> None:  # noqa: B027
        """Raise ValueError for an intervention that changes nothing."""

    @property
    def key(self) -> Hashable:
        """Interventions on one block with equal keys are evaluated together."""
        return (type(self), self.site)

    @staticmethod
    @abstractmethod
    def outputs(at: Stopped, changes: Sequence[Any]) -> Tensor:
        """Return the model's outputs under each of V interventions of one key.

        Parameters
        ----------
        at : Stopped
            The model stopped at the block, with one batch of B rows.
        changes : sequence of V interventions
            Of this class and one key.

        Returns
        -------
        Tensor [V * B, ...]
        """


class _DropUnits(Intervention):
    """Ablate units of one site: subtract their part of the output projection's result, ``y' = y - x_g W_g^T``."""

    @property
    def kind(self) -> str:
        """Kind of the site."""
        raise NotImplementedError

    @property
    def units(self) -> tuple[int, ...]:
        """Indices of the ablated units."""
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
    """Ablate attention heads of one block.

    Parameters
    ----------
    tower : str
        The tower.
    layer : int
        Its block.
    heads : tuple of int
        Heads; under grouped-query attention, key/value heads with all their query heads.
    cross : bool
        Whether they are heads of the cross-attention.
    """

    tower: str
    layer: int
    heads: tuple[int, ...]
    cross: bool = False

    @property
    def kind(self) -> str:
        return "cross_head" if self.cross else "head"

    @property
    def units(self) -> tuple[int, ...]:
        return self.heads


@dataclass(frozen=True)
class DropNeurons(_DropUnits):
    """Ablate hidden neurons of one block's MLP.

    Parameters
    ----------
    tower : str
        The tower.
    layer : int
        Its block.
    neurons : tuple of int
        Indices into the MLP's hidden dimension.
    """

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
    """Ablate a whole block: its output is the residual stream that enters it.

    Parameters
    ----------
    tower : str
        The tower.
    layer : int
        Its block.
    """

    tower: str
    layer: int
    runs_block = False

    @property
    def kind(self) -> str:
        return "layer"

    @property
    def units(self) -> tuple[int, ...]:
        """Empty: the block is removed as a whole."""
        return ()

    @staticmethod
    def outputs(at: Stopped, changes: Sequence[DropLayer]) -> Tensor:
        return at.finish_after(stacked(at.stream, len(changes)), len(changes))


Removal = DropHead | DropNeurons | DropLayer  # structured ablations, which a plan can make permanent


@dataclass(frozen=True)
class PerturbWeight(Intervention):
    """Add ``sign * eps * z`` to one weight matrix of a block, with z ~ N(0, 1) drawn by `ops.perturb`.

    The zeroth-order perturbation of ECoFLaP (arXiv 2310.02998). The weight itself is not written. Variants share
    nothing within the block: it runs once for each, and only its output is stacked.

    Parameters
    ----------
    tower : str
        The tower.
    layer : int
        Its block.
    matrix : str
        Path of the linear layer in the block.
    seed, tensor_id : int
        The random stream of z.
    eps : float
        Scale of the perturbation.
    sign : {1, -1}
        Which end of the zeroth-order difference.
    """

    tower: str
    layer: int
    matrix: str
    seed: int
    tensor_id: int
    eps: float
    sign: int

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
    """Run a block and all later ones within a context manager, such as one that raises a mask threshold (CoMP).

    Blocks before ``layer`` must compute the same inside and outside of the context. Variants share and stack nothing.

    Parameters
    ----------
    tower : str
        The tower.
    layer : int
        First block that the context affects.
    context : callable () -> context manager
        Entered once for each batch.
    """

    tower: str
    layer: int
    context: Callable[[], AbstractContextManager[object]]
    stacks = False

    @staticmethod
    def outputs(at: Stopped, changes: Sequence[Within]) -> Tensor:
        return torch.cat([at.finish_within(change.context()) for change in changes])


def leave_units_out(x: Tensor, site: Site, base: Tensor, drops: Sequence[tuple[int, ...]]) -> Tensor:
    """Return an output projection's result without each of V sets of units.

    Parameters
    ----------
    x : Tensor [N, units * width], fp32/bf16/fp16
        Input of the site's output projection.
    site : Site
        Its weight is read.
    base : Tensor [N, D], dtype of x
        Its result with all units, whatever was added to it.
    drops : sequence of V tuples of int
        Sets of units to leave out.

    Returns
    -------
    Tensor [V, N, D], dtype of x
    """
    weight, width = site.out.weight, site.width
    size = len(drops[0])
    # Aligned runs of units, such as single heads or consecutive groups of neurons, need no gather of weight columns.
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
