"""The pages: their tables are those of the registries, their links lead somewhere, their commands and names exist."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import vlprune_ext as vp
from vlprune_ext.cli.app import app
from vlprune_ext.methods import METHODS, TOKENS

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "docs_tables.py"
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("README.md", "CONTRIBUTING.md", "docs/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)
FENCE = re.compile(r"^```\w*\n(.*?)^```", flags=re.M | re.S)


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("docs_tables", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


# ---- tables ---------------------------------------------------------------------------------------------------------


def test_tables_are_current():
    done = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "place", ["methods:units", "methods:weights", "methods:joint", "methods:tokens", "objectives", "sources"]
)
def test_the_readme_has_every_table(place):
    assert f"<!-- {place} -->" in text_of("README.md")


def test_a_stale_table_is_replaced_and_nothing_else(tables):
    page = "before\n<!-- sources -->\n| old |\n<!-- /sources -->\nafter <!-- a comment -->\n"
    new = tables.filled(page)
    assert new == f"before\n<!-- sources -->\n{tables.sources()}<!-- /sources -->\nafter <!-- a comment -->\n"
    assert "| `digits` |" in new
    assert tables.filled(new) == new


def test_a_table_of_no_room_is_refused(tables):
    with pytest.raises(ValueError, match="methods:nonsense, expected one of units"):
        tables.filled("<!-- methods:nonsense -->\n<!-- /methods -->\n")


# ---- links ----------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The fragments by which a page's headings are reached."""
    headings = re.findall(r"^#+ (.*)", FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text_of(page))):
        if target.startswith(("http://", "https://")):
            continue
        file, _, fragment = target.partition("#")
        found = path.parent / file if file else path
        assert found.exists(), target
        if fragment:
            assert fragment in anchors(found), target


# ---- commands and names ---------------------------------------------------------------------------------------------


def commands(text: str) -> list[str]:
    """Every command that a page shows, in a block or within a line, on one line each."""
    blocks = FENCE.findall(text)
    inline = re.findall(r"`(vlprune [^`]*)`", FENCE.sub("", text))
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [" ".join(line.split()) for line in (*lines, *inline) if line.startswith("vlprune ")]


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page):
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for line in commands(text_of(page)):
        name, *rest = line.split()[1:]
        if name.startswith("-"):
            continue
        assert name in known, line
        options = {option for param in known[name].params for option in (*param.opts, *param.secondary_opts)}
        for option in re.findall(r"(?<!\S)--[a-z-]+", " ".join(rest)):
            assert option in options | {"--help"}, line
        for method in re.findall(r"--method ([a-z]+)", line):
            assert method in (TOKENS if name == "tokens" else METHODS), line


@pytest.mark.parametrize("page", PAGES)
def test_public_names_exist(page):
    for name in re.findall(r"\bvp\.(\w+)", text_of(page)):
        assert name in vp.__all__, name
