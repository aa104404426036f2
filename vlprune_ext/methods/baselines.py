"""What ECoFLaP is judged against, by their own names: its fine stage with other fields."""

from __future__ import annotations

from dataclasses import dataclass, field

from .ecoflap import ECoFLaP


@dataclass(kw_only=True)
class Wanda(ECoFLaP):
    """The same sparsity everywhere, by |W_ij| ||X_j|| (arXiv 2306.11695)."""

    estimator: str = field(default="uniform", init=False)
    criterion: str = field(default="wanda", init=False)


@dataclass(kw_only=True)
class SparseGPT(ECoFLaP):
    """The same sparsity everywhere; the weights that stay make up for those that go (arXiv 2301.00774)."""

    estimator: str = field(default="uniform", init=False)
    criterion: str = field(default="sparsegpt", init=False)


@dataclass(kw_only=True)
class GlobalMagnitude(ECoFLaP):
    """The smallest |w| of the whole model go, wherever they lie: the exact k-th value over all its matrices."""

    estimator: str = field(default="magnitude", init=False)
    criterion: str = field(default="magnitude", init=False)
    scope: str | None = field(default="matrix", init=False)
