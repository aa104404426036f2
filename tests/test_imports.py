"""Rooms import only rooms below them, and there is no circle of files or folders: lazy and typing imports counted."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "vlprune_ext"
NAME = PACKAGE.name
# From the bottom up; rooms of one line never import each other.
ROOMS = (
    ("_version", "progress", "reference", "_native"),
    ("ops",),
    ("anatomy",),
    ("zoo",),
    ("data",),
    ("objectives",),
    ("replay",),
    ("plan",),
    ("units", "weights", "tokens"),
    ("apply_plan",),
    ("checkpoint",),
    ("training",),
    ("comp",),
    ("methods",),
    ("workflow",),
    ("report",),
    ("cli",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
MODULES = {
    ".".join((NAME, *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imported(module: str, path: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in it."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) + 1 - node.level]) if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                below = f"{source}.{alias.name}"
                found.add(below if below in MODULES or alias.name == "_C" else source)
    return {name for name in found if name == NAME or name.startswith(f"{NAME}.")} - {module, f"{NAME}._C"}


IMPORTS = {module: imported(module, path) for module, path in MODULES.items()}


def room(module: str) -> str:
    return module.split(".")[1] if module != NAME else ""


@pytest.mark.parametrize("module", sorted(set(MODULES) - {NAME}))
def test_a_room_imports_only_rooms_below_it(module):
    assert room(module) in LEVEL, f"{module} is in no room"
    for other in IMPORTS[module]:
        assert other != NAME, f"{module} imports the face of the package"
        below = room(other) == room(module) or LEVEL[room(other)] < LEVEL[room(module)]
        assert below, f"{module} imports {other}, which is not below it"


def test_there_is_no_circle_of_files():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_there_is_no_circle_of_folders():
    folders: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        own = ".".join((NAME, *path.relative_to(PACKAGE).parent.parts))
        for other in IMPORTS[module]:
            theirs = ".".join((NAME, *MODULES[other].relative_to(PACKAGE).parent.parts))
            # A folder and one within it are one place: its own file may gather what lies below.
            if not f"{theirs}.".startswith(f"{own}.") and not f"{own}.".startswith(f"{theirs}."):
                folders.setdefault(own, set()).add(theirs)
    try:
        TopologicalSorter(folders).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_few_modules_lie_outside_a_room():
    loose = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert loose == {"__main__", "_native", "_version", "apply_plan", "progress", "reference"}


@pytest.mark.parametrize("folder", ["vlprune_ext", "csrc"])
def test_no_file_is_longer_than_a_room(folder):
    """Above 450 lines a sentence in the file has to say why it is one room."""
    for path in (PACKAGE.parent / folder).rglob("*"):
        if path.suffix in {".py", ".h", ".cuh", ".cpp", ".cu"}:
            text = path.read_text(encoding="utf-8")
            assert text.count("\n") <= 450 or "one room" in text, f"{path}: {text.count(chr(10))} lines"
