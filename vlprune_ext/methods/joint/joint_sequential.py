"""Parameters first, then tokens: a baseline of CoMP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...comp.strategy import ModeStrategy
from .comp import CoMP


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
