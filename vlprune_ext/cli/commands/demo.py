"""``vlprune demo``: shipped models, from scores to a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..arguments import Debug, Json, new_file, new_folder
from ..terminal import UsageError, before_after, note, quiet, show, show_json, working


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
    from ..demo import CLIP, LLAVA, run_clip, run_llava, run_tokens

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
