"""Gradient of an objective in a gate on every head and neuron: the first-order (Taylor) estimate of its ablation."""

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
    """Differentiate the objective in one gate for each row and unit, at gate value 1.

    A gate multiplies its unit's slice of the output projection's input (Michel et al., arXiv 1905.10650, eq. 3). An
    objective may couple all rows, so it is differentiated first, with respect to the rows' outputs; the model's graph
    is then held for one batch at a time. No parameter is changed or gets a gradient.

    Parameters
    ----------
    anatomy : Anatomy
        The model.
    objective : Objective
        A differentiable one.
    tower : str
        The tower whose units get gates.
    data : Data
        Calibration data.
    other : Tensor or None
        What ``objective.other`` returns for this tower.
    batch_size : int
        Rows run at once.
    skip_layers : sequence of int
        Blocks that the model bypasses; they get no gates.

    Returns
    -------
    slopes : dict of (int, str) to Tensor [rows, units]
        (layer, kind of site) -> d (sum of the objective over all samples) / d gate, on the CPU.
    values : Tensor [S]
        The objective of each sample, on the CPU.
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
    """Sum the gate slopes of all units that an intervention removes.

    Parameters
    ----------
    slopes : dict of (int, str) to Tensor [rows, units]
        From `gate_slopes`.
    drop : Removal
        Heads, neurons or a layer of the same tower.

    Returns
    -------
    Tensor [rows]
        The slope in one gate on all of them.
    """
    if isinstance(drop, DropLayer):
        return torch.stack([s.sum(-1) for (layer, _), s in slopes.items() if layer == drop.layer]).sum(0)
    return slopes[drop.layer, drop.kind][:, list(drop.units)].sum(-1)


def _gate(patches: Patches, layer: int, block: Block, gates: dict[tuple[int, str], Tensor]) -> None:
    """Register gates of ones [B, units], which require gradients, on every site of a block; add them to ``gates``."""

    def hook(site: Site):
        """Return a pre-hook that multiplies a site's units by their gates."""

        def multiply(_, args):
            x = args[0]
            gate = torch.ones(x.shape[0], site.units, dtype=x.dtype, device=x.device, requires_grad=True)
            gates[layer, site.kind] = gate
            shape = (x.shape[0], *[1] * (x.dim() - 2), site.units, 1)
            return ((x.unflatten(-1, (site.units, site.width)) * gate.view(shape)).flatten(-2),)

        return multiply

    for site in block.sites.values():
        patches.pre_hook(site.out, hook(site))
