"""Drawings of scores and plans as SVG: no dependency, no script, readable in light and dark and without colour.

One visual rule holds everywhere: what was removed is hatched; colour says how important a module is (blue: needed,
orange: the model is better without it).
"""

from __future__ import annotations

import math
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from .plan import Module, Plan, Scores, write_text

NOTHING = "\N{EN DASH}"  # stands where there is no number
LEVELS = 12  # colour steps on each side of zero
_DETAILED = 1500  # up to this many cells each is an element of its own, with a tooltip
_BARS = 420  # a ranking of more modules draws neighbours as one bar

STYLE = (
    """
.vl{--paper:#fff;--ink:#1d2329;--muted:#5d6875;--line:#d5dbe1;--pos:#0a4f8f;--neg:#b8480a;--zero:#edf0f3;
--kept:#2a6fb0;--cut:#8d97a2;--onpos:#fff}
@media (prefers-color-scheme:dark){.vl{--paper:#14181d;--ink:#e6e9ed;--muted:#98a3af;--line:#343c46;--pos:#8cc7ff;
--neg:#ffa15c;--zero:#252b33;--kept:#69aee8;--cut:#77828e;--onpos:#0d1216}}
.vl svg{display:block;font:11px system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif;
font-variant-numeric:tabular-nums}
.vl text{fill:var(--muted)}.vl .ink{fill:var(--ink)}.vl .small{font-size:9px}.vl .name{fill:var(--ink);font-weight:600}
.vl .grid{stroke:var(--line);stroke-width:1;fill:none}.vl .axis{stroke:var(--muted);stroke-width:1;fill:none}
.vl .kept{fill:var(--kept)}.vl .frame{fill:none;stroke:var(--cut);stroke-width:1}
.vl .error{stroke:var(--ink);stroke-width:1;opacity:.75;fill:none}.vl .cutline{stroke:var(--ink);stroke-dasharray:4 3}
.vl .thin{stroke-width:.6}
.vl .hatch line{stroke:var(--ink);stroke-width:1.1;opacity:.6}
.vl .z{fill:var(--zero)}.vl .on{fill:var(--onpos)}.vl .off{fill:var(--ink)}
.vl .halo{fill:var(--ink);paint-order:stroke;stroke:var(--paper);stroke-width:3px;stroke-opacity:.72}
.vl .dot{fill:var(--ink);opacity:.55}
"""
    + "".join(
        f".vl .{name}{i}{{fill:color-mix(in oklab,var(--{hue}) {round(100 * i / LEVELS)}%,var(--zero))}}"
        for name, hue in (("p", "pos"), ("n", "neg"))
        for i in range(1, LEVELS + 1)
    )
    + "\n"
)


@dataclass(frozen=True)
class Figure:
    """An SVG drawing; shows itself in a notebook."""

    svg: str
    caption: str = ""

    def _repr_html_(self) -> str:
        return f'<div class="vl"><style>{STYLE}</style>{self.svg}</div>'

    def save(self, path: str | os.PathLike) -> None:
        """Write a stand-alone .svg file."""
        head, rest = self.svg.split(">", 1)
        write_text(path, f'{head} xmlns="http://www.w3.org/2000/svg" class="vl"><style>{_own(STYLE)}</style>{rest}')


def _own(style: str) -> str:
    # In a file of its own the class sits on the root element itself.
    return style.replace(".vl svg{", "svg{")


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


# ---- what the drawings are about ------------------------------------------------------------------------------------


def removed_shares(scores: Scores, plan: Plan | None) -> list[float]:
    """How much of every scored module a plan removes: 1 all of it, 0 nothing; parts of neuron groups in between."""
    if plan is None:
        return [0.0] * len(scores)
    groups = Counter(m[:3] for m in scores.modules)
    gone = {key: set(plan.removed(*key)) for key in {m[:3] for m in scores.modules if m.kind != "layer"}}

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


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _exponent(largest: float) -> int:
    """The power of ten in which ``largest`` has three digits before the point."""
    return math.floor(math.log10(largest)) - 2 if largest > 0 else 0


