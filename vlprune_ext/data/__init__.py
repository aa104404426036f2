"""Image-text data as model inputs: `load_data` reads a source into `Data`, which all methods take.

Importing this module does not import torch; `sources` has the names of the built-in sources.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .load import load_data
    from .tensors import Classes, Data

_HOMES = {"load_data": "load", "Classes": "tensors", "Data": "tensors"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
