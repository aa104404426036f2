"""Wanda: uniform sparsity, by weight times activation norm."""

from __future__ import annotations

from dataclasses import dataclass, field

from .ecoflap import ECoFLaP


@dataclass(kw_only=True)
class Wanda(ECoFLaP):
    """Prune every matrix to the same sparsity by Wanda's score |W_ij| ||X_j||.

    Source: Wanda (arXiv 2306.11695).

    Parameters
    ----------
    sparsity : float
        Share of each matrix that becomes zero, in [0, 1).
    pattern : str
        "unstructured", or "n:m" for n zeros in every m.
    scope : {"row", "matrix"}, optional
        Weights that compete. None: rows, but matrices in the vision tower of a model that generates.
    dsnot : int
        Exchanges of each row by DSnoT after pruning.
    towers, objective, batch_size
        As in `ECoFLaP`.
    importance, granularity, aggregate, max_sparsity, per_tower, draws, eps, seed, realised, samples_per_loss
        No effect.
    outlier_factor, outlier_range, damping
        No effect.
    """

    estimator: str = field(default="uniform", init=False)
    criterion: str = field(default="wanda", init=False)
