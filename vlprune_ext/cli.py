"""The command ``vlprune``: reads arguments, calls the package, prints.

Results go to stdout, everything else (progress, notes, errors) to stderr. Exit codes: 0 fine, 1 failed, 2 wrong usage.
Heavy imports happen inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import io
import json as json_
import math
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from typer.core import TyperGroup

from . import __version__

if TYPE_CHECKING:
    from .data import Data
    from .models import Loaded

# ClickException, wherever this typer keeps it.
_CLICK_ERROR: type[Any] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

_INTERRUPTED = 130  # what typer makes of Ctrl-C


class UsageError(Exception):
    """Arguments that cannot be meant: exit code 2."""


class _Commands(TyperGroup):
    """Reports every error in one line, and in full with --debug."""

    def main(self, args: Any = None, prog_name: str | None = None, *rest: Any, **extra: Any) -> Any:
        args = list(sys.argv[1:] if args is None else args)
        extra["standalone_mode"] = False
        debug = "--debug" in args
        try:
            code = super().main(args or ["--help"], prog_name or "vlprune", *rest, **extra)
        except _CLICK_ERROR as error:
            code = _fail(error.format_message(), 2)
        except UsageError as error:
            code = _fail(str(error), 2, debug)
        except (KeyboardInterrupt, typer.Abort):
            code = _INTERRUPTED
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # head closed the pipe: nothing left to say
            code = 0
        except (ValueError, TypeError, OSError, RuntimeError) as error:
            code = _fail(_message(error), 1, debug)
        except Exception as error:
            code = _fail(f"{type(error).__name__}: {_message(error)} (--debug shows where)", 1, debug)
        if code == _INTERRUPTED:
            code = _fail("interrupted", 1)
        sys.exit(code if isinstance(code, int) else 0)


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _fail(message: str, code: int, debug: bool = False) -> int:
    if debug:
        traceback.print_exc(file=sys.stderr)
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return code


app = typer.Typer(
    cls=_Commands,
    help="Prune vision-language models: score every head, neuron group and layer by ablation, remove the least needed.",
    epilog="Start with:  vlprune demo",
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of the command ``vlprune``."""
    app(prog_name="vlprune")


