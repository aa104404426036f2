"""The registry: it names what is there, and all of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlprune_ext import methods
from vlprune_ext.methods import METHODS, REGISTRY, TOKENS

SHARED = {"units.structured", "tokens.checks"}  # what several methods are made of


def test_every_file_of_a_method_is_in_the_registry():
    files = Path(methods.__file__).parent.glob("*/*.py")
    found = {f"{path.parent.name}.{path.stem}" for path in files if path.stem != "__init__"}
    assert found - SHARED == {entry.module for entry in REGISTRY}


@pytest.mark.parametrize("entry", REGISTRY, ids=lambda entry: entry.class_name)
def test_an_entry_names_its_class(entry):
    room = TOKENS if entry.module.startswith("tokens.") else METHODS
    assert room[entry.name].__name__ == entry.class_name
    assert room[entry.name].__module__ == f"{methods.__name__}.{entry.module}"
    assert entry.summary
