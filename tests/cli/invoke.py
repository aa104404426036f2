"""The command line, called as a user calls it."""

from __future__ import annotations

from typer.testing import CliRunner

from vlprune_ext.cli.app import app


def run(*args: object, code: int = 0, width: int = 80):
    """Run a command; its exit code has to be ``code``."""
    result = CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": str(width)}, terminal_width=width)
    assert result.exit_code == code, f"exit code {result.exit_code}: {result.stdout}{result.stderr}"
    return result


def refused(*args: object, code: int) -> str:
    """The one line of an error; nothing may be on stdout."""
    result = run(*args, code=code)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr
