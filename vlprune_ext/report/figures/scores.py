"""Charts of scores: importance by layer, and the ranking."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from ...anatomy import MATRIX
from ...plan import Module, Plan, Scores
from .style import (
    BAR,
    INK,
    KEPT,
    KINDS,
    REMOVED,
    UNITS,
    minus,
    new_figure,
    number,
    signed_root,
    signed_square,
    styled,
    write_cells,
)

if TYPE_CHECKING:  # matplotlib loads when something is drawn
    from matplotlib.figure import Figure


def place(parameter: str) -> tuple[str, int, str]:
    """Where a matrix stands: "encoder.layers.3.mlp.fc1.weight" -> ("encoder.layers", 3, "mlp.fc1")."""
    match = re.fullmatch(r"(.+?)\.(\d+)\.(.+)\.weight", parameter)
    if match is None:
        raise ValueError(f"{parameter}: not the name of a weight in a numbered block")
    return match[1], int(match[2]), match[3]


def endings(paths: Iterable[str]) -> dict[str, str]:
    """As much of the end of each path as tells it from the others: "self_attn.q_proj" -> "q_proj"."""
    parts = {path: path.split(".") for path in paths}

    def ending(own: list[str]) -> list[str]:
        ends = (own[-n:] for n in range(1, len(own)))
        return next((end for end in ends if sum(p[-len(end) :] == end for p in parts.values()) == 1), own)

    return {path: ".".join(ending(own)) for path, own in parts.items()}


def names(scores: Scores) -> list[str]:
    """Name the modules: "vision.3.head1", "text.0.q_proj"."""
    paths = [place(parameter)[2] for parameter in scores.parameters]
    if not paths:
        return list(map(str, scores.modules))
    ends = endings(paths)
    return [f"{m.tower}.{m.layer}.{ends[path]}" for m, path in zip(scores.modules, paths, strict=True)]


def removed_shares(scores: Scores, plan: Plan | None) -> list[float]:
    """How much of every scored module a plan removes: 1 all of it, 0 nothing; parts of neuron groups in between."""
    if plan is None:
        return [0.0] * len(scores)
    groups = Counter(m[:3] for m in scores.modules)
    gone = {key: set(plan.removed(*key)) for key in groups if key[1] in UNITS}

    def share(module: Module) -> float:
        if module.layer in plan.layers.get(module.tower, []):
            return 1.0
        if module.kind not in UNITS:
            return 0.0
        removed = gone[module[:3]]
        if module.kind != "neurons":
            return float(module.index in removed)
        units = scores.neurons.get(module.tower, {}).get(module.layer)
        # Scores read from CSV have no groups; without rewiring they are consecutive and equal but for the last.
        total = plan.shape[module.tower][module.layer]["neurons"]
        size = math.ceil(total / groups[module[:3]])
        members = units[module.index] if units else range(module.index * size, min(total, (module.index + 1) * size))
        return sum(unit in removed for unit in members) / max(len(members), 1)

    return [share(module) for module in scores.modules]


@styled()
def heat_map(scores: Scores, plan: Plan | None = None, *, kind: str = "head") -> Figure:
    """Draw importance by layer (down) and head, group or matrix (across), a panel a tower; removed ones hatched.

    Cells with room show value and standard error; elsewhere a dot marks what is within 1.96 standard errors of zero.
    """
    from matplotlib.colors import FuncNorm

    rows = scores.where(kind=kind)
    if not rows:
        raise ValueError(f"scores: nothing of kind {kind!r} was scored")
    # One outlier shall not bleach the rest.
    largest = float(scores.value[rows].abs().quantile(0.99)) or 1.0
    norm = FuncNorm((signed_root, signed_square), -largest, largest)
    unit = 10.0 ** (math.floor(math.log10(largest)) - 2)
    short = number if kind == MATRIX else lambda value: minus(f"{round(value / unit)}")  # matrices' span decades
    shares = np.array(removed_shares(scores, plan))
    modules = sorted((scores.modules[i] for i in rows), key=lambda module: module.layer)
    towers = {module.tower: 1 + module.layer for module in modules}  # how many layers
    written = max(module.index for module in modules) < 16
    height = 0.14 + 0.06 * written + 0.1 * (written and bool(scores.error[rows].isfinite().any()))
    heights = [height * layers + 0.6 for layers in towers.values()]

    figure = new_figure(f"Importance of {KINDS[kind]}", sum(heights) + 0.8)
    panels = figure.subplots(len(towers), height_ratios=heights, squeeze=False)
    for axes, (tower, layers) in zip(panels.flat, towers.items(), strict=True):
        where = scores.where(tower, kind)
        y, x = np.array([scores.modules[i][2:] for i in where]).T
        value, error, share = np.full((3, layers, x.max() + 1), np.nan)
        value[y, x], error[y, x], share[y, x] = scores.value[where], scores.error[where], shares[where]
        for layer, of_layer in enumerate(np.nan_to_num(share)):
            edges, top = np.arange(len(of_layer) + 1) - 0.5, layer - 0.5
            axes.stairs(top + of_layer, edges, baseline=top, fill=True, **{**REMOVED, "facecolor": "none"})
        image = axes.imshow(value, cmap="RdBu", norm=norm, aspect="auto", interpolation="none")
        if written:
            texts = {}
            for cell in zip(y, x, strict=True):
                texts[cell] = short(value[cell]) + (f"\n±{short(error[cell])}" if 0 < error[cell] < math.inf else "")
            write_cells(image, texts)
        else:
            axes.plot(*np.nonzero(np.abs(value) <= 1.96 * error)[::-1], ".", color=INK, markersize=1.5)
        axes.set(title=tower + (f", in units of {unit:g}" if written and kind != MATRIX else ""), ylabel="layer")
        axes.locator_params(integer=True)
        pairs = sorted({(scores.modules[i].index, place(scores.parameters[i])[2]) for i in where if kind == MATRIX})
        if len(dict(pairs)) == len(pairs) > 0:  # the same in all blocks
            ends = endings(path for _, path in pairs)
            tilt: dict[str, Any] = {"rotation": 20, "ha": "right"} if len("".join(ends.values())) > 90 else {}
            axes.set_xticks(list(dict(pairs)), [ends[path] for _, path in pairs], **tilt)
        else:
            axes.set_xlabel("matrix" if kind == MATRIX else KINDS[kind][:-1])
    bar = figure.colorbar(image, ax=panels, label="importance", **BAR)
    ticks = largest * signed_square(np.linspace(-1, 1, 9))
    bar.set_ticks(ticks, labels=[number(tick) for tick in ticks])
    bar.ax.set_xlim(left=min(0.0, max(-largest, float(scores.value[rows].min()))))
    return figure


@styled()
def ranking(scores: Scores, plan: Plan | None = None, *, kind: str = "head") -> Figure:
    """Modules from least to most important with standard errors; removed ones hatched, a line at the cut."""
    order = scores.ranking(kind=kind)
    if not order:
        raise ValueError(f"scores: nothing of kind {kind!r} was scored")
    value = scores.value[order].numpy()
    error = np.nan_to_num(scores.error[order].numpy(), posinf=0.0)
    share = np.array(removed_shares(scores, plan))[order]

    figure = new_figure(f"{len(order):,} {KINDS[kind]}, least to most important", 3)
    axes = figure.subplots()
    axes.use_sticky_edges = False
    axes.set_rasterization_zorder(2 if len(order) > 500 else None)  # a picture is smaller than so many steps
    edges = np.arange(len(order) + 1) - 0.5
    kept = value * (1 - share)
    axes.stairs(kept, edges, fill=True, color=KEPT)
    axes.stairs(value, edges, baseline=kept, fill=True, **REMOVED)
    axes.stairs(value + error, edges, baseline=value - error, fill=True, color=INK, alpha=0.35)
    axes.axhline(0, color=INK, linewidth=0.8)
    cut = int((share > 0).sum())
    if 0 < cut < len(order) and share[:cut].all():
        axes.axvline(cut - 0.5, color=INK, linewidth=1, linestyle="--")
        axes.annotate(" cut", (cut - 0.5, 1), xycoords=("data", "axes fraction"), va="top")
    axes.set_yscale("function", functions=(signed_root, signed_square))
    if (value - error).min() >= 0:
        axes.set_ylim(bottom=0)
    axes.set(xlim=(edges[0], edges[-1]), ylabel="importance")
    axes.grid(axis="y")
    called = names(scores)
    labels = [called[i] for i in order] if len(order) <= 64 else []
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
    return figure
