"""The report of pruning: one HTML file with what was scored, what was removed and what became of the model."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from ..anatomy import MATRIX
from ..checkpoint.record import applied_plan
from ..plan import Plan, Scores
from ..plan.files import write_text
from .figures.plans import cut, sparsity
from .figures.quality import quality_against_savings
from .figures.scores import heat_map, ranking, removed_shares
from .figures.style import KINDS, number, svg
from .page import fill, plain, versions
from .stages import MEASURED, stages
from .tables import columns, comparison_table, extremes, indistinguishable, kinds_of, measured_rows
from .words import NAMES, SIZES, listed, method_name, method_of, metric, tokens_gone, units_removed, zeroed


def write_report(
    path: str | os.PathLike, result: Any, *, comparisons: Mapping[str, Any] | None = None, title: str | None = None
) -> None:
    """Write a self-contained HTML report; whole or not at all.

    Parameters
    ----------
    path : str or PathLike
        The file to write.
    result : Result or Record
        With plan, scores, before, after, method and data.
    comparisons : mapping, optional
        Name -> another `Result`, or its numbers; more rows in the table.
    title : str, optional
        By default the method's name.
    """
    write_text(path, render(result, comparisons=comparisons, title=title))


def render(result: Any, *, comparisons: Mapping[str, Any] | None = None, title: str | None = None) -> str:
    """Return the HTML of `write_report`."""
    scores: Scores | None = result.scores
    plan = applied_plan(result)
    table = comparison_table(result, comparisons)
    if table:
        table["note"] = _table_note(result, table["keys"])
    return fill(
        "report.html.j2",
        title=title or f"Pruning by {method_name(result)}",
        lede=_lede(result, plan),
        table=table,
        charts=_charts(result, comparisons, plan),
        stages=stages(plan.method),
        importance=_importance(scores, plan, method_of(result)) if scores is not None else [],
        extremes=extremes(scores, plan) if scores is not None else [],
        errors=scores is not None and _has_errors(scores),
        indistinguishable=indistinguishable(scores) if scores is not None else "",
        facts=_facts(result),
    )


def _lede(result: Any, plan: Plan) -> str:
    removed, zeros, gone = (listed(parts(plan)) for parts in (units_removed, zeroed, tokens_gone))
    done = [f"removed {removed}"] * bool(removed) + [f"zeroed {zeros}"] * bool(zeros)
    done += [f"prunes {gone} at run time"] * bool(gone)
    text = f"{method_name(result)} {listed(done) or 'removed nothing'}."
    before, after = result.before or {}, result.after or {}
    reached = plan.method.get("reached")
    facts = [f"{reached['flops']:.0%} of the dense model's FLOPs are left"] if reached else []
    if zeros and after.get("params") and "nonzero" in after:
        facts.append(f"{1 - after['nonzero'] / after['params']:.0%} of all parameters are zero")
    shown = {"params": removed or not (zeros or gone), "flops": not reached and (removed or gone or not zeros)}
    for key in ("params", "flops"):
        if before.get(key) and after.get(key) and shown[key]:
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


def _charts(result: Any, comparisons: Mapping[str, Any] | None, plan: Plan) -> list[dict[str, str]]:
    """List the charts of what was done, those that have something to show: title, svg and caption of each."""
    layers = _layers_removed(plan)
    found = [
        (
            "Quality against savings",
            _trade_off(result, comparisons),
            "Across: as a share of the dense model's. Up: the first measure of the table. Dashed: the dense model.",
        ),
        (
            "What was removed",
            svg(cut(plan)) if units_removed(plan) else "",
            "Numbers: units kept. Hatched: removed" + (f". Whole layers removed: {layers}." if layers else "."),
        ),
        (
            "Sparsity of every block",
            svg(sparsity(plan)) if zeroed(plan) else "",
            "Per cent of the weights that are zero: the darker, the more. Blank: not pruned.",
        ),
    ]
    return [{"title": title, "svg": chart, "caption": caption} for title, chart, caption in found if chart]


# What may be drawn across, the first that tells the pruned models apart: the numbers, and what the axis is called.
_SAVINGS = (
    ("nonzero", "share of parameters that are zero or removed"),
    ("flops", "share of FLOPs saved"),
)
_TOLD_APART = 0.02  # shares this near to each other say nothing


def _trade_off(result: Any, comparisons: Mapping[str, Any] | None) -> str:
    """Draw quality against what was saved, where pruned models that saved differently were measured; else ""."""
    dense = result.before or {}
    quality = next((key for key in columns(dense) if key not in SIZES), None)
    if quality is None:
        return ""
    rows = [
        (name, numbers)
        for name, numbers, _ in measured_rows(result, comparisons)
        if isinstance(numbers.get(quality), (int, float)) and math.isfinite(numbers[quality])
    ]
    for key, across in _SAVINGS:
        points = [(name, 1 - n[key] / dense[key], n[quality]) for name, n in rows if dense.get(key) and key in n]
        shares = [share for _, share, _ in points[1:]]
        if shares and max(shares) - min(shares) >= _TOLD_APART:
            return svg(quality_against_savings(points, quality.replace("_", " "), across))
    return ""


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
        for kind in kinds_of(scores)
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
            " or scored again once others are removed, as the method's fields below say."
        )
    return text


def _facts(result: Any) -> list[tuple[str, list[tuple[str, str]]]]:
    method = method_of(result)
    data = {**(result.data or (result.scores.data if result.scores is not None else {}))}
    runs = []
    if result.scores is not None:
        count = {int(c) for c in result.scores.count.tolist()}
        samples = str(min(count)) if len(count) == 1 else f"{min(count)} to {max(count)}"
        what, one = ("matrices", "matrix") if result.scores.parameters else ("modules", "module")
        runs = [(f"{what} scored", f"{len(result.scores):,}"), (f"samples per {one}", samples)]
        if result.scores.block_runs:
            runs.append(("block runs", f"{result.scores.block_runs:,}"))
    return [
        ("Method", [(key, plain(value)) for key, value in method.items() if key not in MEASURED]),
        ("Data", [(key, plain(value)) for key, value in data.items()] + runs),
        ("Versions", versions()),
    ]
