"""Candidates for removal: the modules that are left in a model, and what each costs in parameters or FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..anatomy import KINDS, Anatomy, Site
from ..anatomy.patch import Patches, evaluation_mode
from ..data import Data
from ..objectives import Objective
from ..plan import Module, Plan
from ..replay import DropHead, DropLayer, DropNeurons, Removal

Groups = dict[str, dict[int, list[list[int]]]]  # tower -> layer -> group -> neurons


@dataclass(frozen=True)
class Candidate:
    """A module that can be removed.

    Parameters
    ----------
    module : Module
        Its name: tower, kind, layer, index.
    intervention : Removal
        The intervention that ablates it.
    cost : int
        Its parameters, or its FLOPs for one row.
    """

    module: Module
    intervention: Removal
    cost: int


COSTS = ("params", "flops")


def tokens_of(anatomy: Anatomy, towers: Sequence[str], data: Data, objective: Objective) -> dict[str, int]:
    """Count the tokens of one row in each tower, by running one row of the data.

    Parameters
    ----------
    anatomy : Anatomy
        The model.
    towers : sequence of str
        Towers to run.
    data : Data
        Any data that the objective can use.
    objective : Objective
        Decides what each tower is fed.

    Returns
    -------
    dict of str to int
        Tower -> sequence length of the first block's output.
    """
    tokens: dict[str, int] = {}
    for tower in towers:
        block = anatomy.tower(tower).blocks[0].module
        with torch.no_grad(), Patches() as patches, evaluation_mode(anatomy.model):
            patches.hook(block, lambda _, __, out, _t=tower: tokens.__setitem__(_t, out.shape[1]))
            objective.outputs(anatomy, tower, objective.batches(anatomy, tower, data.subset(1), 1)[0])
    return tokens


def _unit_cost(kind: str, site: Site, tokens: int | None) -> int:
    """Return the parameters of one unit; with ``tokens``, its FLOPs for one row of so many tokens.

    FLOPs are two for each parameter and token; a head adds its products with keys and values.
    """
    if tokens is None:
        return site.unit_params
    return 2 * site.unit_params * tokens + (4 * site.width * tokens**2 if kind == "head" else 0)


def check_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    """Raise ValueError unless ``kinds`` holds known kinds of modules, at least one; return them as a tuple."""
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"modules: {kind!r}, expected some of {', '.join(KINDS)}")
    if not kinds:
        raise ValueError(f"modules: none given, expected some of {', '.join(KINDS)}")
    return tuple(kinds)


def neuron_groups(
    anatomy: Anatomy, towers: Sequence[str], neurons_per_group: int, order: dict[str, list[Tensor]] | None = None
) -> Groups:
    """Split the neurons of every MLP into consecutive groups; the last group of a layer may be smaller.

    Parameters
    ----------
    anatomy : Anatomy
        The model.
    towers : sequence of str
        Towers whose MLPs are split.
    neurons_per_group : int
        Neurons of a group.
    order : dict, optional
        Tower -> layer -> Tensor [I] int64, the neurons in the order in which they are grouped (`rewired_order`). None:
        by index.

    Returns
    -------
    Groups
        Tower -> layer -> group -> neurons.

    Raises
    ------
    ValueError
        ``neurons_per_group`` is less than 1.
    """
    if neurons_per_group < 1:
        raise ValueError(f"neurons_per_group: {neurons_per_group}, expected at least 1")
    groups: Groups = {}
    for tower in towers:
        groups[tower] = {}
        for layer, block in enumerate(anatomy.tower(tower).blocks):
            count = block.sites["neurons"].units
            neurons = torch.arange(count) if order is None else order[tower][layer]
            groups[tower][layer] = [part.tolist() for part in neurons.split(neurons_per_group)]
    return groups


@torch.no_grad()
def rewired_order(
    anatomy: Anatomy, towers: Sequence[str], data: Data, objective: Objective, batch_size: int
) -> dict[str, list[Tensor]]:
    """Rank the neurons of every MLP from most to least important, so that groups hold neurons of like importance.

    The rewiring of DynaBERT (arXiv 2004.04037), by a proxy that needs no gradient: ||w_out|| * rms(activation).

    Parameters
    ----------
    anatomy : Anatomy
        The model.
    towers : sequence of str
        Towers whose MLPs are ranked.
    data : Data
        Calibration data.
    objective : Objective
        Decides what each tower is fed.
    batch_size : int
        Rows run at once.

    Returns
    -------
    dict of str to list of Tensor
        Tower -> layer -> neurons [I] int64, on the CPU.
    """
    order: dict[str, list[Tensor]] = {}
    for tower in towers:
        sites = [block.sites["neurons"] for block in anatomy.tower(tower).blocks]
        energy = [torch.zeros(site.units, dtype=torch.float64, device=site.out.weight.device) for site in sites]

        def add_to(total: Tensor) -> Callable:
            def hook(_, args):
                total.add_(args[0].double().square().flatten(0, -2).sum(0))

            return hook

        with Patches() as patches, evaluation_mode(anatomy.model):
            for site, total in zip(sites, energy, strict=True):
                patches.pre_hook(site.out, add_to(total))
            for inputs in objective.batches(anatomy, tower, data, batch_size):
                objective.outputs(anatomy, tower, inputs)
        norms = [site.out.weight.double().norm(dim=0) for site in sites]
        importance = [norm * total.sqrt() for norm, total in zip(norms, energy, strict=True)]
        order[tower] = [torch.sort(i, descending=True, stable=True).indices.cpu() for i in importance]
    return order


def candidates(
    anatomy: Anatomy,
    towers: Sequence[str],
    kinds: Sequence[str],
    groups: Groups,
    plan: Plan | None = None,
    tokens: dict[str, int] | None = None,
) -> list[Candidate]:
    """List every module of these towers and kinds that ``plan`` has not removed.

    Parameters
    ----------
    anatomy : Anatomy
        The model.
    towers : sequence of str
        Towers to list.
    kinds : sequence of str
        Kinds to list, of `anatomy.KINDS`.
    groups : Groups
        Neuron groups of each layer (`neuron_groups`).
    plan : Plan, optional
        Units already removed.
    tokens : dict of str to int, optional
        Tokens of a row of each tower (`tokens_of`), for costs in FLOPs. None: costs in parameters.

    Returns
    -------
    list of Candidate
        Tower by tower, layer by layer, kind by kind.
    """
    found = []
    for name in towers:
        length = tokens[name] if tokens else None
        for layer, block in enumerate(anatomy.tower(name).blocks):
            if plan and layer in plan.layers.get(name, []):
                continue
            for kind in kinds:
                if kind == "layer":
                    units_left = {
                        k: s.units - len(plan.removed(name, k, layer) if plan else ()) for k, s in block.sites.items()
                    }
                    cost = block.params - sum(s.units * s.unit_params for s in block.sites.values())
                    cost *= 2 * length if length else 1
                    cost += sum(units_left[k] * _unit_cost(k, s, length) for k, s in block.sites.items())
                    found.append(Candidate(Module(name, kind, layer), DropLayer(name, layer), cost))
                    continue
                site = block.sites.get(kind)
                if site is None:
                    continue
                gone = set(plan.removed(name, kind, layer)) if plan else set()
                units = groups[name][layer] if kind == "neurons" else [[head] for head in range(site.units)]
                for index, members in enumerate(units):
                    left = tuple(u for u in members if u not in gone)
                    if left:
                        drop: Removal = (
                            DropNeurons(name, layer, left)
                            if kind == "neurons"
                            else DropHead(name, layer, left, cross=kind == "cross_head")
                        )
                        found.append(
                            Candidate(
                                Module(name, kind, layer, index), drop, len(left) * _unit_cost(kind, site, length)
                            )
                        )
    return found
