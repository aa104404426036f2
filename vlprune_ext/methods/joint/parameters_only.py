"""Parameters alone, behind one threshold: a baseline of CoMP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .comp import CoMP


@dataclass(kw_only=True, eq=False)
class ParametersOnly(CoMP):
    """Heads and neurons of all towers behind one threshold, as UPop (ICML 2023, arXiv 2301.13741) prunes them."""

    modes: Sequence[str] | None = ("parameters",)
    cip: bool = False
    rho: float = 0.0
    judged: str = "trained"
    confirm: bool = False
