"""Charts of plans: units kept in every block, the sparsity of every matrix."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ...plan import Plan
from .scores import endings, place
from .style import BAR, KEPT, REMOVED, UNITS, new_figure, per_cent, styled, write_cells

if TYPE_CHECKING:  # matplotlib loads when something is drawn
    from matplotlib.figure import Figure


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
            axes.bar(layers, kept, color=KEPT)
            gone = axes.bar(layers, total - kept, bottom=kept, **REMOVED)
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
        tables[prefix] = list(endings(paths).values()), shares
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
            write_cells(image, {cell: f"{100 * share:.0f}" for cell, share in np.ndenumerate(shares) if share >= 0})
        axes.set(title=prefix, xlabel="layer")
        axes.locator_params(axis="x", integer=True)
        axes.set_yticks(range(len(labels)), labels)
    figure.colorbar(image, ax=panels, label="share that is zero", format=per_cent, **BAR)
    return figure
