"""``vlprune bench``: the benchmarks."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from ..arguments import Debug, Json, new_folder
from ..terminal import UsageError


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
    from ...workflow.benchmarks import run_benchmarks

    with tempfile.TemporaryDirectory() as temporary:
        results = out or Path(temporary)
        try:
            run_benchmarks(results, only)
        except LookupError as error:
            raise UsageError(f"--only: {error}") from None
        print((results / f"results.{'json' if json else 'md'}").read_text(encoding="utf-8"), end="")
