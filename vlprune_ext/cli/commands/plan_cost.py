"""``vlprune plan-cost``: what scoring will cost."""

from __future__ import annotations

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
    read_data,
    read_model,
)
from ..terminal import quiet, show, show_json, table, working


def plan_cost(
    model: Model,
    data: DataSource = "digits",
    split: Split = "calibration",
    limit: Limit = 300,
    objective: Objective = None,
    modules: Modules = "head,neurons",
    towers: Towers = None,
    neurons_per_group: Group = 64,
    steps: Annotated[int, typer.Option(min=1, help="Rounds of scoring.")] = 1,
    seed: Seed = 0,
    batch_size: Batch = 32,
    device: Device = "auto",
    dtype: Dtype = "float32",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Estimate what a scoring job costs before it starts: block runs, FLOPs, memory, time."""
    quiet()
    from ...report.words import duration, si
    from ...workflow.cost import plan_cost as cost_of_plan

    loaded = read_model(model, device, dtype)
    calibration = read_data(loaded, data, split, limit, seed, objective)
    with working("timing one batch"):
        cost = cost_of_plan(
            loaded.model,
            calibration,
            modules=modules,
            towers=towers,
            objective=objective,
            neurons_per_group=neurons_per_group,
            steps=steps,
            batch_size=batch_size,
        )
    if json:
        show_json(cost)
        return
    shown = table("tower", "modules", "block runs", "naively", "saved", "FLOPs", "held", "time")
    for name, row in [*cost["towers"].items(), ("all", cost)]:
        counts = [f"{row[key]:,}" for key in ("modules", "block_runs", "naive_block_runs")]
        saved = f"{row['naive_block_runs'] / row['block_runs']:.1f}x"
        sizes = [si(row["flops"]), si(row["stream_bytes"], "B"), duration(row["seconds"])]
        shown.add_row(name, *counts, saved, *sizes, style="bold" if name == "all" else "")
    rounds = f"{steps} round{'s' if steps > 1 else ''}"
    show("", shown, "", f"For {calibration.n_images} images and {rounds}; time from one batch.")
