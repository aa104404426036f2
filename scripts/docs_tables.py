"""Write the tables of methods, objectives and data sources into the pages that have a place for them.

    python scripts/docs_tables.py            # rewrites README.md and docs/*.md
    python scripts/docs_tables.py --check    # exits 1 if a page would change

A place is what lies between two comments, ``<!-- methods:units -->`` and ``<!-- /methods -->`` (methods:weights,
methods:joint, methods:tokens likewise), ``<!-- objectives -->`` and ``<!-- /objectives -->``, ``<!-- sources -->`` and
``<!-- /sources -->``. The tables are read from the registries; neither torch nor the compiled module is needed.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from vlprune_ext.data.sources import SOURCES
from vlprune_ext.methods import REGISTRY
from vlprune_ext.objectives.named import OBJECTIVES

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("units", "weights", "joint", "tokens")
PLACE = re.compile(r"(<!-- (methods|objectives|sources)(?::(\w+))? -->\n).*?(<!-- /\2 -->)", flags=re.S)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def _source(source: str) -> str:
    """Return a link for an arXiv number, another source as it stands."""
    return f"[{source}](https://arxiv.org/abs/{source})" if re.fullmatch(r"\d{4}\.\d{4,5}", source) else source or "-"


def methods(room: str) -> str:
    """Return the table of the methods of one room."""
    if room not in ROOMS:
        raise ValueError(f"methods:{room}, expected one of {', '.join(ROOMS)}")
    rows = [
        [f"`{entry.name}`", f"`vp.{entry.class_name}`", entry.summary, _source(entry.source)]
        for entry in REGISTRY
        if entry.module.split(".")[0] == room
    ]
    return _table(["name", "class", "what it does", "source"], rows)


def objectives(_: str = "") -> str:
    """Return the table of the objectives that have a name."""
    return _table(["name", "what it measures"], [[f"`{name}`", entry.summary] for name, entry in OBJECTIVES.items()])


def sources(_: str = "") -> str:
    """Return the table of the built-in data."""
    return _table(["name", "what it is"], [[f"`{name}`", what] for name, what in SOURCES.items()])


TABLES: dict[str, Callable[[str], str]] = {"methods": methods, "objectives": objectives, "sources": sources}


def filled(text: str) -> str:
    """Return a page with every place filled."""
    return PLACE.sub(lambda place: f"{place[1]}{TABLES[place[2]](place[3] or '')}{place[4]}", text)


def pages() -> list[Path]:
    """Return the pages that may have places."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page would change")
    check = parser.parse_args().check
    stale = []
    for path in pages():
        text = path.read_text(encoding="utf-8")
        new = filled(text)
        if new != text:
            stale.append(path.relative_to(ROOT))
            if not check:
                path.write_text(new, encoding="utf-8")
    for path in stale:
        print(f"{path}: {'its tables are not those of the registries; run make docs' if check else 'tables written'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
