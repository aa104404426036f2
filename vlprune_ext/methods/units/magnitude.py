"""Structured magnitude pruning: the baseline without calibration data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...anatomy import Block, Site
from ...plan import Scores
from ...replay import DropLayer
from .structured import Structured, Task


@dataclass(kw_only=True)
class Magnitude(Structured):
    """Prune heads, neuron groups and layers by magnitude: the sum of |w| over all weights removed with each.

    Source: Li et al. (arXiv 1608.08710).

    Parameters
    ----------
    scope : {"layer", "kind", "tower", "model"}
        Who competes, as in `Structured`; "kind" by default, since sums of |w| of heads and of neurons are not
        comparable.
    steps : int
        Rounds; 1 by default, since weights do not change between rounds.
    keep_heads, keep_neurons, keep_layers, towers, stage, cost, neurons_per_group, rewire, objective, batch_size
        As in `Structured`.
    """

    scope: str = "kind"  # sums of |w| of heads and of neurons are not comparable
    steps: int = 1  # weights do not change between rounds

    def importance(self, task: Task) -> Scores:
        values = []
        for candidate in task.candidates():
            drop = candidate.intervention
            block = task.anatomy.tower(drop.tower).blocks[drop.layer]
            if isinstance(drop, DropLayer):
                values.append(_of_layer(block, task, drop))
            else:
                values.append(unit_norms(block.sites[drop.kind])[list(drop.units)].sum())
        return task.scores(torch.stack(values), "magnitude")


def _of_layer(block: Block, task: Task, drop: DropLayer) -> Tensor:
    """Sum the magnitudes of a layer's remaining units."""
    total = torch.zeros((), dtype=torch.float64)
    for kind, site in block.sites.items():
        left = torch.ones(site.units, dtype=torch.bool)
        left[task.plan.removed(drop.tower, kind, drop.layer)] = False
        total += unit_norms(site)[left].sum()
    return total


@torch.no_grad()
def unit_norms(site: Site) -> Tensor:
    """Sum |w| of each unit, over the output projection and the projections that feed it.

    Parameters
    ----------
    site : Site
        Heads or neurons of one block.

    Returns
    -------
    Tensor [units], float64
        On the CPU.
    """
    total = site.out.weight.double().abs().sum(0).view(site.units, -1).sum(1)
    for projection in site.inputs:
        rows = projection.weight.double().abs().sum(1)
        # A fused projection holds [3, heads, head_dim] rows, any other [units, rows per unit].
        total = total + rows.view(site.input_segments(projection), site.units, -1).sum((0, 2))
    return total.cpu()