# ---- options that several commands have -----------------------------------------------------------------------------

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Model folder, pruned folder, zoo model (clip-digits) or hub id.", show_default=False
    ),
]
DataSource = Annotated[
    str, typer.Option("--data", help="'digits', 'digits-classes' or a JSONL of image path and text.")
]
Split = Annotated[str, typer.Option(help="Split of the data.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use this many images.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of every random choice.")]
Objective = Annotated[
    str | None,
    typer.Option(
        help="retrieval, recall@1, contrastive, margin, zero_shot or lm_loss; by default what suits the model.",
        show_default=False,
    ),
]
Towers = Annotated[
    str | None, typer.Option(help="Towers, separated by commas; by default all that count.", show_default=False)
]
Group = Annotated[int, typer.Option("--neurons-per-group", min=1, help="Neurons that are removed together.")]
Batch = Annotated[int, typer.Option(min=1, help="Samples run at once.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto (that of the files).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _example(text: str) -> str:
    return f"[bold]Example[/bold]\n\n[cyan]{text}[/cyan]"


# ---- printing -------------------------------------------------------------------------------------------------------


def _quiet() -> None:
    """What other packages have to say would break 'errors in one line' and 'nothing else on stdout'."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")


@contextlib.contextmanager
def _working(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on stderr, and a callback that moves it; what other packages print meanwhile is dropped."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with (
        contextlib.redirect_stdout(io.StringIO()),
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
    ):
        task = bar.add_task(what, total=None)

        def report(done: int, total: int, detail: str) -> None:
            bar.update(task, completed=done, total=total, description=f"{what}: {detail}")

        yield report


def _print_json(content: Any) -> None:
    print(json_.dumps(_finite(content), indent=1, default=str, allow_nan=False))


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {str(key): _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _print(*things: Any) -> None:
    console = Console(highlight=False)
    for thing in things:
        console.print(thing)


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), header_style="dim"
    )
    for n, column in enumerate(columns):
        table.add_column(column, justify="left" if n == 0 else "right", no_wrap=True)
    return table


def before_after_table(result: Any, comparisons: dict[str, Any] | None = None) -> Table:
    """The table of a report, for a terminal."""
    from .report import comparison_table

    content = comparison_table(result, comparisons)
    table = _table("model", *(content["columns"] if content else ()))
    for row in content["rows"] if content else ():
        style = "bold" if row["main"] else ""
        cells = [f"{c['text']}\n[not bold dim]{c['change']}[/]" if c["change"] else c["text"] for c in row["cells"]]
        table.add_row(row["name"], *cells, style=style)
    return table


# ---- what arguments mean --------------------------------------------------------------------------------------------


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())


def _check_output(path: Path | None, *, folder: bool = False) -> None:
    """Find out before hours of work that the result cannot be written."""
    if path is None:
        return
    if not folder and path.is_dir():
        raise UsageError(f"{path}: a folder, expected the name of a file")
    if folder and path.exists() and not path.is_dir():
        raise UsageError(f"{path}: a file, expected a folder")
    parent = path.absolute().parent
    if folder:
        parent = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"{path}: {parent} is not a folder that can be written to")


def _check_objective(name: str | None) -> None:
    from .objectives import objective_named

    if name is not None:
        with _usage():
            objective_named(name)


@contextlib.contextmanager
def _usage() -> Iterator[None]:
    """What is raised inside is the caller's mistake."""
    try:
        yield
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise UsageError(_message(error)) from error


def _load(name: str, device: str, dtype: str) -> Loaded:
    from .models import DTYPES, load_model

    if dtype not in DTYPES:
        raise UsageError(f"--dtype: {dtype!r}, expected one of {', '.join(DTYPES)}")
    with _working("loading the model"):
        return load_model(name, device=device, dtype=dtype)


def _load_data(loaded: Loaded, source: str, split: str, limit: int | None, seed: int) -> Data:
    from .data import load_data

    with _working("reading the data"):
        return load_data(source, split, model=loaded.model, processor=loaded.processor, limit=limit, seed=seed)


def _scoring_objective(loaded: Loaded, name: str | None) -> str:
    from .anatomy import describe
    from .pipeline import default_objective

    if name is not None:
        return name
    default = default_objective(describe(loaded.model)).name
    return "contrastive" if default == "retrieval" else default  # the smooth stand-in for recall


# ---- commands -------------------------------------------------------------------------------------------------------


@app.command(epilog=_example("vlprune demo --out pruned/clip-digits-mope --report report.html"))
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pruned model.")] = Path("pruned/clip-digits-mope"),
    report: Annotated[Path, typer.Option(help="HTML report.")] = Path("report.html"),
    keep: Annotated[float, typer.Option(help="Share of heads and neurons to keep.")] = 0.5,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Score, prune, save, reload and measure the small trained CLIP that is shipped; a few minutes on two cores."""
    if not 0 < keep < 1:
        raise UsageError(f"--keep: {keep}, expected a share between 0 and 1")
    _check_output(out, folder=True)
    _check_output(report)
    _quiet()
    from .demo import run

    notes = Console(stderr=True, highlight=False)
    outcome = run(out, report, keep=keep, working=_working, say=notes.print)
    if json:
        _print_json(outcome.as_dict())
    else:
        _print("", before_after_table(outcome.result, outcome.comparisons), "")
        _print(f"model   {out}", f"report  {report}")


@app.command(epilog=_example("vlprune score clip-digits --data digits --modules head,neurons,layer --out scores.csv"))
def score(
    model: Model,
    data: DataSource = "digits",
    split: Split = "calibration",
    limit: Limit = 300,
    objective: Objective = None,
    modules: Annotated[str, typer.Option(help="Some of head, cross_head, neurons, layer.")] = "head,neurons",
    towers: Towers = None,
    neurons_per_group: Group = 64,
    rewire: Annotated[bool, typer.Option("--rewire", help="Sort neurons by importance before grouping them.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the scores: .json or .csv.", show_default=False)] = None,
    top: Annotated[int, typer.Option(min=1, help="Modules to print from each end.")] = 8,
    seed: Seed = 0,
    batch_size: Batch = 32,
    device: Device = "auto",
    dtype: Dtype = "float32",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """How much the objective drops without each module, with standard errors."""
    _check_output(out)
    _quiet()
    import vlprune_ext as vp

    from .figures import number
    from .report import extremes, indistinguishable
    from .scoring import check_kinds

    _check_objective(objective)
    with _usage():
        kinds = check_kinds(_names(modules) or ())
    loaded = _load(model, device, dtype)
    calibration = _load_data(loaded, data, split, limit, seed)
    with _working("scoring") as progress:
        scores = vp.score(
            loaded.model,
            calibration,
            modules=kinds,
            towers=_names(towers),
            objective=_scoring_objective(loaded, objective),
            neurons_per_group=neurons_per_group,
            rewire=rewire,
            batch_size=batch_size,
            progress=progress,
        )
    if out is not None:
        scores.save(out)
    if json:
        _print_json(json_.loads(scores.to_json()))
        return
    for title, rows in extremes(scores, None, top):
        table = _table("module", "importance", "± s.e.", "parameters", title=title)
        for row in rows:
            table.add_row(row["module"], row["value"], row["error"], row["cost"])
        _print("", table)
    dense = f"; {scores.objective} is {number(scores.dense)} with all of them" if math.isfinite(scores.dense) else ""
    _print("", f"{len(scores)} modules, {calibration.n_images} images{dense}.", indistinguishable(scores))
    if out is not None:
        _print(f"scores  {out}")


@app.command(
    epilog=_example("vlprune prune clip-digits --keep-heads .5 --keep-neurons .5 --out pruned/half --report half.html")
)
def prune(
    model: Model,
    method: Annotated[str, typer.Option(help="mope, magnitude, random or taylor.")] = "mope",
    plan: Annotated[
        Path | None, typer.Option(help="Apply this plan instead of making one.", show_default=False)
    ] = None,
    data: DataSource = "digits",
    split: Split = "calibration",
    limit: Limit = 300,
    test_data: Annotated[
        str | None,
        typer.Option(help="Data for the numbers before and after; 'digits' where --data is.", show_default=False),
    ] = None,
    test_split: Annotated[str, typer.Option(help="Its split.")] = "test",
    test_limit: Annotated[int | None, typer.Option(min=1, help="Its number of images.", show_default=False)] = None,
    keep_heads: Annotated[float | None, typer.Option(help="Share of heads kept.", show_default="0.5")] = None,
    keep_neurons: Annotated[float | None, typer.Option(help="Share of neurons kept.", show_default="0.5")] = None,
    keep_layers: Annotated[float | None, typer.Option(help="Share of layers kept.", show_default="1.0")] = None,
    objective: Objective = None,
    towers: Towers = None,
    stage: Annotated[str | None, typer.Option(help="finetune or pretrain.", show_default="finetune")] = None,
    scope: Annotated[str | None, typer.Option(help="global or layer.", show_default="global")] = None,
    steps: Annotated[int | None, typer.Option(help="Rounds of scoring and removing.", show_default="method's")] = None,
    neurons_per_group: Annotated[
        int | None, typer.Option(help="Neurons that are removed together.", show_default="64")
    ] = None,
    fields: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Any other field of the method, for instance exact=false; repeatable."
        ),
    ] = None,
    mode: Annotated[str, typer.Option(help="remove (physically gone) or mask (weights zeroed).")] = "remove",
    round_to: Annotated[int, typer.Option(min=1, help="MLP widths stay multiples of this.")] = 8,
    distill_steps: Annotated[
        int, typer.Option(min=0, help="Then train against the dense model for so many steps, on the split 'train'.")
    ] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for the pruned model.", show_default=False)] = None,
    save_plan: Annotated[Path | None, typer.Option(help="Write the plan as JSON.", show_default=False)] = None,
    report: Annotated[Path | None, typer.Option(help="Write an HTML report.", show_default=False)] = None,
    seed: Seed = 0,
    batch_size: Batch = 32,
    device: Device = "auto",
    dtype: Dtype = "float32",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Score, decide, remove, measure; optionally recover by distillation, save, and write a report."""
    _check_output(out, folder=True)
    _check_output(save_plan)
    _check_output(report)
    _quiet()
    import vlprune_ext as vp

    from .report import applied_plan, cut_summary, save_record, write_report
    from .surgery import MODES

    if mode not in MODES:
        raise UsageError(f"--mode: {mode!r}, expected one of {', '.join(MODES)}")
    if plan is not None:
        chosen: Any = _Given(vp.Plan.load(plan))
    else:
        given = {
            "keep_heads": keep_heads,
            "keep_neurons": keep_neurons,
            "keep_layers": keep_layers,
            "objective": objective,
            "towers": _names(towers),
            "stage": stage,
            "scope": scope,
            "steps": steps,
            "neurons_per_group": neurons_per_group,
            "batch_size": batch_size,
            "seed": seed if method == "random" else None,
        }
        chosen = _method(method, {key: value for key, value in given.items() if value is not None}, fields or [])
    loaded = _load(model, device, dtype)
    if plan is None and objective is None:
        chosen.objective = _scoring_objective(loaded, None)
    calibration = _load_data(loaded, data, split, limit, seed)
    if test_data is None and data == "digits":
        test_data = data
    test = None if test_data is None else _load_data(loaded, test_data, test_split, test_limit, seed)
    with _working("pruning") as progress:
        result = vp.prune(
            loaded.model, calibration, chosen, evaluation=test, mode=mode, round_to=round_to, progress=progress
        )
    comparisons: dict[str, Any] = {}
    if distill_steps:
        from .distillation import distill
        from .report import method_name

        comparisons = {f"{method_name(result)}, before distillation": dict(result.after)}
        teacher = _load(model, device, dtype).model
        train = _load_data(loaded, data, "train", None, seed)
        with _working("distilling") as progress:
            distill(result.model, teacher, train, steps=distill_steps, seed=seed, progress=progress)
            quality = vp.evaluate(result.model, test) if test is not None else {}
            result.after = {**quality, **vp.measure(result.model, test or calibration)}
        result.method = {**result.method, "distill_steps": distill_steps}
    if out is not None:
        vp.save_pruned(
            result.model,  # type: ignore[arg-type]
            out,
            processor=loaded.processor,
            method=result.method,
            data=result.data,
            before=result.before,
            after=result.after,
        )
        save_record(out, result, comparisons)
    if save_plan is not None:
        result.plan.save(save_plan)
    if report is not None:
        write_report(report, result, comparisons=comparisons, title=f"{Path(model).name}, pruned")
    if json:
        _print_json(
            {
                "before": result.before,
                "after": result.after,
                "comparisons": comparisons,
                "method": result.method,
                "data": result.data,
                "plan": json_.loads(result.plan.to_json()),
                "out": out,
                "report": report,
            }
        )
        return
    _print("", before_after_table(result, comparisons), "", f"removed {cut_summary(applied_plan(result))}")
    for name, path in (("model", out), ("plan", save_plan), ("report", report)):
        if path is not None:
            _print(f"{name:7s} {path}")


class _Given:
    """A plan from a file, where a method is expected."""

    scores = None

    def __init__(self, plan: Any) -> None:
        self._plan = plan

    def plan(self, *_: Any, **__: Any) -> Any:
        return self._plan

    def describe(self) -> dict:
        return {"name": "plan", **self._plan.method}


def _method(name: str, given: dict[str, Any], settings: list[str]) -> Any:
    """A method object from its name and fields; what is wrong with them is a usage error."""
    import dataclasses

    from .methods import METHODS

    if name not in METHODS:
        raise UsageError(f"--method: {name!r}, expected one of {', '.join(METHODS)}")
    chosen: Any = METHODS[name]
    known = {field.name for field in dataclasses.fields(chosen) if field.init}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or key not in known:
            raise UsageError(f"--set: {setting!r}, expected FIELD=VALUE, a field of {name}: {', '.join(sorted(known))}")
        try:
            given[key] = json_.loads(text)
        except json_.JSONDecodeError:
            given[key] = text
    with _usage():
        return chosen(**given)


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
    _quiet()
    import vlprune_ext as vp

    from .report import NAMES, metric

    _check_objective(objective)
    loaded = _load(model, device, dtype)
    test = _load_data(loaded, data, split, limit, seed)
    with _working("evaluating"):
        numbers = vp.evaluate(loaded.model, test, objective, batch_size=batch_size)
        numbers = {**numbers, **vp.measure(loaded.model, test, objective)}
    if json:
        origin = {"name": test.name, "split": test.split, "hash": test.hash, "images": test.n_images}
        _print_json({"model": model, "data": origin, **numbers})
        return
    table = _table("", f"{test.name}, {test.split}, {test.n_images:,} images")
    for key, value in numbers.items():
        table.add_row(NAMES.get(key, key.replace("_", " ")), metric(key, value))
    _print("", table)


@app.command("plan-cost", epilog=_example("vlprune plan-cost clip-digits --modules head,neurons --steps 6"))
def plan_cost(
    model: Model,
    data: DataSource = "digits",
    split: Split = "calibration",
    limit: Limit = 300,
    objective: Objective = None,
    modules: Annotated[str, typer.Option(help="Some of head, cross_head, neurons, layer.")] = "head,neurons",
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
    _quiet()
    import vlprune_ext as vp

    from .report import duration, si
    from .scoring import check_kinds

    _check_objective(objective)
    with _usage():
        kinds = check_kinds(_names(modules) or ())
    loaded = _load(model, device, dtype)
    calibration = _load_data(loaded, data, split, limit, seed)
    with _working("timing one batch"):
        cost = vp.plan_cost(
            loaded.model,
            calibration,
            modules=kinds,
            towers=_names(towers),
            objective=_scoring_objective(loaded, objective),
            neurons_per_group=neurons_per_group,
            steps=steps,
            batch_size=batch_size,
        )
    if json:
        _print_json(cost)
        return
    table = _table("tower", "modules", "block runs", "naively", "saved", "FLOPs", "held", "time")
    for name, row in [*cost["towers"].items(), ("all", cost)]:
        table.add_row(
            name,
            f"{row['modules']:,}",
            f"{row['block_runs']:,}",
            f"{row['naive_block_runs']:,}",
            f"{row['naive_block_runs'] / row['block_runs']:.1f}x",
            si(row["flops"]),
            si(row["stream_bytes"], "B"),
            duration(row["seconds"]),
            style="bold" if name == "all" else "",
        )
    _print(
        "",
        table,
        "",
        f"For {calibration.n_images} images and {steps} round{'s' if steps > 1 else ''}; time from one batch.",
    )


@app.command(epilog=_example("vlprune bench --only leave_one_out"))
def bench(
    only: Annotated[
        str | None, typer.Option(help="Run the benchmarks whose name contains this.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to keep results.json and results.md in.", show_default=False)
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Run the benchmarks of the source tree: kernels against torch, replay against one run per module."""
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    if not (folder / "conftest.py").is_file():
        raise ValueError("the benchmarks are in the source tree, not in the installed package: run 'make bench' there")
    _check_output(out, folder=True)
    with tempfile.TemporaryDirectory() as temporary:
        results = out or Path(temporary)
        command = [sys.executable, "-m", "pytest", str(folder), "-q", "-o", "python_files=bench_*.py"]
        command += ["-o", "filterwarnings=default", "--bench-out", str(results.absolute()), "--bench-name", "results"]
        command += ["-k", only] if only else []
        done = subprocess.run(command, stdout=sys.stderr, cwd=folder.parent, check=False)
        if done.returncode == 5:
            raise UsageError(f"--only: no benchmark's name contains {only!r}")
        if done.returncode:
            raise ValueError(f"the benchmarks failed (pytest exit code {done.returncode})")
        print((results / f"results.{'json' if json else 'md'}").read_text(encoding="utf-8"), end="")


@app.command(epilog=_example("vlprune info --json"))
def info(json: Json = False, debug: Debug = False) -> None:
    """Versions, what was compiled, which instruction set runs, threads, GPUs."""
    _quiet()
    from .report import environment

    content = environment()
    if json:
        _print_json(content)
        return
    table = _table("", "")
    table.columns[1].justify = "left"
    table.columns[1].no_wrap = False
    for key, value in content.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        table.add_row(f"[dim]{key.replace('_', ' ')}[/dim]", text or "none")
    table.show_header = False
    _print(table)


@app.command(epilog=_example("vlprune report pruned/half --out half.html"))
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a pruned model.", show_default=False)],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="Title of the page.", show_default=False)] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the HTML report of a saved pruned model once more."""
    _check_output(out)
    from .report import load_record, write_report

    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    record, comparisons = load_record(folder)
    write_report(out, record, comparisons=comparisons, title=title or f"{folder.resolve().name}, pruned")
    if json:
        _print_json({"report": out, "before": record.before, "after": record.after, "comparisons": comparisons})
    else:
        _print(f"report  {out}")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"vlprune_ext {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())
