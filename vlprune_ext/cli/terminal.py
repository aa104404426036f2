"""What the command line prints, and how it fails: results on stdout, progress and one-line errors on stderr."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from typer.core import TyperGroup

# ---- errors ---------------------------------------------------------------------------------------------------------

# ClickException, wherever this typer keeps it.
_CLICK_ERROR: type[Any] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

_INTERRUPTED = 130  # what typer makes of Ctrl-C


class UsageError(Exception):
    """Arguments that cannot be meant: exit code 2."""


@contextlib.contextmanager
def usage() -> Iterator[None]:
    """Turn errors raised inside into the caller's: exit code 2."""
    try:
        yield
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise UsageError(_message(error)) from error


class Commands(TyperGroup):
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


# ---- while it works -------------------------------------------------------------------------------------------------


def quiet() -> None:
    """Silence other packages, which would break 'errors in one line' and 'nothing else on stdout'."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", message="CoMP: ")  # the package's own: a user has to know
    warnings.showwarning = lambda message, *_: note(f"warning: {message}")


@contextlib.contextmanager
def working(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show a progress bar on stderr, and yield the callback that moves it; other packages' prints are dropped."""
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


def note(text: str) -> None:
    """Print a line on stderr."""
    Console(stderr=True, highlight=False).print(text)


# ---- results --------------------------------------------------------------------------------------------------------


def show(*things: Any) -> None:
    console = Console(highlight=False)
    for thing in things:
        console.print(thing)


def show_json(content: Any) -> None:
    print(json.dumps(_finite(content), indent=1, default=str, allow_nan=False))


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {str(key): _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def table(*columns: str, title: str | None = None) -> Table:
    """Return a table with its first column to the left and numbers to the right."""
    result = Table(
        title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), header_style="dim"
    )
    for n, column in enumerate(columns):
        result.add_column(column, justify="left" if n == 0 else "right", no_wrap=True)
    return result


def before_after(result: Any, comparisons: Mapping[str, Any] | None = None) -> Table:
    """Return the table of a report, for a terminal."""
    from ..report.tables import comparison_table

    content = comparison_table(result, comparisons) or {"columns": (), "rows": ()}
    shown = table("model", *content["columns"])
    for row in content["rows"]:
        cells = [f"{c['text']}\n[not bold dim]{c['change']}[/]" if c["change"] else c["text"] for c in row["cells"]]
        shown.add_row(row["name"], *cells, style="bold" if row["main"] else "")
    return shown
