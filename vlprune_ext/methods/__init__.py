"""Pruning methods, one dataclass each whose fields are its hyper-parameters, and the registry that names them.

Methods that prune parameters have a `plan`, which returns what is removed; methods that prune tokens act while the
model runs. A method is registered here, once: the names of `vlprune_ext`, the command line's help and the tables of the
docs are read from the registry. Importing this module imports no method.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .joint.comp import CoMP
    from .joint.joint_sequential import JointSequential
    from .joint.joint_simultaneous import JointSimultaneous
    from .joint.parameters_only import ParametersOnly
    from .joint.tokens_only import TokensOnly
    from .tokens.divprune import DivPrune
    from .tokens.fastv import FastV
    from .tokens.lookm import LookM
    from .tokens.plphp import PLPHP
    from .tokens.pyramiddrop import PyramidDrop
    from .tokens.random_tokens import RandomTokens
    from .tokens.tome import ToMe
    from .tokens.visionzip import VisionZip
    from .units.magnitude import Magnitude
    from .units.mope import MoPE
    from .units.random import Random
    from .units.taylor import Taylor
    from .weights.ecoflap import ECoFLaP
    from .weights.global_magnitude import GlobalMagnitude
    from .weights.sparsegpt import SparseGPT
    from .weights.wanda import Wanda


class Entry(NamedTuple):
    """One registered method: its name on the command line, class, module, summary and source."""

    name: str
    class_name: str
    module: str  # room.file
    summary: str
    source: str


REGISTRY = (
    Entry("mope", "MoPE", "units.mope", "what the objective loses without each unit, exact, by replay", "2403.07839"),
    Entry("magnitude", "Magnitude", "units.magnitude", "sums of |w|; looks at no data", "1608.08710"),
    Entry("random", "Random", "units.random", "random units", ""),
    Entry("taylor", "Taylor", "units.taylor", "gradient in a gate on each unit", "1905.10650"),
    Entry("ecoflap", "ECoFLaP", "weights.ecoflap", "layer-wise sparsities by global scores, then Wanda", "2310.02998"),
    Entry("wanda", "Wanda", "weights.wanda", "weight times activation, the same sparsity everywhere", "2306.11695"),
    Entry("sparsegpt", "SparseGPT", "weights.sparsegpt", "second-order, with compensation", "2301.00774"),
    Entry("globalmagnitude", "GlobalMagnitude", "weights.global_magnitude", "smallest |w| of the whole model", ""),
    Entry("comp", "CoMP", "joint.comp", "parameters and tokens, the mode that costs least in each stage", "2604.02956"),
    Entry(
        "parametersonly", "ParametersOnly", "joint.parameters_only", "CoMP's baseline: parameters alone", "2301.13741"
    ),
    Entry("tokensonly", "TokensOnly", "joint.tokens_only", "CoMP's baseline: tokens alone", "2403.02991"),
    Entry(
        "jointsequential", "JointSequential", "joint.joint_sequential", "CoMP's baseline: first one, then the other", ""
    ),
    Entry("jointsimultaneous", "JointSimultaneous", "joint.joint_simultaneous", "CoMP's baseline: both in turn", ""),
    Entry("fastv", "FastV", "tokens.fastv", "attention of the last row, behind one layer", "2403.06764"),
    Entry("pyramiddrop", "PyramidDrop", "tokens.pyramiddrop", "attention of the instruction, in stages", "2410.17247"),
    Entry("visionzip", "VisionZip", "tokens.visionzip", "attention of the class token; the rest merged", "2412.04467"),
    Entry("tome", "ToMe", "tokens.tome", "similar tokens merged in the vision tower", "2210.09461"),
    Entry("divprune", "DivPrune", "tokens.divprune", "the most diverse tokens", "2503.02175"),
    Entry("plphp", "PLPHP", "tokens.plphp", "a share of each layer's and head's KV cache", "2502.14504"),
    Entry("lookm", "LookM", "tokens.lookm", "the KV cache, evicted entries merged into kept ones", "2406.18139"),
    Entry("random", "RandomTokens", "tokens.random_tokens", "random tokens: the baseline that must be beaten", ""),
)


class Methods(Mapping[str, Any]):
    """Map the command-line names of some rooms' methods to their classes, which are imported on access.

    Parameters
    ----------
    *rooms : str
        Subpackages of `methods`: "units", "weights", "joint", "tokens".
    """

    def __init__(self, *rooms: str) -> None:
        self.entries = {entry.name: entry for entry in REGISTRY if entry.module.split(".")[0] in rooms}

    def __getitem__(self, name: str) -> Any:
        return _load(self.entries[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        return f"<methods {', '.join(self)}>"


def _load(entry: Entry) -> Any:
    """Import an entry's module and return its class."""
    return getattr(importlib.import_module(f".{entry.module}", __name__), entry.class_name)


UNITS, WEIGHTS, JOINT, TOKENS = Methods("units"), Methods("weights"), Methods("joint"), Methods("tokens")
METHODS = Methods("units", "weights", "joint")  # those that make a plan

_TITLES = {entry.class_name: entry for entry in REGISTRY}


def title(name: str) -> str:
    """Return the class name of a method that makes a plan, "MoPE" for "mope"; another name unchanged."""
    return METHODS.entries[name].class_name if name in METHODS.entries else name


def __getattr__(name: str) -> Any:
    if name not in _TITLES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _load(_TITLES[name])


def __dir__() -> list[str]:
    return sorted([*globals(), *_TITLES])
