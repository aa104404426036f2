"""Tokens only, under one global threshold: a baseline of CoMP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .comp import CoMP


@dataclass(kw_only=True, eq=False)
class TokensOnly(CoMP):
    """Prune tokens of all towers under one global threshold, sample by sample.

    A baseline of CoMP, as MADTP (CVPR 2024, arXiv 2403.02991) prunes; built from CoMP's parts, not MADTP's code.

    Parameters
    ----------
    modes, cit, rho, judged, confirm
        Preset: ``modes=("tokens",)``, importances by eq. (6), no exploration, accuracy measured after each stage only,
        no trial of a mode before it is pruned.
    flops, train, validation, calibration, objective, interval, step, hold, tokens, seed, batch_size
        As in `Settings`.
    tau, history_weight, horizon, cip
        No effect: there is one mode, and it prunes no units.
    """

    modes: Sequence[str] | None = ("tokens",)
    cit: bool = False
    rho: float = 0.0
    judged: str = "trained"
    confirm: bool = False
