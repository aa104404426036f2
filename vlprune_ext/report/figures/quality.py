"""Charts of quality against what was removed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .style import COLOURS, INK, MARKERS, new_figure, per_cent, styled

if TYPE_CHECKING:  # matplotlib loads when something is drawn
    from matplotlib.figure import Figure


@styled()
def quality_against_savings(
    rows: Sequence[tuple[str, float, float]],
    quality: str = "quality",
    across: str = "share of parameters that are zero or removed",
) -> Figure:
    """Draw quality by what was saved, a line for each method.

    Names that differ only in a sparsity at their end ("Wanda 0.5") are one line; the dense model is a dashed one.

    Parameters
    ----------
    rows : sequence of (str, float, float)
        Name, share that was saved, and quality of each model; the dense one first.
    quality, across : str
        What the axes are called.
    """
    (dense, _, level), *others = rows
    series: dict[str, list[tuple[str, float, float]]] = {}
    for row in others:
        common = re.sub(r"[\s,(]+(0?\.\d+|\d+\s?%)\)?$", "", row[0])
        series.setdefault(common, []).append(row)

    figure = new_figure(f"{quality} against savings", 3.2)
    axes = figure.subplots()
    trade_off(
        figure,
        axes,
        (dense, level),
        {name: ([(share, value) for _, share, value in members], members[0][0]) for name, members in series.items()},
    )
    axes.set(xlabel=across, ylabel=quality)
    return figure


def trade_off(
    figure: Figure,
    axes: Any,
    dense: tuple[str, float],
    series: Mapping[str, tuple[Sequence[tuple[float, float]], str]],
) -> None:
    """Draw a line for each method and a dashed one for the dense model (its name, its level), over a share.

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
