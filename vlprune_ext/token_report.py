"""The report of token pruning: quality against tokens, and one picture."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .data import Data
from .figures import svg
from .plan import write_text
from .report import fill, plain, versions
from .summary import change, metric, si
from .token_figures import kept_squares, quality_against_tokens
from .token_trials import Judged, Trial


def write_token_report(
    path: str | os.PathLike,
    *,
    title: str,
    question: str,
    trials: Mapping[str, Trial],
    picture: np.ndarray | None = None,
    squares: Mapping[str, np.ndarray] | None = None,
    quality: str = "",
    dense: float | None = None,
    judged: Mapping[str, Sequence[Judged]] | None = None,
    data: Data | None = None,
) -> None:
    """Write a self-contained HTML page; whole or not at all.

    question                what was asked about the picture
    trials                  name -> what came of it
    picture, squares        [H, W, 3], and name -> [height, width] bool: those that stay
    quality, dense, judged  name of a metric, the dense model's, and name -> what `judge` found, on ``data``
    """
    write_text(
        path,
        fill(
            "tokens.html.j2",
            title=title,
            lede=_lede(quality, dense, judged or {}, data),
            curve="" if dense is None or not judged else _curve(judged, dense, quality),
            measured=[] if dense is None else _rows(judged or {}, dense, quality),
            quality=quality.replace("_", " "),
            question=question,
            picture="" if picture is None else svg(kept_squares(picture, squares or {}, answers(trials))),
            trials=[{"name": name, "cells": cells(trial)} for name, trial in trials.items()],
            peak=any(trial.peak for trial in trials.values()),
            facts=_facts(judged or {}, data),
        ),
    )


def answers(trials: Mapping[str, Trial]) -> dict[str, str]:
    return {name: trial.answer for name, trial in trials.items()}


def cells(trial: Trial) -> list[str]:
    """A trial in a table: answer, visual tokens, time, cache and, on a GPU, peak memory."""
    found = [trial.answer, f"{trial.share:.0%}", metric("latency_ms", 1000 * trial.seconds), si(trial.cache, "B")]
    return found + [si(trial.peak, "B")] * bool(trial.peak)


def _curve(judged: Mapping[str, Sequence[Judged]], dense: float, quality: str) -> str:
    series = {name: [(one.share, one.quality) for one in several] for name, several in judged.items()}
    return svg(quality_against_tokens(series, dense, quality.replace("_", " ")))


def _rows(judged: Mapping[str, Sequence[Judged]], dense: float, quality: str) -> list[dict[str, Any]]:
    first = {"name": "dense", "keep": "", "share": "100%", "value": metric(quality, dense), "change": "", "main": True}
    return [first] + [
        {
            "name": name,
            "keep": f"{one.method.keep:g}",
            "share": f"{one.share:.0%}",
            "value": metric(quality, one.quality),
            "change": change(quality, dense, one.quality),
            "main": False,
        }
        for name, several in judged.items()
        for one in several
    ]


def _lede(quality: str, dense: float | None, judged: Mapping[str, Sequence[Judged]], data: Data | None) -> str:
    if dense is None or data is None or not judged:
        return "One picture and one question, with all visual tokens and with fewer."
    most = max((one for several in judged.values() for one in several), key=lambda one: (one.quality, -one.share))
    name = next(name for name, several in judged.items() if most in several)
    return (
        f"{quality.replace('_', ' ').capitalize()} is {metric(quality, dense)} with all visual tokens, on"
        f" {data.n_images:,} images of {data.name} ({data.split}). Of what was tried, {name} keeps most of it:"
        f" {metric(quality, most.quality)} with {most.share:.0%} of the tokens."
    )


def _facts(judged: Mapping[str, Sequence[Judged]], data: Data | None) -> list[tuple[str, list[tuple[str, str]]]]:
    fields = [
        (name, plain({k: v for k, v in dataclasses.asdict(several[0].method).items() if k != "keep"}))  # type: ignore[call-overload]
        for name, several in judged.items()
    ]
    about = [] if data is None else [(key, plain(value)) for key, value in data_facts(data).items()]
    return [("Methods", fields), ("Data", about), ("Versions", versions())]


def data_facts(data: Data) -> dict[str, Any]:
    """Which data it was."""
    return {"name": data.name, "split": data.split, "hash": data.hash, "images": data.n_images}
