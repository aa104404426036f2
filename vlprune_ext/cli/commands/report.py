"""``vlprune report``: the report once more."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..arguments import Debug, Json, new_file
from ..terminal import UsageError, show, show_json


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a pruned model.", show_default=False)],
    out: Annotated[Path, typer.Option(callback=new_file, help="HTML file to write.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="Title of the page.", show_default=False)] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the HTML report of a saved pruned model once more."""
    from ...checkpoint.record import load_record
    from ...report.pruning import write_report

    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    record, comparisons = load_record(folder)
    write_report(out, record, comparisons=comparisons, title=title or f"{folder.resolve().name}, pruned")
    if json:
        show_json({"report": out, "before": record.before, "after": record.after, "comparisons": comparisons})
    else:
        show(f"report  {out}")
