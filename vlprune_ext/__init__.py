"""vlprune_ext: pruning vision-language models with C++ and CUDA kernels."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from . import methods as _methods
from ._version import __version__

if TYPE_CHECKING:
    from . import anatomy, ops, reference, zoo
    from .anatomy import describe
    from .apply_plan import apply
    from .checkpoint import load_pruned, save_pruned
    from .data import Data, load_data
    from .methods import *
    from .objectives import Contrastive, LMLoss, Objective, Retrieval, ZeroShot
    from .plan import Module, Plan, Scores
    from .replay import DropHead, DropLayer, DropNeurons, PerturbWeight, Replay
    from .tokens import Pruning, prune_tokens
    from .training.distillation import distill
    from .training.trainer import train
    from .units.ablation import score
    from .units.masking import masked
    from .weights.semi_structured import to_semi_structured
    from .workflow.compare import Comparison, compare
    from .workflow.cost import plan_cost
    from .workflow.measure import evaluate, measure
    from .workflow.prune import Result, Training, prune, prune_weights

# Where each public name is; the methods' are in their registry. Loaded on first use, so that `vlprune --help` does not
# wait for torch.
_NAMES = {
    "anatomy": ("describe",),
    "apply_plan": ("apply",),
    "checkpoint": ("load_pruned", "save_pruned"),
    "data": ("Data", "load_data"),
    "methods": tuple(entry.class_name for entry in _methods.REGISTRY),
    "objectives": ("Contrastive", "LMLoss", "Objective", "Retrieval", "ZeroShot"),
    "plan": ("Module", "Plan", "Scores"),
    "replay": ("DropHead", "DropLayer", "DropNeurons", "PerturbWeight", "Replay"),
    "tokens": ("Pruning", "prune_tokens"),
    "training.distillation": ("distill",),
    "training.trainer": ("train",),
    "units.ablation": ("score",),
    "units.masking": ("masked",),
    "weights.semi_structured": ("to_semi_structured",),
    "workflow.compare": ("Comparison", "compare"),
    "workflow.cost": ("plan_cost",),
    "workflow.measure": ("evaluate", "measure"),
    "workflow.prune": ("Result", "Training", "prune", "prune_weights"),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}
_ROOMS = ("anatomy", "ops", "reference", "zoo")

__all__ = ["__version__", *_ROOMS, *_HOMES]


def __getattr__(name: str):
    if name in _ROOMS:
        value = importlib.import_module(f".{name}", __name__)
    elif name in _HOMES:
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