def _level(value: float, largest: float) -> int:
    """Colour step of a value, -LEVELS..LEVELS, on a square-root scale."""
    if not largest or math.isnan(value):
        return 0
    step = round(LEVELS * math.sqrt(min(1.0, abs(value) / largest)))
    return step if value >= 0 else -step


def _class(level: int) -> str:
    return "z" if level == 0 else f"p{level}" if level > 0 else f"n{-level}"


def _svg(width: float, height: float, label: str, parts: Iterable[str]) -> str:
    own = f"hatch-{zlib.crc32(label.encode()):08x}"  # ids are shared by all drawings of a page
    hatch = (
        f'<defs><pattern id="{own}" class="hatch" width="5" height="5" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><line x1="0" y1="0" x2="0" y2="5"/></pattern></defs>'
    )
    body = "".join(parts).replace("url(#hatch)", f"url(#{own})")
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" role="img" '
        f'aria-label="{escape(label)}">{hatch}{body}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str = "start", cls: str = "") -> str:
    style = f' class="{cls}"' if cls else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(text)}</text>'


def _rect(x: float, y: float, w: float, h: float, cls: str, title: str = "", fill: str = "") -> str:
    inner = f"<title>{escape(title)}</title>" if title else ""
    paint = f' fill="{fill}"' if fill else ""
    kind = f' class="{cls}"' if cls else ""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(w, 0):.1f}" height="{max(h, 0):.1f}"{kind}{paint}>{inner}</rect>'


def _every(count: int, room: float, each: float = 22) -> int:
    """Label every how-manieth of ``count`` items that share ``room`` pixels."""
    step = max(1, math.ceil(count * each / max(room, 1)))
    return next((s for s in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 200, 256) if s >= step), step)


def describe(module: Module, value: float, error: float, removed: float) -> str:
    """One line about a module, for tooltips and tables."""
    fate = "" if removed == 0 else ", removed" if removed == 1 else f", {removed:.0%} removed"
    return f"{module}: {number(value)} ± {number(error)}{fate}"


# ---- heat map -------------------------------------------------------------------------------------------------------


