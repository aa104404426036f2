"""The report: one HTML file with what was scored, what was cut and what became of the model."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import torch
import transformers

from . import __version__, zoo
from ._native import build_info
from .anatomy import MATRIX
from .checkpoint import RECORD
from .figures import (
    KINDS,
    NOTHING,
    UNITS,
    column,
    cut,
    heat_map,
    minus,
    names,
    number,
    quality_against_sparsity,
    ranking,
    removed_shares,
    sparsity,
    svg,
)
from .methods import METHODS
from .plan import Plan, Scores, write_text

SCORES = "scores.json"
COMPARISONS = "comparisons.json"


@dataclass
class Record:
    """What a report is about: the part of a `Result` that outlives the model."""

    plan: Plan
    scores: Scores | None = None
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)


def save_record(folder: str | os.PathLike, result: Any, comparisons: Mapping[str, Any] | None = None) -> None:
    """Write beside a saved pruned model what `load_record` needs and pruning.json does not hold."""
    folder = Path(folder)
    for name in (SCORES, COMPARISONS):  # those of an earlier model in the same folder
        (folder / name).unlink(missing_ok=True)
    if result.scores is not None:
        result.scores.save(folder / SCORES)
    if comparisons:
        numbers = {name: _numbers(other) for name, other in comparisons.items()}
        write_text(folder / COMPARISONS, json.dumps(numbers, indent=1) + "\n")


def load_record(folder: str | os.PathLike) -> tuple[Record, dict[str, dict]]:
    """The record of a saved pruned model and what it was compared with. Raises ValueError if the folder holds none."""
    folder = Path(folder)
    path = folder / RECORD
    if not path.is_file():
        raise ValueError(f"{folder}: no {RECORD}; expected a folder written by 'vlprune prune --out'")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not content["plans"]:
            raise ValueError(f"{path}: no plan was applied to this model")
        record = Record(
            plan=Plan.from_dict(content["plans"][-1]["plan"]),
            before=content["measured"]["before"] or {},
            after=content["measured"]["after"] or {},
            method=content["method"] or {},
            data=content["data"] or {},
        )
        others = folder / COMPARISONS
        comparisons = json.loads(others.read_text(encoding="utf-8")) if others.is_file() else {}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: malformed ({type(error).__name__}: {error})") from None
    if (folder / SCORES).is_file():
        record.scores = Scores.load(folder / SCORES)
    return record, comparisons


def applied_plan(result: Any) -> Plan:
    """What really went: after rounding, where the model tells."""
    plans = getattr(getattr(result, "model", None), "vlprune", {}).get("plans", [])
    return Plan.from_dict(plans[-1]["plan"]) if plans else result.plan


# ---- numbers as people read them ------------------------------------------------------------------------------------

HIDDEN = ("image_to_text_", "text_to_image_")  # the two halves of a recall that is shown
SIZES = ("params", "nonzero", "flops", "latency_ms")
NAMES = {"params": "parameters", "nonzero": "not zero", "flops": "FLOPs", "latency_ms": "latency"}


def si(value: float, unit: str = "") -> str:
    """12,345,678 -> "12.3 M"."""
    for factor, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= factor:
            scaled = value / factor
            return f"{scaled:.{max(0, 2 - int(math.log10(abs(scaled))))}f}{prefix}{unit}"
    return f"{value:.0f}{' ' + unit if unit else ''}"


def metric(name: str, value: Any) -> str:
    """A measured number with its unit."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return NOTHING if value is None else str(value)
    if name in ("params", "nonzero", "flops"):
        return si(value)
    if name.endswith("_ms"):
        return f"{value:.1f} ms" if value < 100 else f"{value:.0f} ms"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def change(name: str, before: Any, after: Any) -> str:
    """What became of a number: a difference for a quality, per cent for a size."""
    if not all(isinstance(v, (int, float)) for v in (before, after)) or before == after:
        return ""
    if name in SIZES or name.endswith("_ms"):
        return minus(f"{100 * (after / before - 1):+.0f} %") if before else ""
    return minus(f"{after - before:+.3f}")


def columns(*numbers: Mapping[str, Any]) -> list[str]:
    """The metrics to show: qualities first, then sizes and speed."""
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
    """Rows "dense", the method, and what it is compared with; None if nothing was measured.

    For the terminal and the page alike: {"columns": [...], "rows": [{"name", "main", "cells": [{"text", "change"}]}]}.
    """
    rows = _rows(result, comparisons)
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


