"""Charts of token pruning: quality against tokens, and the squares of a picture that stay."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .quality import trade_off
from .style import new_figure, styled

if TYPE_CHECKING:  # matplotlib loads when something is drawn
    from matplotlib.figure import Figure


@styled()
def quality_against_tokens(
    series: Mapping[str, Sequence[tuple[float, float]]], dense: float, quality: str = "quality"
) -> Figure:
    """Quality by the share of the visual tokens that a block sees, mean over blocks: (share, quality) of each method.

    The dense model is a dashed line.
    """
    figure = new_figure(f"{quality} against visual tokens", 3.2)
    axes = figure.subplots()
    trade_off(figure, axes, ("all tokens", dense), {name: (points, name) for name, points in series.items()})
    axes.set(xlabel="share of the visual tokens that a block sees, mean over blocks", ylabel=quality)
    return figure


@styled()
def kept_squares(picture: np.ndarray, kept: Mapping[str, np.ndarray], answers: Mapping[str, str]) -> Figure:
    """Draw a picture [H, W, 3] in 0..1, and over copies of it the squares [height, width] that each method keeps."""
    height, width = picture.shape[:2]
    panels = {"as it is": np.ones((1, 1), dtype=bool), **kept}
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure("", rows * (2.1 * height / width + 0.7))
    every = figure.subplots(rows, columns, squeeze=False)
    for axes in every.flat:
        axes.set_axis_off()
    for axes, (name, squares) in zip(every.flat, panels.items(), strict=False):
        extent = (0, width, height, 0)
        axes.imshow(picture, extent=extent, interpolation="nearest")
        shade = np.zeros((*squares.shape, 4))
        shade[~squares] = (1, 1, 1, 0.86)
        axes.imshow(shade, extent=extent, interpolation="nearest")
        for line in range(1, squares.shape[0]):
            axes.axhline(line * height / squares.shape[0], color="white", linewidth=0.4)
        for line in range(1, squares.shape[1]):
            axes.axvline(line * width / squares.shape[1], color="white", linewidth=0.4)
        answer = "\n" + textwrap.shorten(answers[name], 30, placeholder=" ...") if name in answers else ""
        axes.set_title(f"{name}{answer}")
    return figure
