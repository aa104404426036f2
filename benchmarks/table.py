"""Rows of measurements: a file that grows line by line, and the table that is made of it.

    python benchmarks/table.py ROWS.jsonl INTO      # INTO/<device>.json and .md: rows measured again replace the old

A rows file starts with one line about the machine and has a line for each row; it is flushed after each, so that what
was measured survives whatever happens next. A line that was cut off is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

KEY = ("what", "shape", "dtype")
COLUMNS = (
    *KEY,
    "ms",
    "GB/s",
    "of copy",
    "TFLOP/s",
    "of product",
    "baseline",
    "baseline ms",
    "ratio",
    "commit",
    "notes",
)

Row = dict[str, Any]


def append(path: Path, row: Row) -> None:
    """Write ``row`` as one line at the end of ``path``, and have it on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> tuple[Row, list[Row]]:
    """Return the machine and the rows of a rows file; of several runs in one file, the last machine."""
    machine: Row = {}
    rows: list[Row] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue  # cut off
        if "machine" in value:
            machine = value["machine"]
        else:
            rows.append(value)
    if not machine:
        raise ValueError(f"{path}: no line about the machine; expected a file that --bench-rows wrote")
    return machine, rows


def merge(before: Iterable[Row], rows: Iterable[Row]) -> list[Row]:
    """Return all rows in order; a row of ``rows`` replaces one of the same what, shape and dtype."""
    found = {tuple(row[key] for key in KEY): row for row in (*before, *rows)}
    return [found[place] for place in sorted(found)]


def write(machine: Row, rows: Iterable[Row], folder: Path, name: str | None = None) -> Path:
    """Write ``folder``/<name or device>.json and .md, beside what is there already; return the Markdown's path."""
    name = name or re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    before = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    merged = merge(before, (row | {"commit": machine["commit"]} for row in rows))
    path.write_text(json.dumps({"machine": machine, "rows": merged}, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(machine, merged), encoding="utf-8")
    return path.with_suffix(".md")


def markdown(machine: Row, rows: Iterable[Row]) -> str:
    """Return the rows as a Markdown table with a line about the machine."""
    head = (
        f"{machine['device']}, {machine['threads']} CPU threads, {machine['isa']};"
        f" torch {machine['torch']}, CUDA {machine['cuda_version'] or 'not built'}."
        " Medians; ratio = baseline ms / ms (above 1: faster than the baseline); of copy and of product: the time of a"
        " copy that moves as many bytes, and of a matrix product of as many operations, over ours.\n"
    )
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(_cell(row.get(column)) for column in COLUMNS) + " |" for row in rows]
    return head + "\n" + "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value).replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a table of a file of measured rows.")
    parser.add_argument("rows", type=Path, help="what --bench-rows wrote")
    parser.add_argument("into", type=Path, help="folder of <device>.json and <device>.md")
    parser.add_argument("--name", help="name of these files, instead of the device's")
    given = parser.parse_args()
    print(f"wrote {write(*read(given.rows), given.into, given.name)} and the .json beside it")


if __name__ == "__main__":
    main()
