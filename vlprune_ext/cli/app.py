"""The command ``vlprune``: its subcommands, in the order of ``--help``.

Results go to stdout, everything else (progress, notes, errors) to stderr. Exit codes: 0 fine, 1 failed, 2 wrong usage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from .._version import __version__
from .commands.bench import bench
from .commands.demo import demo
from .commands.evaluate import evaluate
from .commands.info import info
from .commands.plan_cost import plan_cost
from .commands.prune import prune
from .commands.report import report
from .commands.score import score
from .commands.tokens import tokens
from .terminal import Commands

COMMANDS: dict[str, tuple[Callable[..., None], str]] = {  # each with an example
    "demo": (demo, "vlprune demo --out pruned --report report.html"),
    "score": (score, "vlprune score clip-digits --data digits --modules head,neurons,layer --out scores.csv"),
    "prune": (
        prune,
        "vlprune prune clip-digits --keep-heads .5 --keep-neurons .5 --out pruned/half --report half.html",
    ),
    "evaluate": (evaluate, "vlprune evaluate pruned/half --data digits --split test --objective retrieval"),
    "tokens": (
        tokens,
        "vlprune tokens llava-digits --method fastv --method random --out kept.png --report tokens.html",
    ),
    "plan-cost": (plan_cost, "vlprune plan-cost clip-digits --modules head,neurons --steps 6"),
    "bench": (bench, "vlprune bench --only leave_one_out"),
    "info": (info, "vlprune info --json"),
    "report": (report, "vlprune report pruned/half --out half.html"),
}

app = typer.Typer(
    cls=Commands,
    help="Prune vision-language models: score every head, neuron group and layer by ablation, remove the least needed.",
    epilog="Start with:  vlprune demo",
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for name, (command, example) in COMMANDS.items():
    app.command(name, epilog=f"[bold]Example[/bold]\n\n[cyan]{example}[/cyan]")(command)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"vlprune_ext {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """Entry point of the command ``vlprune``."""
    app(prog_name="vlprune")
