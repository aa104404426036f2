"""``vlprune prune``: score, decide, remove, measure."""

from __future__ import annotations

import json as json_
from pathlib import Path
from typing import Annotated

import typer

from ...methods import JOINT, METHODS, UNITS, WEIGHTS
from ..arguments import (
    FIELDS,
    Batch,
    DataSource,
    Debug,
    Device,
    Dtype,
    Json,
    Limit,
    Metric,
    Model,
    Objective,
    Seed,
    Sparsity,
    Split,
    Towers,
    chosen_methods,
    method_field,
    new_file,
    new_folder,
    one_of,
    read_data,
    read_model,
)
from ..terminal import UsageError, before_after, note, quiet, show, show_json, working


def prune(
    context: typer.Context,
    model: Model,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            metavar="METHOD",
            help=f"Removes units: {', '.join(UNITS)}; zeroes weights: {', '.join(WEIGHTS)}; parameters and tokens: "
            f"{', '.join(JOINT)}. Several: the first is kept, the others compared.",
            show_default="mope",
        ),
    ] = None,
    plans: Annotated[
        list[Path] | None,
        typer.Option(
            "--plan",
            metavar="FILE",
            help="Apply this plan instead of making one; repeatable, like --method.",
            show_default=False,
        ),
    ] = None,
    data: DataSource = "digits",
    split: Split = "calibration",
    limit: Limit = 300,
    test_data: Annotated[
        str | None,
        typer.Option(
            help="Data for the numbers before and after; --data where that has the split of --test-split.",
            show_default=False,
        ),
    ] = None,
    test_split: Annotated[str, typer.Option(help="Its split.")] = "test",
    test_limit: Annotated[int | None, typer.Option(min=1, help="Its number of images.", show_default=False)] = None,
    metric: Metric = None,
    objective: Objective = None,
    towers: Towers = None,
    keep_heads: Annotated[float | None, method_field("Share of heads kept.", "0.5")] = None,
    keep_neurons: Annotated[float | None, method_field("Share of neurons kept.", "0.5")] = None,
    keep_layers: Annotated[float | None, method_field("Share of layers kept.", "1.0")] = None,
    stage: Annotated[str | None, method_field("finetune or pretrain.", "finetune")] = None,
    scope: Annotated[str | None, method_field("layer, kind, tower or model: who competes.", "tower")] = None,
    steps: Annotated[int | None, method_field("Rounds of scoring and removing.", "method's")] = None,
    neurons_per_group: Annotated[int | None, method_field("Neurons that are removed together.", "64")] = None,
    sparsity: Sparsity = None,
    estimator: Annotated[
        str | None,
        method_field("ecoflap: zeroth-order, first-order, outliers, magnitude or uniform.", "zeroth-order"),
    ] = None,
    criterion: Annotated[str | None, method_field("ecoflap: wanda, magnitude, ria or sparsegpt.", "wanda")] = None,
    pattern: Annotated[str | None, method_field("ecoflap: unstructured, or n:m zeros.", "unstructured")] = None,
    flops: Annotated[float | None, method_field("comp: share of the FLOPs kept.", "0.3")] = None,
    interval: Annotated[int | None, method_field("comp: training steps of a stage.", "100")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Any other field of the method, for instance exact=false; repeatable.",
            rich_help_panel=FIELDS,
        ),
    ] = None,
    mode: Annotated[str, typer.Option(help="remove (narrower projections) or mask (zeroed weights).")] = "remove",
    round_to: Annotated[int, typer.Option(min=1, help="MLP widths stay multiples of this.")] = 8,
    train_steps: Annotated[
        int, typer.Option(min=1, help="comp: training steps, on the split 'train'; 'validation' decides.")
    ] = 2000,
    learning_rate: Annotated[float, typer.Option(help="comp: of the training.")] = 1e-4,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="comp: folder of checkpoints; a run that was cut goes on from the last.",
            show_default=False,
        ),
    ] = None,
    distill_steps: Annotated[
        int, typer.Option(min=0, help="Then train against the dense model for so many steps, on the split 'train'.")
    ] = 0,
    out: Annotated[
        Path | None, typer.Option(callback=new_folder, help="Folder for the pruned model.", show_default=False)
    ] = None,
    save_plan: Annotated[
        Path | None, typer.Option(callback=new_file, help="Write the plan as JSON.", show_default=False)
    ] = None,
    report: Annotated[
        Path | None, typer.Option(callback=new_file, help="Write an HTML report.", show_default=False)
    ] = None,
    seed: Seed = 0,
    batch_size: Batch = 32,
    device: Device = "auto",
    dtype: Dtype = "float32",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Score, decide, remove, measure; optionally recover by distillation, save, and write a report."""
    quiet()
    from ...apply_plan import MODES
    from ...checkpoint.record import applied_plan
    from ...data.jsonl import named_splits
    from ...data.sources import SOURCES
    from ...methods import CoMP
    from ...plan import Plan
    from ...report.pruning import write_report
    from ...report.words import cut_summary
    from ...workflow.compare import compare
    from ...workflow.prune import Method, Training

    one_of("--mode", mode, MODES)
    ways: dict[str, Method | Plan] = {str(path): Plan.load(path) for path in plans or []}
    names = methods or ([] if ways else [next(iter(METHODS))])
    ways |= chosen_methods(context, names, settings or [])
    loaded = read_model(model, device, dtype)
    calibration = read_data(loaded, data, split, limit, seed, objective)
    trained = [name for name, way in ways.items() if isinstance(way, CoMP) and way.train]
    if resume is not None and len(trained) != 1:
        raise UsageError(f"--resume: {resume}, expected one method that trains; there are {len(trained)}")
    if test_data is None and (data in SOURCES or test_split in named_splits(Path(data))):
        test_data = data
    if test_data is None:
        note(f"{data} has no split {test_split!r}: no accuracy is measured; --test-data names data for it")
    training = None
    if trained or distill_steps:
        training = Training(
            data=read_data(loaded, data, "train", None, seed),
            validation=read_data(loaded, data, "validation", limit, seed, objective) if trained else None,
            steps=train_steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
            out=resume,
        )
    found = compare(
        loaded.model,
        calibration,
        ways,
        evaluation=None if test_data is None else read_data(loaded, test_data, test_split, test_limit, seed),
        metric=metric,
        training=training,
        distill_steps=distill_steps,
        mode=mode,
        round_to=round_to,
        working=working,
    )
    result, comparisons = found.result, found.others
    if out is not None:
        found.save(out, processor=loaded.processor)
    if save_plan is not None:
        result.plan.save(save_plan)
    if report is not None:
        write_report(report, result, comparisons=comparisons, title=f"{Path(model).name}, pruned")
    if json:
        numbers = {"before": result.before, "after": result.after, "comparisons": comparisons}
        origin = {"method": result.method, "data": result.data, "plan": json_.loads(result.plan.to_json())}
        show_json({**numbers, **origin, "out": out, "report": report})
        return
    show("", before_after(result, comparisons), "", f"removed {cut_summary(applied_plan(result))}")
    for name, path in (("model", out), ("plan", save_plan), ("report", report)):
        if path is not None:
            show(f"{name:7s} {path}")
