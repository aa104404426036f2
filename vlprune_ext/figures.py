"""Charts of scores and plans, drawn by matplotlib, and the numbers written beside them.

One visual rule holds everywhere: what was removed is hatched; colour says how important a module is (blue: needed,
red: the model is better without it); grey says how much of a matrix is zero. Every chart is a
`matplotlib.figure.Figure`; `svg` makes text of it for a page.
"""

from __future__ import annotations

import io
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from .anatomy import MATRIX
from .plan import Module, Plan, Scores

if TYPE_CHECKING:  # matplotlib loads when something is drawn
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

UNITS = {"head": "heads", "cross_head": "cross-attention heads", "neurons": "neurons"}  # what a plan counts
KINDS = {**UNITS, "neurons": "neuron groups", "layer": "layers", MATRIX: "matrices"}  # what is scored
NOTHING = "\N{EN DASH}"  # stands where there is no number

INK, _KEPT = "#1d2329", "#2a6fb0"
_GONE: dict[str, Any] = {"facecolor": "#dfe3e8", "edgecolor": "#77828e", "linewidth": 0, "hatch": "////"}
_BAR: dict[str, Any] = {"location": "bottom", "shrink": 0.5, "aspect": 50, "pad": 0.02}  # of colours
MARKERS = "osD^vP*X<>"
COLOURS = (_KEPT, "#d55e00", "#009e73", "#b0569b", "#c98a00", "#3fa7dd", "#6b4c9a", "#7a5230", "#5d6875", INK)
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
def styled() -> Iterator[None]:
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


def place(parameter: str) -> tuple[str, int, str]:
    """Where a matrix stands: "encoder.layers.3.mlp.fc1.weight" -> ("encoder.layers", 3, "mlp.fc1")."""
    match = re.fullmatch(r"(.+?)\.(\d+)\.(.+)\.weight", parameter)
    if match is None:
        raise ValueError(f"{parameter}: not the name of a weight in a numbered block")
    return match[1], int(match[2]), match[3]


def _endings(paths: Iterable[str]) -> dict[str, str]:
    """As much of the end of each path as tells it from the others: "self_attn.q_proj" -> "q_proj"."""
    parts = {path: path.split(".") for path in paths}

    def ending(own: list[str]) -> list[str]:
        ends = (own[-n:] for n in range(1, len(own)))
        return next((end for end in ends if sum(p[-len(end) :] == end for p in parts.values()) == 1), own)

    return {path: ".".join(ending(own)) for path, own in parts.items()}


def names(scores: Scores) -> list[str]:
    """What the modules are called: "vision.3.head1", "text.0.q_proj"."""
    paths = [place(parameter)[2] for parameter in scores.parameters]
    if not paths:
        return list(map(str, scores.modules))
    endings = _endings(paths)
    return [f"{m.tower}.{m.layer}.{endings[path]}" for m, path in zip(scores.modules, paths, strict=True)]


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


def _root(x):
    return np.sign(x) * np.sqrt(np.abs(x))


def _square(x):
    return x * np.abs(x)


def per_cent(share: float, _: Any = None) -> str:
    return f"{100 * share:g}%"


def new_figure(title: str, height: float) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure((8.5, height), layout="constrained")
    figure.suptitle(title)
    return figure


def _write(image: AxesImage, texts: Mapping[tuple[int, int], str]) -> None:
    """Write into cells (row, column), in ink that stands out."""
    light = image.to_rgba(np.asarray(image.get_array()))[..., :3] @ (0.3, 0.59, 0.11) > 0.5
    for cell, text in texts.items():
        style: dict[str, Any] = {"fontsize": 7, "linespacing": 1, "color": INK if light[cell] else "white"}
        image.axes.text(*cell[::-1], text, ha="center", va="center", **style)


