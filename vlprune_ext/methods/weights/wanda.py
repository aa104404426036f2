"""Wanda: the same sparsity everywhere, by weight times activation."""

from __future__ import annotations

from dataclasses import dataclass, field

from .ecoflap import ECoFLaP


@dataclass(kw_only=True)
class Wanda(ECoFLaP):
    """The same sparsity everywhere, by |W_ij| ||X_j|| (arXiv 2306.11695)."""

    estimator: str = field(default="uniform", init=False)
    criterion: str = field(default="wanda", init=False)
