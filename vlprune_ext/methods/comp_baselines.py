"""What CoMP is judged against: one kind of pruning alone, and both without a strategy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..comp.strategy import ModeStrategy
from .comp import CoMP


@dataclass(kw_only=True, eq=False)
class ParametersOnly(CoMP):
    """Heads and neurons of all towers behind one threshold, as UPop (ICML 2023, arXiv 2301.13741) prunes them."""

    modes: Sequence[str] | None = ("parameters",)
    cip: bool = False
    rho: float = 0.0
    judged: str = "trained"
    confirm: bool = False


@dataclass(kw_only=True, eq=False)
class TokensOnly(CoMP):
    """Tokens of all towers behind one threshold, sample by sample, as in MADTP (CVPR 2024, arXiv 2403.02991)."""

    modes: Sequence[str] | None = ("tokens",)
    cit: bool = False
    rho: float = 0.0
    judged: str = "trained"
    confirm: bool = False


@dataclass(kw_only=True, eq=False)
class JointSequential(CoMP):
    """Parameters until half of the FLOPs are saved, then tokens."""

    modes: Sequence[str] | None = ("parameters", "tokens")
    cip: bool = False
    cit: bool = False
    judged: str = "trained"
    confirm: bool = False

    def choose(self, strategy: ModeStrategy, among: list[str], spent: float) -> tuple[str, bool]:
        wanted = "parameters" if spent < 0.5 else "tokens"
        return (wanted if wanted in among else among[0]), False


@dataclass(kw_only=True, eq=False)
class JointSimultaneous(CoMP):
    """Parameters and tokens in turn."""

    modes: Sequence[str] | None = ("parameters", "tokens")
    cip: bool = False
    cit: bool = False
    judged: str = "trained"
    confirm: bool = False

    def choose(self, strategy: ModeStrategy, among: list[str], spent: float) -> tuple[str, bool]:
        return among[strategy.stage % len(among)], False
