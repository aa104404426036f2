"""What was measured, as tables: for the terminal and the page alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..plan import Plan, Scores
from .figures.scores import names, removed_shares
from .figures.style import KINDS, column
from .words import NAMES, SIZES, change, listed, method_name, method_of, metric, numbers_of, si

HIDDEN = ("image_to_text_", "text_to_image_")  # the two halves of a recall that is shown


def columns(*numbers: Mapping[str, Any]) -> list[str]:
    """List the metrics to show: qualities first, then sizes and speed."""
    seen = dict.fromkeys(
        key
        for row in numbers
        for key, value in row.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not key.startswith(HIDDEN)
    )
    # Where nothing was zeroed, all parameters are not zero, and a column that says so says nothing.
    sparse = any(row.get("nonzero", 0) < 0.99 * row.get("params", 0) for row in numbers)
    sizes = [key for key in SIZES if key in seen and (sparse or key != "nonzero")]
    return [key for key in seen if key not in SIZES] + sizes


def comparison_table(result: Any, comparisons: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """Return rows "dense", the method, and what it is compared with; None if nothing was measured.

    For the terminal and the page alike: {"columns": [...], "rows": [{"name", "main", "cells": [{"text", "change"}]}]}.
    """
    rows = measured_rows(result, comparisons)
    keys = columns(*(numbers for _, numbers, _ in rows))
    if not keys:
        return None
    return {
        "keys": keys,
        "columns": [NAMES.get(key, key.replace("_", " ")) for key in keys],
        "rows": [
            {
                "name": name,
                "main": main,
                "cells": [
                    {
                        "text": metric(key, numbers.get(key)),
                        "change": change(key, result.before.get(key), numbers.get(key)),
                    }
                    for key in keys
                ],
            }
            for name, numbers, main in rows
        ],
    }


def measured_rows(result: Any, comparisons: Mapping[str, Any] | None) -> list[tuple[str, Mapping[str, Any], bool]]:
    """List (name, numbers, whether it is the result) of the models that were measured, dense first."""
    name = method_name(result)
    sparsity = method_of(result).get("sparsity")
    if sparsity is not None and any(other.startswith(f"{name} ") for other in comparisons or {}):
        name = f"{name} {sparsity:g}"  # what tells it from the same method at others
    rows = [("dense", result.before, False), (name, result.after, True)]
    rows += [(name, numbers_of(other), False) for name, other in (comparisons or {}).items()]
    return [(name, numbers, main) for name, numbers, main in rows if numbers]


def extremes(scores: Scores, plan: Plan | None, count: int = 8) -> list[tuple[str, list[dict[str, Any]]]]:
    """List the modules at both ends of the ranking, as rows of text: module, value, error, cost, removed."""
    order, called = scores.ranking(), names(scores)
    shares = removed_shares(scores, plan)
    count = min(count, max(1, len(order) // 2))
    tables = []
    for title, positions in (
        ("Least important", order[:count]),
        ("Most important", order[: -count - 1 : -1]),
    ):
        values = column([float(scores.value[i]) for i in positions])
        errors = column([float(scores.error[i]) for i in positions])
        rows = [
            {
                "module": called[i],
                "value": value,
                "error": error,
                "cost": si(float(scores.cost[i])),
                "removed": shares[i] > 0,
            }
            for i, value, error in zip(positions, values, errors, strict=True)
        ]
        tables.append((title, rows))
    return tables


def indistinguishable(scores: Scores) -> str:
    """Say how many neighbours in the rankings are not distinguishable; "" when the samples are not kept."""
    if scores.samples is None:
        return ""
    parts = []
    for kind in kinds_of(scores):
        order = scores.ranking(kind=kind)
        if len(order) > 1:
            pairs = scores.indistinguishable(order)
            parts.append(f"{len(pairs)} of {len(order) - 1} neighbouring {KINDS[kind]}")
    if not parts:
        return ""
    return f"Within 1.96 standard errors of each other: {listed(parts)}. Their order is not certain."


def kinds_of(scores: Scores) -> list[str]:
    return [kind for kind in KINDS if scores.where(kind=kind)]
