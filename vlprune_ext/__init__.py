"""vlprune_ext: pruning vision-language models with C++ and CUDA kernels."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import ops, reference, zoo
    from .anatomy import describe
    from .checkpoint import load_pruned, save_pruned
    from .comp.training import train
    from .data import Data, load_data
    from .distillation import distill
    from .interventions import DropHead, DropLayer, DropNeurons, PerturbWeight
    from .methods import (
        PLPHP,
        CoMP,
        DivPrune,
        ECoFLaP,
        FastV,
        GlobalMagnitude,
        JointSequential,
        JointSimultaneous,
        LookM,
        Magnitude,
        MoPE,
        ParametersOnly,
        PyramidDrop,
        Random,
        RandomTokens,
        SparseGPT,
        Taylor,
        TokensOnly,
        ToMe,
        VisionZip,
        Wanda,
    )
    from .objectives import Contrastive, LMLoss, Objective, Retrieval, ZeroShot
    from .pipeline import Result, evaluate, measure, plan_cost, prune, prune_weights
    from .plan import Module, Plan, Scores
    from .replay import Replay
    from .scoring import score
    from .semi_structured import to_semi_structured
    from .surgery import apply, masked
    from .tokens import Pruning, prune_tokens

# Public name -> where it lives. Loaded on first use, so that `vlprune --help` does not wait for torch.
_HOMES = {
    "describe": "anatomy",
    "load_pruned": "checkpoint",
    "save_pruned": "checkpoint",
    "train": "comp.training",
    "Data": "data",
    "load_data": "data",
    "distill": "distillation",
    "DropHead": "interventions",
    "DropLayer": "interventions",
    "DropNeurons": "interventions",
    "PerturbWeight": "interventions",
    "PLPHP": "methods",
    "CoMP": "methods",
    "DivPrune": "methods",
    "ECoFLaP": "methods",
    "FastV": "methods",
    "GlobalMagnitude": "methods",
    "JointSequential": "methods",
    "JointSimultaneous": "methods",
    "LookM": "methods",
    "Magnitude": "methods",
    "MoPE": "methods",
    "ParametersOnly": "methods",
    "PyramidDrop": "methods",
    "Random": "methods",
    "RandomTokens": "methods",
    "SparseGPT": "methods",
    "Taylor": "methods",
    "ToMe": "methods",
    "TokensOnly": "methods",
    "VisionZip": "methods",
    "Wanda": "methods",
    "Contrastive": "objectives",
    "LMLoss": "objectives",
    "Objective": "objectives",
    "Retrieval": "objectives",
    "ZeroShot": "objectives",
    "Result": "pipeline",
    "evaluate": "pipeline",
    "measure": "pipeline",
    "plan_cost": "pipeline",
    "prune": "pipeline",
    "prune_weights": "pipeline",
    "Module": "plan",
    "Plan": "plan",
    "Scores": "plan",
    "Replay": "replay",
    "score": "scoring",
    "to_semi_structured": "semi_structured",
    "apply": "surgery",
    "masked": "surgery",
    "Pruning": "tokens",
    "prune_tokens": "tokens",
}
_ROOMS = ("ops", "reference", "zoo")

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
