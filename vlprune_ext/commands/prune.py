"""``vlprune prune``: score, decide, remove, measure."""

from __future__ import annotations

import copy
import json as json_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
from ..terminal import UsageError, before_after, quiet, show, show_json, working

if TYPE_CHECKING:
    from ..methods.ecoflap import ECoFLaP
    from ..methods.structured import Structured
    from ..pipeline import Result
    from ..plan import Plan


def prune(
    context: typer.Context,
    model: Model,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            metavar="METHOD",
            help="mope, magnitude, random or taylor; ecoflap, wanda, sparsegpt or globalmagnitude; comp, "
            "parametersonly, tokensonly, jointsequential or jointsimultaneous. Several: the first is kept, the others "
            "compared.",
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
            help="Data for the numbers before and after; --data where that has a split of this name.",
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
    mode: Annotated[str, typer.Option(help="remove (physically gone) or mask (weights zeroed).")] = "remove",
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
    import vlprune_ext as vp

    from ..anatomy import describe
    from ..data.digits import DIGITS, DIGITS_QUESTIONS
    from ..methods import CoMP
    from ..pipeline import prune_in_training, recover
    from ..record import applied_plan, save_record
    from ..report import write_report
    from ..summary import cut_summary, method_name
    from ..surgery import MODES

    one_of("--mode", mode, MODES)
    ways: dict[str, Structured | ECoFLaP | CoMP | Plan] = {str(path): vp.Plan.load(path) for path in plans or []}
    names = methods or ([] if ways else ["mope"])
    ways |= chosen_methods(context, names, settings or [])
    loaded = read_model(model, device, dtype)
    calibration = read_data(loaded, data, split, limit, seed, objective)
    trained = [name for name, way in ways.items() if isinstance(way, CoMP) and way.train]
    if resume is not None and len(trained) != 1:
        raise UsageError(f"--resume: {resume}, expected one method that trains; there are {len(trained)}")
    if test_data is None and data in (DIGITS, DIGITS_QUESTIONS):
        test_data = data
    test = None if test_data is None else read_data(loaded, test_data, test_split, test_limit, seed)

    if metric is None:  # what CoMP decides by is what its user wants to see
        judges = (way.objective_for(describe(loaded.model)) for way in ways.values() if isinstance(way, CoMP))
        metric = next((judge.name for judge in judges), None)
    scores: dict[type, Any] = {}  # of a method: the same for every sparsity
    before: dict[str, float] | None = None  # the same for all

    def pruned(subject: Any, name: str) -> Result:
        nonlocal before
        way = ways[name]
        if isinstance(way, CoMP) and way.train:
            way.validation = way.validation or read_data(loaded, data, "validation", limit, seed, objective)
            way.calibration = calibration
            train = read_data(loaded, data, "train", None, seed)
            with working(f"training with {name}") as progress:
                done = prune_in_training(
                    subject,
                    train,
                    way,
                    steps=train_steps,
                    batch_size=batch_size,
                    learning_rate=learning_rate,
                    evaluation=test,
                    metric=metric,
                    before=before,
                    out=resume,
                    seed=seed,
                    progress=progress,
                )
            before = done.before
            return done
        with working(f"pruning by {name}") as progress:
            done = vp.prune(
                subject,
                calibration,
                way,
                evaluation=test,
                metric=metric,
                scores=scores.get(type(way)),
                before=before,
                mode=mode,
                round_to=round_to,
                progress=progress,
            )
        if isinstance(way, vp.ECoFLaP):
            scores[type(way)] = done.scores
        before = done.before
        return done

    first, *others = ways
    comparisons = {name: pruned(copy.deepcopy(loaded.model), name).after for name in others}
    result = pruned(loaded.model, first)
    if distill_steps:
        comparisons[f"{method_name(result)}, before distillation"] = result.after
        teacher = read_model(model, device, dtype).model
        train = read_data(loaded, data, "train", None, seed)
        with working("distilling") as progress:
            result = recover(
                result,
                teacher,
                train,
                calibration,
                evaluation=test,
                metric=metric,
                steps=distill_steps,
                seed=seed,
                progress=progress,
            )
    if out is not None:
        result.save(out, processor=loaded.processor)
        save_record(out, result, comparisons)
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
