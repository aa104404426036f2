"""Tokens alone, behind one threshold: a baseline of CoMP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .comp import CoMP


@dataclass(kw_only=True, eq=False)
class TokensOnly(CoMP):
    """Tokens of all towers behind one threshold, sample by sample, as in MADTP (CVPR 2024, arXiv 2403.02991)."""

    modes: Sequence[str] | None = ("tokens",)
    cit: bool = False
    rho: float = 0.0
    judged: str = "trained"
    confirm: bool = False
