"""`run_benchmarks`: the benchmarks of the source tree, from Python."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_NOTHING_COLLECTED = 5  # pytest's exit code


def run_benchmarks(folder: Path, only: str | None = None) -> None:
    """Run them with pytest, its words on stderr, and write results.json and results.md into ``folder``.

    Raises FileNotFoundError outside a source tree, LookupError if no benchmark's name contains ``only``, RuntimeError
    if one fails.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "conftest.py").is_file():
        raise FileNotFoundError(
            "the benchmarks are in the source tree, not in the installed package: run 'make bench' there"
        )
    command = [sys.executable, "-m", "pytest", str(root / "benchmarks"), "-q", "-o", "python_files=bench_*.py"]
    command += ["-o", "filterwarnings=default", "--bench-out", str(folder.absolute()), "--bench-name", "results"]
    command += ["-k", only] if only else []
    done = subprocess.run(command, stdout=sys.stderr, cwd=root, check=False)
    if done.returncode == _NOTHING_COLLECTED:
        raise LookupError(f"no benchmark's name contains {only!r}")
    if done.returncode:
        raise RuntimeError(f"the benchmarks failed (pytest exit code {done.returncode})")
