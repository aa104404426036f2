"""Parameters only, under one global threshold: a baseline of CoMP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .comp import CoMP


@dataclass(kw_only=True, eq=False)
class ParametersOnly(CoMP):
    """Prune heads and neurons of all towers under one global threshold.

    A baseline of CoMP, as UPop (ICML 2023, arXiv 2301.13741) prunes; built from CoMP's parts, not UPop's code.

    Parameters
    ----------
    modes, cip, rho, judged, confirm
        Preset: ``modes=("parameters",)``, importances by eq. (3), no exploration, accuracy measured after each stage
        only, no trial of a mode before it is pruned.
    flops, train, validation, calibration, objective, interval, step, seed, batch_size
        As in `Settings`.
    tau, history_weight, horizon, cit, hold, tokens
        No effect: there is one mode, and it prunes no tokens.
    """

    modes: Sequence[str] | None = ("parameters",)
    cip: bool = False
    rho: float = 0.0
    judged: str = "trained"
    confirm: bool = False
