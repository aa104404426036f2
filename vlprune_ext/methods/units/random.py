"""Random structured pruning: the baseline without which no table is honest."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...plan import Scores
from .structured import Structured, Task


@dataclass(kw_only=True)
class Random(Structured):
    """Remove modules at random, the same ones for the same seed."""

    seed: int = 0
    scope: str = "kind"
    steps: int = 1

    def importance(self, task: Task) -> Scores:
        generator = torch.Generator().manual_seed(self.seed)
        # Times the cost, so that importance per parameter is uniform too.
        cost = torch.tensor([float(c.cost) for c in task.candidates()], dtype=torch.float64)
        return task.scores(torch.rand(len(cost), generator=generator, dtype=torch.float64) * cost, "random")
