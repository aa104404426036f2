"""The command ``vlprune``: reads arguments, calls the package, prints.

Results go to stdout, everything else (progress, notes, errors) to stderr. Exit codes: 0 fine, 1 failed, 2 wrong usage.
Heavy imports happen inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import copy
import json as json_
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __version__
from .arguments import (
    FIELDS,
    Batch,
    DataSource,
    Debug,
    Device,
    Dtype,
    Group,
    Json,
    Keep,
    Limit,
    Metric,
    Model,
    Modules,
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
    open_image,
    read_data,
    read_model,
    token_methods,
)
from .terminal import Commands, UsageError, before_after, note, quiet, show, show_json, table, working

if TYPE_CHECKING:
    from .methods.ecoflap import ECoFLaP
    from .methods.structured import Structured
    from .pipeline import Result
    from .plan import Plan

app = typer.Typer(
    cls=Commands,
    help="Prune vision-language models: score every head, neuron group and layer by ablation, remove the least needed.",
    epilog="Start with:  vlprune demo",
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of the command ``vlprune``."""
    app(prog_name="vlprune")


def _example(text: str) -> str:
    return f"[bold]Example[/bold]\n\n[cyan]{text}[/cyan]"


# ---- commands -------------------------------------------------------------------------------------------------------


@app.command(epilog=_example("vlprune demo --out pruned --report report.html"))
def demo(
    out: Annotated[Path, typer.Option(callback=new_folder, help="Folder for the two pruned models.")] = Path("pruned"),
    report: Annotated[
        Path, typer.Option(callback=new_file, help="HTML report; those of the LLaVA go beside it.")
    ] = Path("report.html"),
    keep: Annotated[float, typer.Option(help="Share of the CLIP's heads and neurons to keep.")] = 0.5,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Score, prune, save, reload and measure the small trained models that are shipped; a few minutes on two cores."""
    if not 0 < keep < 1:
        raise UsageError(f"--keep: {keep}, expected a share between 0 and 1")
    quiet()
    from .demo import CLIP, LLAVA, run_clip, run_llava, run_tokens

    folders = {CLIP: out / "clip-digits-mope", LLAVA: out / "llava-digits-ecoflap"}
    beside = {kind: report.with_name(f"{report.stem}-{kind}{report.suffix}") for kind in ("llava", "tokens")}
    pages = {CLIP: report, LLAVA: beside["llava"]}
    outcomes = {CLIP: run_clip(folders[CLIP], pages[CLIP], keep=keep, working=working, say=note)}
    if not json:
        show("", before_after(outcomes[CLIP].result, outcomes[CLIP].comparisons), "")
    outcomes[LLAVA] = run_llava(folders[LLAVA], pages[LLAVA], working=working, say=note)
    fewer = run_tokens(beside["tokens"], working=working, say=note)
    if json:
        show_json({**{name: outcome.as_dict() for name, outcome in outcomes.items()}, "tokens": fewer.as_dict()})
        return
    show("", before_after(outcomes[LLAVA].result, outcomes[LLAVA].comparisons), "")
    show(*(f"{name:12s}  {folders[name]}  {pages[name]}" for name in outcomes), f"tokens        {beside['tokens']}")


@app.command(epilog=_example("vlprune score clip-digits --data digits --modules head,neurons,layer --out scores.csv"))
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
    """How much the objective drops without each module, with standard errors."""
    quiet()
    import vlprune_ext as vp

    from .figures import number
    from .summary import extremes, indistinguishable

    loaded = read_model(model, device, dtype)
    calibration = read_data(loaded, data, split, limit, seed, objective)
    with working("scoring") as progress:
        scores = vp.score(
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


@app.command(
    epilog=_example("vlprune prune clip-digits --keep-heads .5 --keep-neurons .5 --out pruned/half --report half.html")
)
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

    from .anatomy import describe
    from .data.digits import DIGITS, DIGITS_QUESTIONS
    from .methods import CoMP
    from .pipeline import prune_in_training, recover
    from .record import applied_plan, save_record
    from .report import write_report
    from .summary import cut_summary, method_name
    from .surgery import MODES

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


@app.command(epilog=_example("vlprune evaluate pruned/half --data digits --split test --objective retrieval"))
def evaluate(
    model: Model,
    data: DataSource = "digits",
    split: Split = "test",
    limit: Limit = None,
    objective: Objective = None,
    seed: Seed = 0,
    batch_size: Batch = 32,
    device: Device = "auto",
    dtype: Dtype = "float32",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """What the model can do, and its parameters, FLOPs and latency."""
    quiet()
    import vlprune_ext as vp

    from .summary import NAMES, metric

    loaded = read_model(model, device, dtype)
    test = read_data(loaded, data, split, limit, seed, objective)
    with working("evaluating"):
        numbers = vp.evaluate(loaded.model, test, objective, batch_size=batch_size)
        numbers = {**numbers, **vp.measure(loaded.model, test, objective)}
    if json:
        origin = {"name": test.name, "split": test.split, "hash": test.hash, "images": test.n_images}
        show_json({"model": model, "data": origin, **numbers})
        return
    shown = table("", f"{test.name}, {test.split}, {test.n_images:,} images")
    for key, value in numbers.items():
        shown.add_row(NAMES.get(key, key.replace("_", " ")), metric(key, value))
    show("", shown)


@app.command(
    epilog=_example("vlprune tokens llava-digits --method fastv --method random --out kept.png --report tokens.html")
)
def tokens(
    model: Model,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            metavar="METHOD",
            help="fastv, pyramiddrop, visionzip, tome, divprune, plphp, lookm or random; repeatable.",
            show_default="fastv",
        ),
    ] = None,
    keep: Keep = "0.5,0.25,0.11",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="A field of the method, for instance layer=1; repeatable."),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(help="A picture; with --question. By default a scene of digits.", show_default=False),
    ] = None,
    question: Annotated[str | None, typer.Option(help="What to ask about it.", show_default=False)] = None,
    length: Annotated[int, typer.Option(min=1, help="Tokens of the answer at most.")] = 32,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="For the report: 'digits-questions' or a JSONL, to judge the methods on.",
            show_default="digits-questions, if it is about digits",
        ),
    ] = None,
    split: Split = "test",
    limit: Limit = 500,
    metric: Metric = None,
    out: Annotated[
        Path | None,
        typer.Option(callback=new_file, help="Write the picture and what each method keeps (PNG).", show_default=False),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(callback=new_file, help="Write an HTML report: accuracy against tokens.", show_default=False),
    ] = None,
    seed: Seed = 0,
    batch_size: Batch = 64,
    device: Device = "auto",
    dtype: Dtype = "float32",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Answer a question with fewer visual tokens: what stays, what it takes, and how often answers are right."""
    quiet()
    from rich.text import Text

    from .data.digits import DIGITS_QUESTIONS, read_digits
    from .token_report import cells, picture_of, write_token_report
    from .token_trials import compare

    if (image is None) != (question is None):
        raise UsageError("--image and --question: one without the other")
    if question is not None and not question.strip():
        raise UsageError("--question: it is empty")
    ways = token_methods(methods or ["fastv"], keep, settings or [])
    if image is None:
        record = read_digits(DIGITS_QUESTIONS, "test", 1, seed)[0][0]
        shown, question, data = record.open(), record.question, data or DIGITS_QUESTIONS
    else:
        shown = open_image(image)
    loaded = read_model(model, device, dtype)
    judged = None if report is None or data is None else read_data(loaded, data, split, limit, seed)
    with working("answering") as progress:
        found = compare(
            loaded,
            shown,
            question or "",
            ways,
            data=judged,
            metric=metric,
            length=length,
            batch_size=batch_size,
            progress=progress,
        )
    if out is not None:
        picture_of(found).savefig(out, dpi=200)
    if report is not None:
        write_token_report(report, found, title=f"{Path(model).name}, fewer visual tokens")
    if json:
        show_json({**found.as_dict(), "out": out, "report": report})
        return
    titles = ["answer", "visual tokens", "time", "key-value cache", "peak memory"]
    rows = {name: cells(trial) for name, trial in found.trials.items()}
    title = f"{found.question}  (keep {keep[0]:g}; visual tokens: mean over blocks)"
    listing = table("method", *titles[: len(rows["all tokens"])])
    listing.columns[1].no_wrap, listing.columns[1].max_width = False, 40  # answers may be long
    for name, row in rows.items():
        listing.add_row(name, *row)
    show("", Text(title, style="bold"), listing, "")
    for name, path in (("picture", out), ("report", report)):
        if path is not None:
            show(f"{name:7s} {path}")


@app.command("plan-cost", epilog=_example("vlprune plan-cost clip-digits --modules head,neurons --steps 6"))
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
    """What a scoring job will cost before it starts: block runs, FLOPs, memory, time."""
    quiet()
    import vlprune_ext as vp

    from .summary import duration, si

    loaded = read_model(model, device, dtype)
    calibration = read_data(loaded, data, split, limit, seed, objective)
    with working("timing one batch"):
        cost = vp.plan_cost(
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


@app.command(epilog=_example("vlprune bench --only leave_one_out"))
def bench(
    only: Annotated[
        str | None, typer.Option(help="Run the benchmarks whose name contains this.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(callback=new_folder, help="Folder to keep results.json and results.md in.", show_default=False),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Run the benchmarks of the source tree: kernels against torch, replay against one run per module."""
    from .bench import run_benchmarks

    with tempfile.TemporaryDirectory() as temporary:
        results = out or Path(temporary)
        try:
            run_benchmarks(results, only)
        except LookupError as error:
            raise UsageError(f"--only: {error}") from None
        print((results / f"results.{'json' if json else 'md'}").read_text(encoding="utf-8"), end="")


@app.command(epilog=_example("vlprune info --json"))
def info(json: Json = False, debug: Debug = False) -> None:
    """Versions, what was compiled, which instruction set runs, threads, GPUs."""
    quiet()
    from .machine import environment

    content = environment()
    if json:
        show_json(content)
        return
    shown = table("", "")
    shown.columns[1].justify = "left"
    shown.columns[1].no_wrap = False
    for key, value in content.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        shown.add_row(f"[dim]{key.replace('_', ' ')}[/dim]", text or "none")
    shown.show_header = False
    show(shown)


@app.command(epilog=_example("vlprune report pruned/half --out half.html"))
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a pruned model.", show_default=False)],
    out: Annotated[Path, typer.Option(callback=new_file, help="HTML file to write.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="Title of the page.", show_default=False)] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the HTML report of a saved pruned model once more."""
    from .record import load_record
    from .report import write_report

    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    record, comparisons = load_record(folder)
    write_report(out, record, comparisons=comparisons, title=title or f"{folder.resolve().name}, pruned")
    if json:
        show_json({"report": out, "before": record.before, "after": record.after, "comparisons": comparisons})
    else:
        show(f"report  {out}")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"vlprune_ext {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())
