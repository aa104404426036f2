"""SparseGPT: the same sparsity everywhere, second-order."""

from __future__ import annotations

from dataclasses import dataclass, field

from .ecoflap import ECoFLaP


@dataclass(kw_only=True)
class SparseGPT(ECoFLaP):
    """The same sparsity everywhere; the weights that stay make up for those that go (arXiv 2301.00774)."""

    estimator: str = field(default="uniform", init=False)
    criterion: str = field(default="sparsegpt", init=False)
