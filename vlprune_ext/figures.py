"""Charts of scores and plans, drawn by matplotlib, and the numbers written beside them.

One visual rule holds everywhere: what was removed is hatched; colour says how important a module is (blue: needed,
red: the model is better without it). Every chart is a `matplotlib.figure.Figure`; `svg` makes text of it for a page.
"""

from __future__ import annotations

import io
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from .plan import Module, Plan, Scores

if TYPE_CHECKING:  # matplotlib loads when something is drawn
    from matplotlib.figure import Figure

UNITS = {"head": "heads", "cross_head": "cross-attention heads", "neurons": "neurons"}  # what a plan counts
KINDS = {**UNITS, "neurons": "neuron groups", "layer": "layers"}  # what is scored
NOTHING = "\N{EN DASH}"  # stands where there is no number

_INK, _KEPT = "#1d2329", "#2a6fb0"
_GONE: dict[str, Any] = {"facecolor": "#dfe3e8", "edgecolor": "#77828e", "linewidth": 0, "hatch": "////"}
_STYLE = {
    "font.size": 8,
    "figure.titlesize": 9,
    "figure.titleweight": "bold",
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e3e7eb",
    "hatch.linewidth": 0.6,
    "savefig.dpi": 200,
    "svg.fonttype": "none",
    "svg.hashsalt": "vlprune_ext",
}


@contextmanager
def _style() -> Iterator[None]:
    from matplotlib import style

    with style.context(["default", _STYLE]):
        yield


def minus(text: str) -> str:
    """With a true minus sign."""
    return text.replace("-", "\N{MINUS SIGN}")


