"""Parameters and tokens in turn: a baseline of CoMP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...comp.strategy import ModeStrategy
from .comp import CoMP


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