def heat_map(scores: Scores, plan: Plan | None = None, *, tower: str, kind: str = "head", width: float = 880) -> Figure:
    """Importance by layer (down) and head or group (across); what ``plan`` removes is hatched.

    Cells with room show value and standard error; a dot marks cells within 1.96 standard errors of zero.
    """
    rows = scores.where(tower, kind)
    if not rows:
        raise ValueError(f"scores: nothing of kind {kind!r} was scored in tower {tower!r}")
    modules = [scores.modules[i] for i in rows]
    layers = sorted({m.layer for m in modules})
    columns = max(m.index for m in modules) + 1
    largest = _largest(scores, kind)

    left, top = 34.0, 32.0
    cell_w = min(58.0, (width - left) / columns)
    cell_h = min(30.0, max(9.0, 620.0 / len(layers))) if cell_w >= 14 else 14.0 if len(layers) <= 24 else 9.0
    gap = 2.0 if cell_w >= 14 else 0.0
    detailed = len(modules) <= _DETAILED
    written = cell_w >= 40 and cell_h >= 26
    dotted = not written and cell_w >= 9

    what = {"head": "heads", "cross_head": "cross-attention heads", "neurons": "neuron groups"}[kind]
    exponent = _exponent(max(abs(float(scores.value[i])) for i in scores.where(kind=kind)))
    unit = f", in 10{str(exponent).translate(_SUPERSCRIPT)}" if written and exponent else ""
    parts = [_text(left, 11, f"{tower} · {what}{unit}", cls="name")]
    parts += [
        _text(left + (c + 0.5) * cell_w, top - 5, str(c), "middle", "small")
        for c in range(0, columns, _every(columns, columns * cell_w, 7 * len(str(columns)) + 4))
    ]
    step = _every(len(layers), len(layers) * cell_h, 11)
    row_of = {layer: n for n, layer in enumerate(layers)}
    parts += [
        _text(left - 6, top + (n + 0.5) * cell_h + 3.5, str(layer), "end", "small")
        for layer, n in row_of.items()
        if n % step == 0
    ]

    shares = removed_shares(scores, plan)
    cells: dict[str, list[str]] = {}
    marks, hatched = [], []
    for i, module in zip(rows, modules, strict=True):
        value, error = float(scores.value[i]), float(scores.error[i])
        gone = shares[i]
        x, y = left + module.index * cell_w, top + row_of[module.layer] * cell_h
        w, h = cell_w - gap, cell_h - min(gap, 2)
        level = _level(value, largest)
        if detailed:
            parts.append(_rect(x, y, w, h, _class(level), describe(module, value, error, gone)))
        else:
            cells.setdefault(_class(level), []).append(f"M{x:.1f} {y:.1f}h{w:.2f}v{h:.1f}h{-w:.2f}z")
        if gone:
            hatched.append((x, y, w, h, gone))
        if written:
            tone = "on" if abs(level) > LEVELS * 0.55 else "off"
            tone += " halo" if gone else ""
            marks.append(_text(x + w / 2, y + 12, minus(f"{round(value / 10**exponent)}"), "middle", tone))
            if math.isfinite(error) and error > 0:
                marks.append(_text(x + w / 2, y + 23, f"±{error / 10**exponent:.0f}", "middle", f"{tone} small"))
        elif dotted and not abs(value) > 1.96 * error:
            marks.append(f'<circle cx="{x + w / 2:.1f}" cy="{y + h / 2:.1f}" r="1.6" class="dot"/>')
    parts += [f'<path class="{cls}" d="{"".join(d)}"/>' for cls, d in cells.items()]
    for x, y, w, h, gone in hatched:
        parts.append(_rect(x, y, w, h * gone, "", fill="url(#hatch)"))
    parts += marks

    bottom = top + len(layers) * cell_h
    total = max(left + columns * cell_w, left + 300.0)
    parts.append(_legend(left, bottom + 10, scores, kind, largest, plan is not None, dots=dotted))
    parts.append(_text(left - 6, top - 5, "layer", "end", "small"))
    return Figure(_svg(total + 2, bottom + 42, f"importance of {what}, {tower} tower", parts))


def _largest(scores: Scores, kind: str) -> float:
    """The top of the colour scale: the 99th percentile over all towers; one outlier shall not bleach the rest."""
    values = sorted(abs(float(scores.value[i])) for i in scores.where(kind=kind))
    return values[min(len(values) - 1, int(0.99 * len(values)))] if values else 0.0


