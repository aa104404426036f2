"""First-order Taylor structured pruning: the gradient baseline."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...anatomy.patch import evaluation_mode
from ...objectives import objective_named
from ...plan import Scores
from ...units.gates import gate_slopes, slope_of
from ...units.masking import masked
from .structured import Structured, Task


@dataclass(kw_only=True)
class Taylor(Structured):
    """Prune heads, neuron groups and layers by the objective's gradient in a gate on each (first-order Taylor).

    The gate, at 1, multiplies the module's slice of the output projection's input (Michel et al., arXiv 1905.10650, eq.
    3; Molchanov et al., arXiv 1906.10771). Its gradient estimates the drop that `MoPE` measures, for one backward pass;
    it needs a differentiable objective and the memory of a batch's graph.

    Parameters
    ----------
    per_sample : bool
        True: mean over rows of |gradient|. False: |mean over rows|.
    objective : str or Objective, optional
        A differentiable one. None: "contrastive" for a dual encoder, "lm_loss" for a model that generates.
    keep_heads, keep_neurons, keep_layers, towers, stage, scope, cost, steps, neurons_per_group, rewire, batch_size
        As in `Structured`.
    """

    per_sample: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        objective = objective_named(self.objective)
        if not objective.differentiable:
            raise ValueError(f"objective: {objective.name!r} has no gradient; try 'contrastive' or 'margin'")

    def importance(self, task: Task) -> Scores:
        found = task.candidates()
        anatomy, objective = task.anatomy, task.objective
        value = torch.zeros(len(found), dtype=torch.float64)
        with masked(anatomy.model, task.plan), evaluation_mode(anatomy.model):
            for tower in task.towers:
                with torch.no_grad():
                    other = objective.other(anatomy, tower, task.data, self.batch_size)
                gone = task.plan.layers.get(tower, ())
                slopes, _ = gate_slopes(anatomy, objective, tower, task.data, other, self.batch_size, gone)
                for i, candidate in enumerate(found):
                    if candidate.module.tower == tower:
                        slope = slope_of(slopes, candidate.intervention)
                        value[i] = (slope.abs().mean() if self.per_sample else slope.mean().abs()).double()
        return task.scores(value, f"taylor({objective.name})")