def _rows(result: Any, comparisons: Mapping[str, Any] | None) -> list[tuple[str, Mapping[str, Any], bool]]:
    """(name, numbers, whether it is the result) of the models that were measured, dense first."""
    name = method_name(result)
    sparsity = _method(result).get("sparsity")
    if sparsity is not None and any(other.startswith(f"{name} ") for other in comparisons or {}):
        name = f"{name} {sparsity:g}"  # what tells it from the same method at others
    rows = [("dense", result.before, False), (name, result.after, True)]
    rows += [(name, _numbers(other), False) for name, other in (comparisons or {}).items()]
    return [(name, numbers, main) for name, numbers, main in rows if numbers]


def _numbers(other: Any) -> dict[str, Any]:
    return dict(other) if isinstance(other, Mapping) else dict(other.after)


def method_name(result: Any) -> str:
    """ "MoPE" of {"name": "mope", ...}."""
    method = _method(result)
    name = str(method.get("name") or "pruned")
    name = METHODS[name].__name__ if name in METHODS else name
    return f"{name}, distilled" if method.get("distill_steps") else name


def _method(result: Any) -> dict[str, Any]:
    return result.method or result.plan.method or {}


def duration(seconds: float) -> str:
    """ "0.4 s", "12 s", "3 min 20 s", "5 h 10 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    return f"{int(seconds) // 3600:,} h {int(seconds) % 3600 // 60} min"


def environment() -> dict[str, Any]:
    """Versions, what was compiled, what it runs on: plain data."""
    content: dict[str, Any] = {
        "vlprune_ext": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": machine(),
        "threads": torch.get_num_threads(),
    }
    content |= build_info()
    content["gpus"] = [
        f"{torch.cuda.get_device_name(i)}, sm_{''.join(map(str, torch.cuda.get_device_capability(i)))}"
        for i in range(torch.cuda.device_count())
    ]
    content["zoo"] = zoo.names()
    return content


# ---- the page -------------------------------------------------------------------------------------------------------


def write_report(
    path: str | os.PathLike, result: Any, *, comparisons: Mapping[str, Any] | None = None, title: str | None = None
) -> None:
    """Write a self-contained HTML report; whole or not at all.

    result       a `Result` or `Record`: plan, scores, before, after, method, data
    comparisons  name -> another `Result`, or its dict of numbers; more rows in the table
    """
    write_text(path, render(result, comparisons=comparisons, title=title))


def render(result: Any, *, comparisons: Mapping[str, Any] | None = None, title: str | None = None) -> str:
    """The HTML of `write_report`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vlprune_ext"), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    scores: Scores | None = result.scores
    plan = applied_plan(result)
    table = comparison_table(result, comparisons)
    if table:
        table["note"] = _table_note(result, table["keys"])
    return environment.get_template("report.html.j2").render(
        title=title or f"Pruning by {method_name(result)}",
        lede=_lede(result, plan),
        table=table,
        trade_off=_trade_off(result, comparisons),
        cut=svg(cut(plan)) if _units_removed(plan) else "",
        layers_removed=_layers_removed(plan),
        sparsity=svg(sparsity(plan)) if _zeroed(plan) else "",
        importance=_importance(scores, plan, _method(result)) if scores is not None else [],
        extremes=extremes(scores, plan) if scores is not None else [],
        errors=scores is not None and _has_errors(scores),
        indistinguishable=indistinguishable(scores) if scores is not None else "",
        facts=_facts(result),
        version=__version__,
    )


def _count(plan: Plan, kind: str) -> tuple[int, int]:
    """(removed, all) units of a kind; those of removed layers count as removed."""
    removed = total = 0
    for tower, blocks in plan.shape.items():
        for layer, block in enumerate(blocks):
            units = block.get(kind, 0)
            total += units
            removed += units if layer in plan.layers.get(tower, []) else len(plan.removed(tower, kind, layer))
    return removed, total


def cut_summary(plan: Plan) -> str:
    """ "12 of 24 heads, 768 of 1,536 neurons and 2 of 10 layers", "60% of the weights of 72 matrices (41% to 70%)"."""
    return _listed(_units_removed(plan) + _zeroed(plan)) or "nothing"


def _units_removed(plan: Plan) -> list[str]:
    parts = []
    for kind, word in UNITS.items():
        removed, total = _count(plan, kind)
        if removed:
            parts.append(f"{removed:,} of {total:,} {word}")
    layers = sum(len(set(gone)) for gone in plan.layers.values())
    if layers:
        parts.append(f"{layers} of {sum(map(len, plan.shape.values()))} layers")
    return parts


