"""What all charts share: colours, numbers, and the SVG of a page."""

from __future__ import annotations

import io
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from ...anatomy import MATRIX

if TYPE_CHECKING:  # matplotlib loads when something is drawn
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage


UNITS = {"head": "heads", "cross_head": "cross-attention heads", "neurons": "neurons"}  # what a plan counts
KINDS = {**UNITS, "neurons": "neuron groups", "layer": "layers", MATRIX: "matrices"}  # what is scored
NOTHING = "\N{EN DASH}"  # stands where there is no number
INK, KEPT = "#1d2329", "#2a6fb0"
REMOVED: dict[str, Any] = {"facecolor": "#dfe3e8", "edgecolor": "#77828e", "linewidth": 0, "hatch": "////"}
BAR: dict[str, Any] = {"location": "bottom", "shrink": 0.5, "aspect": 50, "pad": 0.02}  # of colours
MARKERS = "osD^vP*X<>"
COLOURS = (KEPT, "#d55e00", "#009e73", "#b0569b", "#c98a00", "#3fa7dd", "#6b4c9a", "#7a5230", "#5d6875", INK)
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


def signed_root(x):
    return np.sign(x) * np.sqrt(np.abs(x))


def signed_square(x):
    return x * np.abs(x)


def per_cent(share: float, _: Any = None) -> str:
    return f"{100 * share:g}%"


def new_figure(title: str, height: float) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure((8.5, height), layout="constrained")
    figure.suptitle(title)
    return figure


def write_cells(image: AxesImage, texts: Mapping[tuple[int, int], str]) -> None:
    """Write into cells (row, column), in ink that stands out."""
    light = image.to_rgba(np.asarray(image.get_array()))[..., :3] @ (0.3, 0.59, 0.11) > 0.5
    for cell, text in texts.items():
        style: dict[str, Any] = {"fontsize": 7, "linespacing": 1, "color": INK if light[cell] else "white"}
        image.axes.text(*cell[::-1], text, ha="center", va="center", **style)


def svg(figure: Figure) -> str:
    """Return a chart as an <svg> element: deterministic, without background, with ids that no other chart has."""
    text = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with styled():
        figure.savefig(text, format="svg", transparent=True, metadata=no_metadata)
    element = text.getvalue()[text.getvalue().index("<svg") :]
    own = f"c{zlib.crc32(element.encode()):08x}-"
    element = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{own}", element)
    return element.replace("<svg", f'<svg role="img" aria-label="{escape(figure.get_suptitle())}"', 1)
