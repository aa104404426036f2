"""``vlprune score``: what each module is worth."""

from __future__ import annotations

import json as json_
import math
from pathlib import Path
from typing import Annotated

import typer

from ..arguments import (
    Batch,
    DataSource,
    Debug,
    Device,
    Dtype,
    Group,
    Json,
    Limit,
    Model,
    Modules,
    Objective,
    Seed,
    Split,
    Towers,
    new_file,
    read_data,
    read_model,
)
from ..terminal import quiet, show, show_json, table, working


def score(
    model: Model,
    data: DataSource = "digits",
    split: Split = "calibration",
    limit: Limit = 300,
    objective: Objective = None,
    modules: Modules = "head,neurons",
    towers: Towers = None,
    neurons_per_group: Group = 64,
    rewire: Annotated[bool, typer.Option("--rewire", help="Sort neurons by importance before grouping them.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(callback=new_file, help="Write the scores: .json or .csv.", show_default=False),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Modules to print from each end.")] = 8,
    seed: Seed = 0,
    batch_size: Batch = 32,
    device: Device = "auto",
    dtype: Dtype = "float32",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Score modules by ablation: how much the objective drops without each, with standard errors."""
    quiet()
    from ...report.figures.style import number
    from ...report.tables import extremes, indistinguishable
    from ...units.ablation import score as score_units

    loaded = read_model(model, device, dtype)
    calibration = read_data(loaded, data, split, limit, seed, objective)
    with working("scoring") as progress:
        scores = score_units(
            loaded.model,
            calibration,
            modules=modules,
            towers=towers,
            objective=objective,
            neurons_per_group=neurons_per_group,
            rewire=rewire,
            batch_size=batch_size,
            progress=progress,
        )
    if out is not None:
        scores.save(out)
    if json:
        show_json(json_.loads(scores.to_json()))
        return
    for title, rows in extremes(scores, None, top):
        shown = table("module", "importance", "± s.e.", "parameters", title=title)
        for row in rows:
            shown.add_row(row["module"], row["value"], row["error"], row["cost"])
        show("", shown)
    dense = f"; {scores.objective} is {number(scores.dense)} with all of them" if math.isfinite(scores.dense) else ""
    show("", f"{len(scores)} modules, {calibration.n_images} images{dense}.", indistinguishable(scores))
    if out is not None:
        show(f"scores  {out}")