def _zeroed(plan: Plan) -> list[str]:
    if not any(plan.sparsity.values()):
        return []
    least, most = min(plan.sparsity.values()), max(plan.sparsity.values())
    share, spread = f"{most:.0%}", f"{least:.0%} to {most:.0%}"
    of = f"of the weights of {len(plan.sparsity):,} {'matrices' if len(plan.sparsity) > 1 else 'matrix'}"
    if share == f"{least:.0%}":
        return [f"{share} {of}"]
    asked = plan.method.get("sparsity")  # of all their weights: a plan does not know how large the matrices are
    known = isinstance(asked, (int, float)) and least <= asked <= most
    return [f"{asked:.0%} {of} ({spread})" if known else f"{spread} {of}"]


def _listed(parts: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def _lede(result: Any, plan: Plan) -> str:
    removed, zeroed = _listed(_units_removed(plan)), _listed(_zeroed(plan))
    done = [f"removed {removed}"] * bool(removed) + [f"zeroed {zeroed}"] * bool(zeroed)
    text = f"{method_name(result)} {_listed(done) or 'removed nothing'}."
    before, after = result.before or {}, result.after or {}
    facts = []
    if zeroed and after.get("params") and "nonzero" in after:
        facts.append(f"{1 - after['nonzero'] / after['params']:.0%} of all parameters are zero")
    for key in ("params", "flops"):
        if before.get(key) and after.get(key) and (removed or not zeroed):
            share = 1 - after[key] / before[key]
            facts.append(f"{abs(share):.0%} {'fewer' if share >= 0 else 'more'} {NAMES[key]}")
    quality = next((key for key in columns(before) if key not in SIZES and key in after), None)
    if quality:
        was, now = (metric(quality, numbers[quality]) for numbers in (before, after))
        facts.append(f"{quality.replace('_', ' ')} went from {was} to {now}")
    if not facts:
        return text
    joined = "; ".join(facts)
    return f"{text} {joined[0].upper()}{joined[1:]}."


def _trade_off(result: Any, comparisons: Mapping[str, Any] | None) -> str:
    """Quality against sparsity, where pruned models of different sparsities were measured."""
    dense = result.before or {}
    quality = next((key for key in columns(dense) if key not in SIZES), None)
    if quality is None or not dense.get("nonzero"):
        return ""
    points = [
        (name, 1 - numbers["nonzero"] / dense["nonzero"], numbers[quality])
        for name, numbers, _ in _rows(result, comparisons)
        if "nonzero" in numbers and isinstance(numbers.get(quality), (int, float)) and math.isfinite(numbers[quality])
    ]
    several = len({round(share, 2) for _, share, _ in points[1:]}) > 1
    return svg(quality_against_sparsity(points, quality.replace("_", " "))) if several else ""


def _table_note(result: Any, keys: list[str]) -> str:
    notes = ["Small figures: change against the dense model."]
    if "flops" in keys:
        notes.append("FLOPs of one sample, two per multiply-add.")
    if "latency_ms" in keys:
        notes.append("Latency: median, batch 1, on the machine named below.")
    extra = [
        f"{key.replace('_', ' ')} {value}"
        for key, value in (result.after or {}).items()
        if isinstance(value, str) and value
    ]
    if extra:
        notes.append("Measured with " + ", ".join(extra) + ".")
    return " ".join(notes)


def _layers_removed(plan: Plan) -> str:
    return "; ".join(f"{t} {', '.join(map(str, sorted(gone)))}" for t, gone in plan.layers.items() if gone)


def _kinds(scores: Scores) -> list[str]:
    return [kind for kind in KINDS if scores.where(kind=kind)]


def _importance(scores: Scores, plan: Plan, method: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "title": KINDS[kind].capitalize(),
            "text": _what_matrix_scores_are(scores, method) if kind == MATRIX else _what_scores_are(scores),
            "map": "" if kind == "layer" else svg(heat_map(scores, plan, kind=kind)),
            "map_caption": _map_caption(scores, kind),
            "ranking": svg(ranking(scores, plan, kind=kind)),
            "ranking_caption": _ranking_caption(scores, plan, kind),
        }
        for kind in _kinds(scores)
    ]


def _what_scores_are(scores: Scores) -> str:
    name = scores.objective or "unnamed"
    if not _measured(scores):
        return f"Importance by {name}: not measured on samples, so without errors."
    dense = f"; it is {number(scores.dense)} with all of them" if math.isfinite(scores.dense) else ""
    return f"How much the objective ({name}) drops when one is left out{dense}."


