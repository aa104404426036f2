"""Random structured pruning: the baseline that every table needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...plan import Scores
from .structured import Structured, Task


@dataclass(kw_only=True)
class Random(Structured):
    """Prune random heads, neuron groups and layers; the same ones for the same seed.

    Parameters
    ----------
    seed : int
        Seed of the draw.
    scope : {"layer", "kind", "tower", "model"}
        Who competes, as in `Structured`; "kind" by default.
    steps : int
        Rounds; 1 by default.
    keep_heads, keep_neurons, keep_layers, towers, stage, cost, neurons_per_group, rewire, objective, batch_size
        As in `Structured`.
    """

    seed: int = 0
    scope: str = "kind"
    steps: int = 1

    def importance(self, task: Task) -> Scores:
        generator = torch.Generator().manual_seed(self.seed)
        # Times the cost, so that importance per parameter is uniform too.
        cost = torch.tensor([float(c.cost) for c in task.candidates()], dtype=torch.float64)
        return task.scores(torch.rand(len(cost), generator=generator, dtype=torch.float64) * cost, "random")
