"""SparseGPT: uniform sparsity, second-order, with weight update."""

from __future__ import annotations

from dataclasses import dataclass, field

from .ecoflap import ECoFLaP


@dataclass(kw_only=True)
class SparseGPT(ECoFLaP):
    """Prune every matrix to the same sparsity by SparseGPT: inverse-Hessian scores, with an update of the kept weights.

    Source: SparseGPT (arXiv 2301.00774).

    Parameters
    ----------
    sparsity : float
        Share of each matrix that becomes zero, in [0, 1).
    pattern : str
        "unstructured", or "n:m" for n zeros in every m.
    damping : float
        Damping of the Hessian, as a share of its mean diagonal, in (0, 1).
    towers, objective, batch_size
        As in `ECoFLaP`.
    importance, granularity, aggregate, max_sparsity, per_tower, draws, eps, seed, realised, samples_per_loss
        No effect.
    outlier_factor, outlier_range, scope, dsnot
        No effect; ``dsnot`` must be 0.
    """

    estimator: str = field(default="uniform", init=False)
    criterion: str = field(default="sparsegpt", init=False)