def _what_matrix_scores_are(scores: Scores, method: Mapping[str, Any]) -> str:
    estimator = method.get("estimator")
    if estimator == "outliers":
        factor = f"{method.get('outlier_factor', 5):g}"
        return f"How many weights w of each matrix have |w| ‖x‖, where x is their input, above {factor} times the mean."
    text = f"How much the loss L ({scores.objective or 'unnamed'}) depends on each matrix"
    importance = method.get("importance") or ("weighted" if estimator == "first-order" else "norm")
    slope = {
        "first-order": "the mean |∂L/∂w| of its weights w",
        "zeroth-order": "the mean |L(W + εz) − L(W − εz)| / 2ε over random directions z",  # noqa: RUF001
    }.get(str(estimator))
    if slope is None:
        return f"{text}."
    if importance == "weighted" and estimator == "first-order":
        slope = "the sum of |w| |∂L/∂w| over its weights w"
    elif importance == "weighted":
        slope = f"the sum of |w| times {slope}"
    elif importance == "squared":
        slope = f"the sum of w² times the square of {slope}"
    return f"{text}: {slope}."


def _measured(scores: Scores) -> bool:
    return bool((scores.count > 0).any())


def _has_errors(scores: Scores) -> bool:
    return _measured(scores) and not bool(scores.error.isnan().all())


def _map_caption(scores: Scores, kind: str) -> str:
    text = "Colour on a square-root scale shared by the towers"
    if kind == MATRIX:
        text, errors = f"{text}: the darker, the more important.", "±: one standard error over random directions."
    else:
        text += ". Blue: the model needs it. Red: the model is better without it. Hatched: removed."
        errors = "Dot: within 1.96 standard errors of zero."
    return f"{text} {errors}" if _has_errors(scores) else text


def _ranking_caption(scores: Scores, plan: Plan, kind: str) -> str:
    text = "Square-root scale."
    if _has_errors(scores):
        of = "over random directions" if kind == MATRIX else "of the mean, from paired differences per sample"
        text = f"Shaded: ± one standard error {of}. {text}"
    order = scores.ranking(kind=kind)
    shares = removed_shares(scores, plan)
    gone = [shares[i] > 0 for i in order]
    count = sum(gone)
    if count and not all(gone[:count]):
        text += (
            " The removed ones are not simply the lowest: modules are ranked by what they cost, cut within their layer,"
            " or scored again once others are gone, as the method's fields below say."
        )
    return text


def extremes(scores: Scores, plan: Plan | None, count: int = 8) -> list[tuple[str, list[dict[str, Any]]]]:
    """The modules at both ends of the ranking, as rows of text: module, value, error, cost, removed."""
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
    """How many neighbours in the rankings could be either way round; "" when the samples are not kept."""
    if scores.samples is None:
        return ""
    parts = []
    for kind in _kinds(scores):
        order = scores.ranking(kind=kind)
        if len(order) > 1:
            pairs = scores.indistinguishable(order)
            parts.append(f"{len(pairs)} of {len(order) - 1} neighbouring {KINDS[kind]}")
    if not parts:
        return ""
    return f"Within 1.96 standard errors of each other: {_listed(parts)}. Their order is not certain."


def _facts(result: Any) -> list[tuple[str, list[tuple[str, str]]]]:
    method = _method(result)
    data = {**(result.data or (result.scores.data if result.scores is not None else {}))}
    runs = []
    if result.scores is not None:
        count = {int(c) for c in result.scores.count.tolist()}
        samples = str(min(count)) if len(count) == 1 else f"{min(count)} to {max(count)}"
        what, one = ("matrices", "matrix") if result.scores.parameters else ("modules", "module")
        runs = [(f"{what} scored", f"{len(result.scores):,}"), (f"samples per {one}", samples)]
        if result.scores.block_runs:
            runs.append(("block runs", f"{result.scores.block_runs:,}"))
    about = environment()
    versions = [
        (key.replace("_", " "), _plain(about[key]))
        for key in ("vlprune_ext", "torch", "transformers", "python", "machine", "threads", "isa", "gpus")
        if about[key]
    ]
    return [
        ("Method", [(key, _plain(value)) for key, value in method.items()]),
        ("Data", [(key, _plain(value)) for key, value in data.items()] + runs),
        ("Versions", versions),
    ]


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(v)}" for key, v in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def machine() -> str:
    """The processor's name."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        pass
    return name
