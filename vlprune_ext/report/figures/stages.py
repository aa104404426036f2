"""Charts of CoMP's stages: what each saved and cost, why its mode was chosen, and the tokens that are left.

A mode has the same colour and marker in every chart; a ring says that it was explored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from ...comp.modes import MODES
from .style import COLOURS, INK, MARKERS, new_figure, number, per_cent, styled

if TYPE_CHECKING:  # matplotlib loads when something is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_RING: dict[str, Any] = {"marker": "o", "facecolor": "none", "edgecolor": INK, "linewidth": 1, "zorder": 5}
_LINE = "#a9b2bc"  # between the marks
_WIDE = 5.0  # so many times the typical cost, and the scale of costs is logarithmic beyond that


@styled()
def progress(history: Sequence[Mapping[str, Any]], accuracy: str = "accuracy") -> Figure:
    """Draw FLOPs and accuracy, one above the other, before the first stage and after each; marked by its mode."""
    figure = new_figure("What every stage saved, and what it cost", 4)
    upper, lower = figure.subplots(2, sharex=True)
    looks = _looks(history)
    for axes, key, label in ((upper, "flops", "FLOPs left"), (lower, "accuracy", accuracy)):
        values = [history[0][key][0], *(entry[key][1] for entry in history)]
        axes.plot(range(len(values)), values, color=_LINE, linewidth=1, zorder=1)
        axes.axhline(values[0], color=INK, linewidth=0.8, linestyle="--", zorder=0)
        _mark(axes, history, looks, values[1:], _size(history))
        axes.set_ylabel(label)
        axes.grid(axis="y")
    upper.yaxis.set_major_formatter(per_cent)
    _count_stages(lower, len(history))
    _legend(figure, looks, {entry["mode"] for entry in history}, _explored(history))
    return figure


@styled()
def costs(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the cost R of every mode when each stage was chosen; a filled mark on the one that was."""
    figure = new_figure("Cost R of every mode as each stage began", 3.4)
    axes = figure.subplots()
    looks, stages = _looks(history), np.arange(1, len(history) + 1)
    every = {mode: np.array([entry["costs"].get(mode, np.nan) for entry in history]) for mode in looks}
    for mode, values in every.items():
        colour, marker = looks[mode]
        axes.plot(stages, values, color=colour, linewidth=1, marker=marker, markersize=3, alpha=0.45)
    _mark(axes, history, looks, [entry["costs"][entry["mode"]] for entry in history], _size(history))
    axes.axhline(0, color=INK, linewidth=0.8, zorder=0)
    size = np.abs(np.concatenate(list(every.values())))
    size = size[np.isfinite(size) & (size > 0)]
    label = "cost R"
    if len(size) and size.max() > _WIDE * np.median(size):
        bound = 3 * float(np.median(size))
        axes.set_yscale("symlog", linthresh=bound)
        axes.margins(y=0.1)  # of the logarithm: the default is next to nothing
        label += f", logarithmic beyond {number(bound)}"
    axes.yaxis.set_major_formatter(lambda value, _: number(value))
    axes.set_ylabel(label)
    axes.grid(axis="y")
    _count_stages(axes, len(history))
    _legend(figure, looks, looks, _explored(history))
    return figure


@styled()
def tokens_left(shares: Mapping[str, Sequence[float]]) -> Figure:
    """Draw the share of the tokens that enters each block: tower -> shares, a line a tower."""
    figure = new_figure("Tokens that enter each block", 2.6)
    axes = figure.subplots()
    for (tower, values), colour, marker in zip(shares.items(), cycle(COLOURS), cycle(MARKERS), strict=False):
        axes.plot(range(len(values)), values, color=colour, marker=marker, markersize=5, label=tower, clip_on=False)
    axes.set(xlabel="block", ylabel="share of the dense model's", ylim=(0, 1.02))
    axes.locator_params(axis="x", integer=True)
    axes.yaxis.set_major_formatter(per_cent)
    axes.grid(axis="y")
    figure.legend(loc="outside right upper", frameon=False)
    return figure


# --- the parts of it -------------------------------------------------------------------------------------------------


def _looks(history: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """Mode -> its colour and marker, the same in every report; in the order of `MODES`."""
    known = {mode: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, mode in enumerate(MODES)}
    found = set(chain.from_iterable([entry["mode"], *entry["costs"]] for entry in history))
    return {mode: known.get(mode, (INK, "+")) for mode in [*known, *sorted(found - set(known))] if mode in found}


def _explored(history: Iterable[Mapping[str, Any]]) -> bool:
    return any(entry["explored"] for entry in history)


def _size(history: Sequence[Any]) -> float:
    """Area of a mark, in square points: smaller where there are many."""
    return float(np.clip(1200 / len(history), 14, 40))


def _mark(
    axes: Axes,
    history: Sequence[Mapping[str, Any]],
    looks: Mapping[str, tuple[str, str]],
    values: Sequence[float],
    size: float,
) -> None:
    """Draw a mark for each stage, in the colour of its mode; a ring around those that were explored."""
    for mode, (colour, marker) in looks.items():
        own = [place for place, entry in enumerate(history) if entry["mode"] == mode]
        look: dict[str, Any] = {"s": size, "color": colour, "marker": marker, "zorder": 3}
        axes.scatter([1 + place for place in own], [values[place] for place in own], **look)
    rings = [place for place, entry in enumerate(history) if entry["explored"]]
    axes.scatter([1 + place for place in rings], [values[place] for place in rings], 4 * size, **_RING)


def _count_stages(axes: Axes, stages: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("stage")
    axes.set_xlim(-0.4, stages + 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=20, integer=True))


def _legend(figure: Figure, looks: Mapping[str, tuple[str, str]], modes: Iterable[str], ring: bool) -> None:
    from matplotlib.lines import Line2D

    shown = set(modes)
    look: dict[str, Any] = {"linestyle": "", "markersize": 5}
    marks = [Line2D([], [], color=c, marker=m, label=mode, **look) for mode, (c, m) in looks.items() if mode in shown]
    empty: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": INK, **look, "markersize": 9}
    marks += [Line2D([], [], marker="o", label="explored", **empty)] * ring
    figure.legend(handles=marks, loc="outside right upper", frameon=False)
