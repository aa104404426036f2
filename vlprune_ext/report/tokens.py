"""The report of token pruning: quality against tokens, and one picture."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from ..plan.files import write_text
from ..workflow.token_trials import TokenComparison, Trial
from .figures.style import svg
from .figures.tokens import kept_squares, quality_against_tokens
from .page import fill, plain, versions
from .words import change, metric, si


def write_token_report(path: str | os.PathLike, found: TokenComparison, *, title: str = "Fewer visual tokens") -> None:
    """Write a self-contained HTML page; whole or not at all."""
    write_text(
        path,
        fill(
            "tokens.html.j2",
            title=title,
            lede=_lede(found),
            curve=_curve(found) if found.judged else "",
            measured=_rows(found) if found.judged else [],
            quality=_quality(found),
            question=found.question,
            picture=svg(picture_of(found)),
            trials=[{"name": name, "cells": cells(trial)} for name, trial in found.trials.items()],
            peak=any(trial.peak for trial in found.trials.values()),
            facts=_facts(found),
        ),
    )


def picture_of(found: TokenComparison) -> Any:
    """Draw the picture and what each method keeps of it."""
    return kept_squares(found.picture, found.squares, {name: trial.answer for name, trial in found.trials.items()})


def cells(trial: Trial) -> list[str]:
    """Format a trial for a table: answer, visual tokens, time, KV cache and, on a GPU, peak memory."""
    found = [trial.answer, f"{trial.share:.0%}", metric("latency_ms", 1000 * trial.seconds), si(trial.cache, "B")]
    return found + [si(trial.peak, "B")] * bool(trial.peak)


def _quality(found: TokenComparison) -> str:
    return {"generated": "right answers"}.get(found.metric, found.metric.replace("_", " "))


def _curve(found: TokenComparison) -> str:
    series = {name: [(one.share, one.quality) for one in several] for name, several in found.judged.items()}
    return svg(quality_against_tokens(series, found.dense, _quality(found)))


def _rows(found: TokenComparison) -> list[dict[str, Any]]:
    quality = found.metric
    rows = [{"name": "all tokens", "keep": "", "share": "100%", "value": metric(quality, found.dense), "main": True}]
    for name, several in found.judged.items():
        for one in several:
            row = {"name": name, "keep": f"{one.method.keep:g}", "share": f"{one.share:.0%}", "main": False}
            rows.append(row | {"value": metric(quality, one.quality)})
            rows[-1]["change"] = change(quality, found.dense, one.quality)
    return [{"change": "", **row} for row in rows]


def _lede(found: TokenComparison) -> str:
    data = found.data
    if data is None or not found.judged:
        return "One picture and one question, with all visual tokens and with fewer."
    every = [(name, one) for name, several in found.judged.items() for one in several]
    name, most = max(every, key=lambda pair: (pair[1].quality, -pair[1].share))
    return (
        f"{_quality(found).capitalize()}: {metric(found.metric, found.dense)} with all visual tokens, on"
        f" {data.n_images:,} images of {data.name} ({data.split}). Of what was tried, {name} keeps most of it:"
        f" {metric(found.metric, most.quality)} with {most.share:.0%} of the tokens."
    )


def _facts(found: TokenComparison) -> list[tuple[str, list[tuple[str, str]]]]:
    fields = []
    for name, several in found.judged.items():
        method: Any = several[0].method
        fields.append((name, plain({k: v for k, v in dataclasses.asdict(method).items() if k != "keep"})))
    about = [(key, plain(value)) for key, value in found.source.items()]
    return [("Methods", fields), ("Data", about), ("Versions", versions())]