def _legend(x: float, y: float, scores: Scores, kind: str, largest: float, plan: bool, dots: bool) -> str:
    lowest = min(float(scores.value[i]) for i in scores.where(kind=kind))
    start = max(-LEVELS, min(0, _level(lowest, largest)))
    steps = list(range(start, LEVELS + 1))
    size = 9.0
    parts = [_rect(x + n * size, y, size + 0.3, 9, _class(level)) for n, level in enumerate(steps)]
    ticks = [(0, "0"), (LEVELS, number(largest)), (LEVELS // 2, number(largest / 4))]
    if start < -2:
        ticks.append((start, number(-largest * (start / LEVELS) ** 2)))
    for level, label in ticks:
        parts.append(_text(x + (level - start + 0.5) * size, y + 20, label, "middle", "small"))
    at = x + len(steps) * size + 14
    if plan:
        parts.append(_rect(at, y, 14, 9, "z") + _rect(at, y, 14, 9, "", fill="url(#hatch)"))
        parts.append(_text(at + 18, y + 8, "removed", cls="small"))
        at += 72
    if dots:
        parts.append(f'<circle cx="{at + 3:.1f}" cy="{y + 4.5:.1f}" r="1.6" class="dot"/>')
        parts.append(_text(at + 9, y + 8, "within 1.96 s.e. of zero", cls="small"))
    return "".join(parts)


# ---- ranking --------------------------------------------------------------------------------------------------------


def _ticks(low: float, high: float, pixels: float) -> list[float]:
    """Round numbers on a square-root axis, at least 24 pixels apart."""
    span = sum(math.sqrt(abs(v)) for v in (low, high))
    chosen = [0.0]
    for sign, end in ((1, high), (-1, low)):
        if end == 0:
            continue
        magnitude = math.floor(math.log10(abs(end)))
        last = math.inf
        for unit in (10.0**e for e in range(magnitude, magnitude - 5, -1)):
            for value in (5 * unit, 2 * unit, unit):
                room = 24 * span / pixels
                if value <= abs(end) and last - math.sqrt(value) >= room and math.sqrt(value) >= room:
                    chosen.append(sign * value)
                    last = math.sqrt(value)
    return sorted(chosen)


def ranking(
    scores: Scores, plan: Plan | None = None, *, kind: str = "head", tower: str | None = None, width: float = 880
) -> Figure:
    """Modules from least to most important with standard errors; removed ones hatched, a line at the cut."""
    order = scores.ranking(tower, kind)
    if not order:
        raise ValueError(f"scores: nothing of kind {kind!r} was scored" + (f" in tower {tower!r}" if tower else ""))
    of_module = removed_shares(scores, plan)
    shares = [of_module[i] for i in order]
    per_bar = math.ceil(len(order) / _BARS)
    bars = [_bar(scores, order[n : n + per_bar], shares[n : n + per_bar]) for n in range(0, len(order), per_bar)]

    left, top, height, foot = 52.0, 22.0, 190.0, 24.0
    low = min(0.0, min(bar.value - bar.error for bar in bars))
    high = max(0.0, max(bar.value + bar.error for bar in bars)) or (0.0 if low else 1.0)
    span = _root(high) - _root(low)

    def y(v: float) -> float:
        return top + height * (_root(high) - _root(v)) / span

    step = (width - left - 4) / len(bars)
    thick = step - (2 if step > 8 else 1 if step > 4 else 0)
    names = {"head": "heads", "cross_head": "cross-attention heads", "neurons": "neuron groups", "layer": "layers"}
    title = f"{len(order):,} {names[kind]}, least to most important" + (f" · {tower}" if tower else "")
    if per_bar > 1:
        title += f" (a bar is the mean of {per_bar} neighbours)"
    parts = [_text(left, 11, title, cls="name")]
    for tick in _ticks(low, high, height):
        cls = "axis" if tick == 0 else "grid"
        parts.append(f'<path class="{cls}" d="M{left:.1f} {y(tick):.1f}H{width:.1f}"/>')
        parts.append(_text(left - 6, y(tick) + 3.5, number(tick), "end", "small"))
    whiskers = []
    for n, bar in enumerate(bars):
        x = left + n * step
        upper, lower = min(y(bar.value), y(0)), max(y(bar.value), y(0))
        h = max(lower - upper, 0.8)
        parts.append(_rect(x, upper, thick, h, "z" if bar.removed else "kept", bar.title))
        if 0 < bar.removed < 1:
            parts.append(_rect(x, upper, thick, h * (1 - bar.removed), "kept"))
        if bar.removed:
            parts.append(_rect(x, upper + h * (1 - bar.removed), thick, h * bar.removed, "", fill="url(#hatch)"))
        if bar.error:
            whiskers.append(f"M{x + thick / 2:.1f} {y(bar.value + bar.error):.1f}V{y(bar.value - bar.error):.1f}")
    parts.append(f'<path class="{"error" if thick > 4 else "error thin"}" d="{"".join(whiskers)}"/>')
    removed = sum(share > 0 for share in shares)
    if 0 < removed < len(order) and all(share > 0 for share in shares[:removed]):
        x = left + removed / per_bar * step - (step - thick) / 2
        parts.append(f'<path class="cutline" d="M{x:.1f} {top:.1f}V{top + height:.1f}"/>')
        parts.append(_text(x + 5, top + 10, "cut", cls="ink small"))
    if step >= 11 and per_bar == 1:
        labels = [str(scores.modules[i]) for i in order]
        foot = 20.0 + 4.4 * max(map(len, labels))
        parts += [
            f'<text class="small" text-anchor="end" transform="translate({left + n * step + thick / 2 + 3:.1f} '
            f'{top + height + 9:.1f}) rotate(-60)">{escape(label)}</text>'
            for n, label in enumerate(labels)
        ]
    return Figure(_svg(width, top + height + foot, f"ranking of {names[kind]} {tower or ''}", parts))


@dataclass(frozen=True)
class _Bar:
    value: float
    error: float
    removed: float
    title: str


def _bar(scores: Scores, positions: list[int], shares: list[float]) -> _Bar:
    count = len(positions)
    values = [float(scores.value[i]) for i in positions]
    errors = [error if math.isfinite(error) else 0.0 for error in (float(scores.error[i]) for i in positions)]
    value, error, removed = sum(values) / count, sum(errors) / count, sum(shares) / count
    first = scores.modules[positions[0]]
    title = (
        describe(first, value, error, removed)
        if count == 1
        else f"{count} from {first} on: {number(value)} ± {number(error)}, {removed:.0%} removed"
    )
    return _Bar(value, error, removed, title)


def _root(value: float) -> float:
    return math.copysign(math.sqrt(abs(value)), value)


# ---- what was cut ---------------------------------------------------------------------------------------------------


def cut(plan: Plan, *, tower: str, kind: str = "head", width: float = 430) -> Figure:
    """Units kept and removed in every block of a tower; a removed block is hatched over its whole height."""
    counts = [block.get(kind, 0) for block in plan.shape[tower]]
    if not any(counts):
        raise ValueError(f"plan: tower {tower!r} has no units of kind {kind!r}")
    names = {"head": "heads", "cross_head": "cross-attention heads", "neurons": "neurons"}
    left, top, height = 38.0, 34.0, 104.0
    step = min(46.0, (width - left) / len(counts))
    bar = step - (4 if step > 14 else 1.5)
    tallest = max(counts)
    kept_total = 0
    parts = []
    for layer, total in enumerate(counts):
        whole = layer in plan.layers.get(tower, [])
        gone = total if whole else len(plan.removed(tower, kind, layer))
        kept_total += total - gone
        x = left + layer * step
        full, cut_h = height * total / tallest, height * gone / tallest
        title = f"{tower}.{layer}: {total - gone} of {total} {names[kind]} kept" + (" (layer removed)" if whole else "")
        parts.append(_rect(x, top + height - full + cut_h, bar, full - cut_h, "kept", title))
        if gone:
            parts.append(_rect(x, top + height - full, bar, cut_h, "z", title))
            parts.append(_rect(x, top + height - full, bar, cut_h, "", fill="url(#hatch)"))
            parts.append(_rect(x + 0.5, top + height - full + 0.5, bar - 1, full - 1, "frame"))
        if bar >= 6 * len(str(tallest)):
            parts.append(_text(x + bar / 2, top + height - full - 4, str(total - gone), "middle", "small ink"))
    every = _every(len(counts), len(counts) * step, 18)
    parts += [
        _text(left + layer * step + bar / 2, top + height + 13, str(layer), "middle", "small")
        for layer in range(0, len(counts), every)
    ]
    parts.append(_text(left - 6, top + height + 13, "layer", "end", "small"))
    parts.append(f'<path class="axis" d="M{left:.1f} {top + height + 0.5:.1f}H{left + len(counts) * step:.1f}"/>')
    title = f"{tower} · {kept_total:,} of {sum(counts):,} {names[kind]} kept"
    parts.insert(0, _text(left, 11, title, cls="name"))
    return Figure(_svg(max(left + len(counts) * step, left + 6.6 * len(title)), top + height + 20, title, parts))


def kinds_of(scores: Scores) -> list[str]:
    """The kinds that were scored, heads first."""
    present = {m.kind for m in scores.modules}
    return [kind for kind in ("head", "cross_head", "neurons", "layer") if kind in present]


def towers_of(scores: Scores, kind: str) -> Sequence[str]:
    """The towers in which a kind was scored, in the order of the scores."""
    return list(dict.fromkeys(m.tower for m in scores.modules if m.kind == kind))
