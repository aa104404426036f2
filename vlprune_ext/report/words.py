"""What was done and measured, in the words and numbers that people read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..methods import title
from ..plan import Plan
from .figures.style import NOTHING, UNITS, minus

SIZES = ("params", "nonzero", "flops", "latency_ms")
NAMES = {"params": "parameters", "nonzero": "not zero", "flops": "FLOPs", "latency_ms": "latency"}


def si(value: float, unit: str = "") -> str:
    """Format a number with an SI prefix: 12,345,678 -> "12.3 M"."""
    for factor, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= factor:
            scaled = value / factor
            return f"{scaled:.{max(0, 2 - int(math.log10(abs(scaled))))}f}{prefix}{unit}"
    return f"{value:.0f}{' ' + unit if unit else ''}"


def metric(name: str, value: Any) -> str:
    """Format a measured number with its unit."""
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
    """Format a change: a difference for a quality, per cent for a size."""
    if not all(isinstance(v, (int, float)) for v in (before, after)) or before == after:
        return ""
    if name in SIZES or name.endswith("_ms"):
        return minus(f"{100 * (after / before - 1):+.0f} %") if before else ""
    return minus(f"{after - before:+.3f}")


def numbers_of(other: Any) -> dict[str, Any]:
    return dict(other) if isinstance(other, Mapping) else dict(other.after)


def method_name(result: Any) -> str:
    """Return the method's name as people write it: "MoPE" of {"name": "mope", ...}."""
    method = method_of(result)
    name = str(method.get("name") or "pruned")
    name = title(name)
    return f"{name}, distilled" if method.get("distill_steps") else name


def method_of(result: Any) -> dict[str, Any]:
    return result.method or result.plan.method or {}


def duration(seconds: float) -> str:
    """Format a duration: "0.4 s", "12 s", "3 min 20 s", "5 h 10 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    return f"{int(seconds) // 3600:,} h {int(seconds) % 3600 // 60} min"


def cut_summary(plan: Plan) -> str:
    """Summarise what a plan removes: "12 of 24 heads and 60% of the weights of 72 matrices"."""
    return listed(units_removed(plan) + zeroed(plan) + tokens_gone(plan)) or "nothing"


def units_removed(plan: Plan) -> list[str]:
    parts = []
    for kind, word in UNITS.items():
        removed, total = _count(plan, kind)
        if removed:
            parts.append(f"{removed:,} of {total:,} {word}")
    layers = sum(len(set(gone)) for gone in plan.layers.values())
    if layers:
        parts.append(f"{layers} of {sum(map(len, plan.shape.values()))} layers")
    return parts


def zeroed(plan: Plan) -> list[str]:
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


def tokens_gone(plan: Plan) -> list[str]:
    """Summarise pruned tokens: "24% of the vision tokens", the mean over blocks; no per cent where not measured."""
    measured = shares_of_tokens(plan.method)
    shares = {tower: measured.get(tower, schedule.get("keep")) for tower, schedule in plan.tokens.items()}
    return [
        f"{1 - sum(left) / len(left):.0%} of the {tower} tokens" if left else f"{tower} tokens"
        for tower, left in shares.items()
    ]


def shares_of_tokens(method: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return tower -> share of its tokens that enters each block, as CoMP last measured it; empty for others."""
    history = method.get("history") or [{}]
    return {**history[-1], **method.get("reached", {})}.get("tokens", {})


def _count(plan: Plan, kind: str) -> tuple[int, int]:
    """Count (removed, all) units of a kind; those of removed layers count as removed."""
    removed = total = 0
    for tower, blocks in plan.shape.items():
        for layer, block in enumerate(blocks):
            units = block.get(kind, 0)
            total += units
            removed += units if layer in plan.layers.get(tower, []) else len(plan.removed(tower, kind, layer))
    return removed, total


def listed(parts: Sequence[str]) -> str:
    """Join words: "a, b and c"."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))
