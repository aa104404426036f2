"""Parameters first, then tokens: a baseline of CoMP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...comp.strategy import ModeStrategy
from .comp import CoMP


@dataclass(kw_only=True, eq=False)
class JointSequential(CoMP):
    """Prune parameters until half of the FLOPs reduction is reached, then tokens.

    A baseline of CoMP: one threshold for all heads and neurons, one for all tokens; no exploration, no costs.

    Parameters
    ----------
    modes, cip, cit, judged, confirm
        Preset: ``modes=("parameters", "tokens")``, importances by eqs. (3) and (6), accuracy measured after each stage
        only, no trial of a mode before it is pruned.
    flops, train, validation, calibration, objective, interval, step, hold, tokens, seed, batch_size
        As in `Settings`.
    rho, tau, history_weight, horizon
        No effect: costs do not decide.
    """

    modes: Sequence[str] | None = ("parameters", "tokens")
    cip: bool = False
    cit: bool = False
    judged: str = "trained"
    confirm: bool = False

    def choose(self, strategy: ModeStrategy, among: list[str], spent: float) -> tuple[str, bool]:
        wanted = "parameters" if spent < 0.5 else "tokens"
        return (wanted if wanted in among else among[0]), False
