"""MoPE: the module-wise pruning error of MoPE-CLIP (CVPR 2024, arXiv 2403.07839)."""

from __future__ import annotations

from dataclasses import dataclass

from ...plan import Scores
from ...units.ablation import score
from .structured import Structured, Task


@dataclass(kw_only=True)
class MoPE(Structured):
    """Prune heads, neuron groups and layers by ablation: the drop of the objective without each module.

    ``MoPE(t) = Z(f) - Z(f without t)`` (MoPE-CLIP, CVPR 2024, arXiv 2403.07839, eq. 1), exact, by replay. The published
    recipe is ``MoPE(objective="recall@1", scope="layer", steps=1)``. The defaults differ where it paid on validation
    data; docs/mope.md measures each choice.

    Parameters
    ----------
    keep_heads, keep_neurons, keep_layers : float
        Shares of heads, neurons and layers kept in each tower, in (0, 1].
    steps : int
        Rounds of scoring and removing; 1 is one-shot.
    objective : str or Objective, optional
        Z. None: "contrastive" for a dual encoder, "lm_loss" for a model that generates.
    exact : bool
        True: score every module on all samples. False: early stopping once a module's side of the cut is decided.
    confidence : float
        Standard errors between a score and the cut at which the module counts as decided.
    stacked_rows : int, optional
        Rows stacked on the batch axis in the model's suffix; decides speed and memory, not scores. None: the fastest
        height, measured.
    towers, stage, scope, cost, neurons_per_group, rewire, batch_size
        As in `Structured`.
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
