"""The stages of CoMP, as the report shows them: charts, captions, and why each mode was chosen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..comp.settings import Settings
from ..methods import METHODS
from .figures.stages import costs, progress, tokens_left
from .figures.style import minus, number, svg
from .words import listed, metric, shares_of_tokens

MEASURED = ("history", "reached")  # of a finished plan's method: not fields that were set

_COST = (
    "R: accuracy lost for each dense model's worth of FLOPs saved; below zero, accuracy rose. Large: the mode that was"
    " chosen."
)
_EXPLORED = " Ring: explored, that is drawn at random, the likelier the longer it has waited."
_TOKENS = (
    "Mean over the validation data, of those that enter the block in the dense model. Tokens leave behind a block."
)


def stages(method: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the content of the section "Stages" for a plan's method; None where it has no history."""
    history = method.get("history")
    if not history:
        return None
    accuracy = str(method.get("objective") or "accuracy").replace("_", " ")
    several = len({mode for entry in history for mode in entry["costs"]}) > 1
    explored = any(entry["explored"] for entry in history)
    left = shares_of_tokens(method)
    fewer = any(share < 1 for shares in left.values() for share in shares)
    return {
        "text": _text(method, history, accuracy),
        "progress": svg(progress(history, accuracy)),
        "progress_caption": f"Below: {accuracy} on the validation data. Dashed: the dense model. Colour: the mode."
        + " Ring: explored." * explored,
        "costs": svg(costs(history)) if several else "",
        "costs_caption": _COST + _EXPLORED * explored,
        "tokens": svg(tokens_left(left)) if fewer else "",
        "tokens_caption": _TOKENS,
        "trained": bool(method.get("train")),
        "accuracy": accuracy,
        "rows": [_row(entry, method) for entry in history],
    }


def _text(method: Mapping[str, Any], history: Sequence[Mapping[str, Any]], accuracy: str) -> str:
    count = Counter(entry["mode"] for entry in history)
    modes = listed([f"{times} of {mode}" for mode, times in count.most_common()])
    text = f"{len(history)} {'stages' if len(history) > 1 else 'stage'}: {modes}."
    reached = method.get("reached")
    if not reached:
        return text
    end = f"In the end {reached['flops']:.1%} of the dense model's FLOPs are left, mean over the validation data"
    return f"{text} {end}, and {accuracy} on it is {metric('accuracy', reached['accuracy'])}."


def _row(entry: Mapping[str, Any], method: Mapping[str, Any]) -> dict[str, Any]:
    accuracy = [metric("accuracy", value) for value in entry["accuracy"]]
    flops = [f"{share:.1%}" for share in entry["flops"]]
    return {
        "stage": entry["stage"] + 1,
        "step": f"{entry['step']:,}",
        "mode": entry["mode"],
        "why": _why(entry, method),
        "threshold": number(entry["threshold"]),
        "accuracy": " → ".join(accuracy),
        "flops": " → ".join(flops),
    }


def _why(entry: Mapping[str, Any], method: Mapping[str, Any]) -> str:
    mode, every = entry["mode"], entry["costs"]
    looked = ", ".join(f"{name} ({lost:.3g})" for name, lost in (entry.get("declined") or {}).items())
    looked = f"; too dear by now: {looked}" if looked else ""
    if entry["explored"]:
        waited = entry["waited"][mode]
        return f"explored (waited {waited} {'stages' if waited > 1 else 'stage'})"
    if len(every) == 1:
        return "the only mode"
    if getattr(METHODS.get(str(method.get("name"))), "choose", Settings.choose) is not Settings.choose:
        return "its turn"
    still = "" if every[mode] <= min(every.values()) else " of those that can still save"
    return minus(f"cheapest{still}: R {every[mode]:.3g}{looked}")
