"""``vlprune tokens``: fewer visual tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...methods import TOKENS
from ..arguments import (
    Batch,
    Debug,
    Device,
    Dtype,
    Json,
    Keep,
    Limit,
    Metric,
    Model,
    Seed,
    Split,
    new_file,
    open_image,
    read_data,
    read_model,
    token_methods,
)
from ..terminal import UsageError, quiet, show, show_json, table, working


def tokens(
    model: Model,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            metavar="METHOD",
            help=f"{', '.join(TOKENS)}; repeatable.",
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
    """Answer a question with fewer visual tokens: which are kept, time and memory, and how often answers are right."""
    quiet()
    from rich.text import Text

    from ...data.digits import read_digits
    from ...data.sources import DIGITS_QUESTIONS
    from ...report.tokens import cells, picture_of, write_token_report
    from ...workflow.token_trials import compare_tokens

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
        found = compare_tokens(
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
