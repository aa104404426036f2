"""MoPE: the module-wise pruning error of MoPE-CLIP (CVPR 2024, arXiv 2403.07839)."""

from __future__ import annotations

from dataclasses import dataclass

from ...plan import Scores
from ...units.ablation import score
from .structured import Structured, Task


@dataclass(kw_only=True)
class MoPE(Structured):
    """Rank modules by how much the objective drops without them (eq. 1), exactly, by replay.

    The published recipe is ``MoPE(objective="recall@1", scope="layer", steps=1)``. The defaults differ where it paid on
    validation data; docs/mope.md shows what each choice is worth.

    exact         False stops judging a module once its side of the cut is decided
    confidence    standard errors from the cut at which a module counts as decided
    stacked_rows  rows that run through the model's suffix at once; None measures what is fastest
    """

    exact: bool = True
    confidence: float = 1.5
    stacked_rows: int | None = None

    def importance(self, task: Task) -> Scores:
        return score(
            task.anatomy.model,
            task.data,
            modules=task.kinds,
            towers=task.towers,
            objective=task.objective,
            groups=task.groups,
            plan=task.plan,
            cost=self.cost,
            exact=self.exact,
            pools=task.pools,
            confidence=self.confidence,
            batch_size=self.batch_size,
            stacked_rows=self.stacked_rows,
            progress=task.progress,
        )
