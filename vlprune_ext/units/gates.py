"""The slope of an objective in a gate on every head and neuron: the first-order estimate of what dropping it costs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..anatomy import Anatomy, Block, Site
from ..anatomy.patch import Patches, gradients_only_of
from ..data import Data
from ..objectives import Objective
from ..replay import DropLayer, Removal

Slopes = dict[tuple[int, str], Tensor]  # (layer, kind of site) -> [rows, units]


def gate_slopes(
    anatomy: Anatomy,
    objective: Objective,
    tower: str,
    data: Data,
    other: Tensor | None,
    batch_size: int,
    skip_layers: Sequence[int] = (),
) -> tuple[Slopes, Tensor]:
    """(d (sum of the objective over all samples) / d gate, for one gate per row and unit, at one; the values [S]).

    A gate multiplies its unit's slice of the output projection's input (Michel et al., arXiv 1905.10650, eq. 3). The
    objective may tie all rows together, so it is differentiated first, with respect to the rows' outputs; the graph of
    the model is then held for one batch at a time. Parameters are left as they are.

    other        what ``objective.other`` gives for this tower
    skip_layers  blocks that the model bypasses
    """
    batches = objective.batches(anatomy, tower, data, batch_size)
    with torch.no_grad():
        outputs = [objective.outputs(anatomy, tower, batch) for batch in batches]
    leaf = torch.cat(outputs).requires_grad_()
    with torch.enable_grad():
        values = objective.values(anatomy, tower, leaf, other, data)
        (slope,) = torch.autograd.grad(values.sum(), leaf)
    found: dict[tuple[int, str], list[Tensor]] = {}
    for batch, part in zip(batches, slope.split([len(o) for o in outputs]), strict=True):
        gates: dict[tuple[int, str], Tensor] = {}
        with torch.enable_grad(), gradients_only_of(anatomy.model), Patches() as patches:
            for layer, block in enumerate(anatomy.tower(tower).blocks):
                if layer not in skip_layers:
                    _gate(patches, layer, block, gates)
            output = objective.outputs(anatomy, tower, batch)
            slopes = torch.autograd.grad(output, list(gates.values()), part, allow_unused=True)
        for (key, gate), of_gate in zip(gates.items(), slopes, strict=True):
            found.setdefault(key, []).append(torch.zeros_like(gate) if of_gate is None else of_gate)
    return {key: torch.cat(parts).cpu() for key, parts in found.items()}, values.detach().cpu()


def slope_of(slopes: Slopes, drop: Removal) -> Tensor:
    """[rows]: the slope in a gate on all that an intervention drops."""
    if isinstance(drop, DropLayer):
        return torch.stack([s.sum(-1) for (layer, _), s in slopes.items() if layer == drop.layer]).sum(0)
    return slopes[drop.layer, drop.kind][:, list(drop.units)].sum(-1)


def _gate(patches: Patches, layer: int, block: Block, gates: dict[tuple[int, str], Tensor]) -> None:
    def hook(site: Site):
        def multiply(_, args):
            x = args[0]
            gate = torch.ones(x.shape[0], site.units, dtype=x.dtype, device=x.device, requires_grad=True)
            gates[layer, site.kind] = gate
            shape = (x.shape[0], *[1] * (x.dim() - 2), site.units, 1)
            return ((x.unflatten(-1, (site.units, site.width)) * gate.view(shape)).flatten(-2),)

        return multiply

    for site in block.sites.values():
        patches.pre_hook(site.out, hook(site))