def svg(figure: Figure) -> str:
    """A chart as an <svg> element: the same text on every run, no background, ids that no other chart has."""
    text = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with styled():
        figure.savefig(text, format="svg", transparent=True, metadata=no_metadata)
    element = text.getvalue()[text.getvalue().index("<svg") :]
    own = f"c{zlib.crc32(element.encode()):08x}-"
    element = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{own}", element)
    return element.replace("<svg", f'<svg role="img" aria-label="{escape(figure.get_suptitle())}"', 1)


@styled()
def heat_map(scores: Scores, plan: Plan | None = None, *, kind: str = "head") -> Figure:
    """Importance by layer (down) and head, group or matrix (across), a panel a tower; what ``plan`` removes is hatched.

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
            axes.stairs(top + of_layer, edges, baseline=top, fill=True, **{**_GONE, "facecolor": "none"})
        image = axes.imshow(value, cmap="RdBu", norm=norm, aspect="auto", interpolation="none")
        if written:
            texts = {}
            for cell in zip(y, x, strict=True):
                texts[cell] = short(value[cell]) + (f"\n±{short(error[cell])}" if 0 < error[cell] < math.inf else "")
            _write(image, texts)
        else:
            axes.plot(*np.nonzero(np.abs(value) <= 1.96 * error)[::-1], ".", color=INK, markersize=1.5)
        axes.set(title=tower + (f", in units of {unit:g}" if written and kind != MATRIX else ""), ylabel="layer")
        axes.locator_params(integer=True)
        pairs = sorted({(scores.modules[i].index, place(scores.parameters[i])[2]) for i in where if kind == MATRIX})
        if len(dict(pairs)) == len(pairs) > 0:  # the same in all blocks
            ends = _endings(path for _, path in pairs)
            tilt: dict[str, Any] = {"rotation": 20, "ha": "right"} if len("".join(ends.values())) > 90 else {}
            axes.set_xticks(list(dict(pairs)), [ends[path] for _, path in pairs], **tilt)
        else:
            axes.set_xlabel("matrix" if kind == MATRIX else KINDS[kind][:-1])
    bar = figure.colorbar(image, ax=panels, label="importance", **_BAR)
    ticks = largest * _square(np.linspace(-1, 1, 9))
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
    axes.stairs(kept, edges, fill=True, color=_KEPT)
    axes.stairs(value, edges, baseline=kept, fill=True, **_GONE)
    axes.stairs(value + error, edges, baseline=value - error, fill=True, color=INK, alpha=0.35)
    axes.axhline(0, color=INK, linewidth=0.8)
    cut = int((share > 0).sum())
    if 0 < cut < len(order) and share[:cut].all():
        axes.axvline(cut - 0.5, color=INK, linewidth=1, linestyle="--")
        axes.annotate(" cut", (cut - 0.5, 1), xycoords=("data", "axes fraction"), va="top")
    axes.set_yscale("function", functions=(_root, _square))
    if (value - error).min() >= 0:
        axes.set_ylim(bottom=0)
    axes.set(xlim=(edges[0], edges[-1]), ylabel="importance")
    axes.grid(axis="y")
    called = names(scores)
    labels = [called[i] for i in order] if len(order) <= 64 else []
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
    return figure


@styled()
def cut(plan: Plan) -> Figure:
    """Units kept in every block, a row of panels a tower; removed ones are hatched."""
    kinds = [kind for kind in UNITS if any(block.get(kind) for blocks in plan.shape.values() for block in blocks)]
    figure = new_figure("Units kept in every block", 1.7 * len(plan.shape) + 0.4)
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


@styled()
def sparsity(plan: Plan) -> Figure:
    """How much of every matrix is zero, by layer (across) and matrix (down), a panel a tower.

    A tower whose blocks each have one share for all their matrices is one row.
    """
    from matplotlib.colors import LinearSegmentedColormap

    towers: dict[str, dict[str, dict[int, float]]] = {}
    for parameter, share in plan.sparsity.items():
        prefix, layer, path = place(parameter)
        towers.setdefault(prefix, {}).setdefault(path, {})[layer] = share
    if not towers:
        raise ValueError("plan: no matrix has a sparsity")
    tables: dict[str, tuple[list[str], np.ndarray]] = {}
    for prefix, paths in towers.items():
        shares = np.full((len(paths), 1 + max(map(max, paths.values()))), np.nan)
        for row, of_path in zip(shares, paths.values(), strict=True):
            row[list(of_path)] = list(of_path.values())
        tables[prefix] = list(_endings(paths).values()), shares
        of_block = np.fmax.reduce(shares)
        if len(paths) > 1 and not (np.fmin.reduce(shares) < of_block).any():
            tables[prefix] = ["all matrices"], of_block[None]
    heights = [0.19 * len(labels) + 0.6 for labels, _ in tables.values()]
    most = max(1, math.ceil(10 * max(plan.sparsity.values()) - 1e-6)) / 10
    least = min(math.floor(10 * min(plan.sparsity.values()) + 1e-6) / 10, most - 0.1)
    greys = LinearSegmentedColormap.from_list("zeros", ["#f3f5f7", "#7f8a96"])

    figure = new_figure("Share of every matrix that is zero", sum(heights) + 0.8)
    panels = figure.subplots(len(tables), height_ratios=heights, squeeze=False)
    for axes, (prefix, (labels, shares)) in zip(panels.flat, tables.items(), strict=True):
        image = axes.imshow(shares, cmap=greys, vmin=least, vmax=most, aspect="auto", interpolation="none")
        if shares.shape[1] <= 40:
            _write(image, {cell: f"{100 * share:.0f}" for cell, share in np.ndenumerate(shares) if share >= 0})
        axes.set(title=prefix, xlabel="layer")
        axes.locator_params(axis="x", integer=True)
        axes.set_yticks(range(len(labels)), labels)
    figure.colorbar(image, ax=panels, label="share that is zero", format=per_cent, **_BAR)
    return figure


@styled()
def quality_against_sparsity(rows: Sequence[tuple[str, float, float]], quality: str = "quality") -> Figure:
    """Quality by the share of parameters that are zero or gone: (name, share, quality) of each model, dense first.

    The dense model is a dashed line. Names that differ only in a sparsity at their end ("Wanda 0.5") are one line.
    """
    (dense, _, level), *others = rows
    series: dict[str, list[tuple[str, float, float]]] = {}
    for row in others:
        common = re.sub(r"[\s,(]+(0?\.\d+|\d+\s?%)\)?$", "", row[0])
        series.setdefault(common, []).append(row)

    figure = new_figure(f"{quality} against sparsity", 3.2)
    axes = figure.subplots()
    trade_off(
        figure,
        axes,
        (dense, level),
        {name: ([(share, value) for _, share, value in members], members[0][0]) for name, members in series.items()},
    )
    axes.set(xlabel="share of parameters that are zero or gone", ylabel=quality)
    return figure


def trade_off(
    figure: Figure,
    axes: Any,
    dense: tuple[str, float],
    series: Mapping[str, tuple[Sequence[tuple[float, float]], str]],
) -> None:
    """A line for each method and a dashed one for the dense model (its name, its level); across: a share.

    series     name -> points (share, quality), and what the line is called where there is one point only
    """
    drawn = [axes.axhline(dense[1], color=INK, linewidth=1, linestyle="--", label=dense[0])]
    for n, (common, (points, alone)) in enumerate(series.items()):
        again, n = divmod(n, len(MARKERS))
        x, y = zip(*sorted(points), strict=True)
        look: dict[str, Any] = {"color": COLOURS[n], "marker": MARKERS[n], "fillstyle": "none" if again else "full"}
        look |= {"linestyle": "-", "label": common} if len(x) > 1 else {"linestyle": "", "label": alone}
        drawn += axes.plot(x, y, zorder=3 - n / 100, **look)  # the first above the others
    axes.xaxis.set_major_formatter(per_cent)
    axes.grid()
    drawn.sort(key=lambda line: float(np.asarray(line.get_ydata())[-1]), reverse=True)  # as they end, downwards
    figure.legend(handles=drawn, loc="outside right upper", frameon=False)
