"""Objectives by which models and modules are scored: per-sample values, higher is better.

An objective defines the inputs of a tower's forward (`batches`), what is computed from the model for each row
(`outputs`: embeddings, losses), and the value of each sample (`values`). The importance of a unit is the drop of its
mean value. Replay computes `outputs` under many interventions and passes all of them to `values`. Importing this module
does not import torch; `named` has the registry.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Inputs, Objective, Part
    from .language import ExactMatch, Generated, LMLoss
    from .named import OBJECTIVES, objective_named, usual_objective
    from .retrieval import Contrastive, Retrieval, ZeroShot

_HOMES = {
    **dict.fromkeys(("Inputs", "Objective", "Part"), "base"),
    **dict.fromkeys(("ExactMatch", "Generated", "LMLoss"), "language"),
    **dict.fromkeys(("OBJECTIVES", "objective_named", "usual_objective"), "named"),
    **dict.fromkeys(("Contrastive", "Retrieval", "ZeroShot"), "retrieval"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
