"""Global magnitude pruning: the smallest weights of the whole model."""

from __future__ import annotations

from dataclasses import dataclass, field

from .ecoflap import ECoFLaP


@dataclass(kw_only=True)
class GlobalMagnitude(ECoFLaP):
    """Prune the smallest |w| of the whole model, by one global threshold: the exact k-th value over all its matrices.

    Parameters
    ----------
    sparsity : float
        Share of all prunable weights that become zero, in [0, 1).
    per_tower : bool
        True: one threshold for each tower.
    pattern, dsnot, towers, objective, batch_size
        As in `ECoFLaP`.
    importance, granularity, aggregate, max_sparsity, draws, eps, seed, realised, samples_per_loss
        No effect.
    outlier_factor, outlier_range, damping
        No effect.
    """

    estimator: str = field(default="magnitude", init=False)
    criterion: str = field(default="magnitude", init=False)
    scope: str | None = field(default="matrix", init=False)