def number(value: float) -> str:
    """Two or three significant digits without noise: 0.012, 1.3, 240, 4.2e-06."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else NOTHING
    if abs(value) < 1e-4 or abs(value) >= 1e6:
        return minus(f"{value:.1e}")
    digits = max(0, 1 - math.floor(math.log10(abs(value)))) if abs(value) < 100 else 0
    return minus(f"{value:.{digits}f}")


def column(values: Sequence[float]) -> list[str]:
    """Numbers with the same decimals, three significant digits for the largest: a column of a table."""
    largest = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
    digits = min(6, max(0, 2 - math.floor(math.log10(largest)))) if largest else 0
    return [minus(f"{v:.{digits}f}") if math.isfinite(v) else NOTHING for v in values]


def removed_shares(scores: Scores, plan: Plan | None) -> list[float]:
    """How much of every scored module a plan removes: 1 all of it, 0 nothing; parts of neuron groups in between."""
    if plan is None:
        return [0.0] * len(scores)
    groups = Counter(m[:3] for m in scores.modules)
    gone = {key: set(plan.removed(*key)) for key in groups if key[1] != "layer"}

    def share(module: Module) -> float:
        if module.layer in plan.layers.get(module.tower, []):
            return 1.0
        if module.kind == "layer":
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


def _root(x):
    return np.sign(x) * np.sqrt(np.abs(x))


def _square(x):
    return x * np.abs(x)


def _figure(title: str, height: float) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure((8.5, height), layout="constrained")
    figure.suptitle(title)
    return figure


def svg(figure: Figure) -> str:
    """A chart as an <svg> element: the same text on every run, no background, ids that no other chart has."""
    text = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with _style():
        figure.savefig(text, format="svg", transparent=True, metadata=no_metadata)
    element = text.getvalue()[text.getvalue().index("<svg") :]
    own = f"c{zlib.crc32(element.encode()):08x}-"
    element = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{own}", element)
    return element.replace("<svg", f'<svg role="img" aria-label="{escape(figure.get_suptitle())}"', 1)


@_style()
def heat_map(scores: Scores, plan: Plan | None = None, *, kind: str = "head") -> Figure:
    """Importance by layer (down) and head or group (across), a panel a tower; what ``plan`` removes is hatched.

    Cells with room show value and standard error; elsewhere a dot marks what is within 1.96 standard errors of zero.
    """
    from matplotlib.colors import FuncNorm

    rows = scores.where(kind=kind)
    if not rows:
        raise ValueError(f"scores: nothing of kind {kind!r} was scored")
    # One outlier shall not bleach the rest.
    largest = float(scores.value[rows].abs().quantile(0.99)) or 1.0
    norm = FuncNorm((_root, _square), -largest, largest)
    unit = 10.0 ** (math.floor(math.log10(largest)) - 2)
    shares = np.array(removed_shares(scores, plan))
    modules = sorted((scores.modules[i] for i in rows), key=lambda module: module.layer)
    towers = {module.tower: 1 + module.layer for module in modules}  # how many layers
    written = max(module.index for module in modules) < 16
    heights = [(0.3 if written else 0.14) * layers + 0.6 for layers in towers.values()]

    figure = _figure(f"Importance of {KINDS[kind]}", sum(heights) + 0.8)
    panels = figure.subplots(len(towers), height_ratios=heights, squeeze=False)
    for axes, (tower, layers) in zip(panels.flat, towers.items(), strict=True):
        where = scores.where(tower, kind)
        y, x = np.array([scores.modules[i][2:] for i in where]).T
        value, error, share = np.full((3, layers, x.max() + 1), np.nan)
        value[y, x], error[y, x], share[y, x] = scores.value[where], scores.error[where], shares[where]
        for layer, of_layer in enumerate(np.nan_to_num(share)):
            edges, top = np.arange(len(of_layer) + 1) - 0.5, layer - 0.5
            axes.stairs(top + of_layer, edges, baseline=top, fill=True, **{**_GONE, "facecolor": "none"})
        image = axes.imshow(value, cmap="RdBu", norm=norm, aspect="auto", interpolation="none")
        if written:
            for place in zip(y, x, strict=True):
                text = minus(f"{round(value[place] / unit)}")
                text += f"\n±{error[place] / unit:.0f}" if 0 < error[place] < math.inf else ""
                ink = "white" if abs(norm(value[place]) - 0.5) > 0.32 else _INK
                axes.text(*place[::-1], text, ha="center", va="center", fontsize=7, color=ink, linespacing=1)
        else:
            axes.plot(*np.nonzero(np.abs(value) <= 1.96 * error)[::-1], ".", color=_INK, markersize=1.5)
        axes.set(title=tower + (f", in units of {unit:g}" if written else ""), ylabel="layer", xlabel=KINDS[kind][:-1])
        axes.locator_params(integer=True)
    bar = figure.colorbar(image, ax=panels, location="bottom", shrink=0.5, aspect=50, pad=0.02, label="importance")
    ticks = largest * _square(np.linspace(-1, 1, 9))
    bar.set_ticks(ticks, labels=[number(tick) for tick in ticks])
    bar.ax.set_xlim(left=min(0.0, max(-largest, float(scores.value[rows].min()))))
    return figure


@_style()
def ranking(scores: Scores, plan: Plan | None = None, *, kind: str = "head") -> Figure:
    """Modules from least to most important with standard errors; removed ones hatched, a line at the cut."""
    order = scores.ranking(kind=kind)
    if not order:
        raise ValueError(f"scores: nothing of kind {kind!r} was scored")
    value = scores.value[order].numpy()
    error = np.nan_to_num(scores.error[order].numpy(), posinf=0.0)
    share = np.array(removed_shares(scores, plan))[order]

    figure = _figure(f"{len(order):,} {KINDS[kind]}, least to most important", 3)
    axes = figure.subplots()
    axes.use_sticky_edges = False
    axes.set_rasterization_zorder(2 if len(order) > 500 else None)  # a picture is smaller than so many steps
    edges = np.arange(len(order) + 1) - 0.5
    kept = value * (1 - share)
    axes.stairs(kept, edges, fill=True, color=_KEPT)
    axes.stairs(value, edges, baseline=kept, fill=True, **_GONE)
    axes.stairs(value + error, edges, baseline=value - error, fill=True, color=_INK, alpha=0.35)
    axes.axhline(0, color=_INK, linewidth=0.8)
    cut = int((share > 0).sum())
    if 0 < cut < len(order) and share[:cut].all():
        axes.axvline(cut - 0.5, color=_INK, linewidth=1, linestyle="--")
        axes.annotate(" cut", (cut - 0.5, 1), xycoords=("data", "axes fraction"), va="top")
    axes.set_yscale("function", functions=(_root, _square))
    axes.set(xlim=(edges[0], edges[-1]), ylabel="importance")
    axes.grid(axis="y")
    names = [str(scores.modules[i]) for i in order] if len(order) <= 64 else []
    axes.set_xticks(range(len(names)), names, rotation=90)
    return figure


@_style()
def cut(plan: Plan) -> Figure:
    """Units kept in every block, a row of panels a tower; removed ones are hatched."""
    kinds = [kind for kind in UNITS if any(block.get(kind) for blocks in plan.shape.values() for block in blocks)]
    figure = _figure("Units kept in every block", 1.7 * len(plan.shape) + 0.4)
    panels = figure.subplots(len(plan.shape), len(kinds), squeeze=False)
    for row, (tower, blocks) in zip(panels, plan.shape.items(), strict=True):
        for axes, kind in zip(row, kinds, strict=True):
            total = np.array([block.get(kind, 0) for block in blocks])
            layers = range(len(total))
            kept = total - [len(plan.removed(tower, kind, layer)) for layer in layers]
            kept[plan.layers.get(tower, [])] = 0
            axes.set_visible(total.any())
            axes.bar(layers, kept, color=_KEPT)
            gone = axes.bar(layers, total - kept, bottom=kept, **_GONE)
            axes.set(title=f"{tower}: {kept.sum():,} of {total.sum():,} {UNITS[kind]} kept", xlabel="layer")
            axes.locator_params(integer=True)
            if len(kinds) * len(total) * len(str(total.max())) <= 100:
                axes.bar_label(gone, [str(n) for n in kept], fontsize=7)
                axes.set_ylim(0, 1.15 * max(total.max(), 1))
    return figure
