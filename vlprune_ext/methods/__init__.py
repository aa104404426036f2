"""The methods: one dataclass each, whose fields are its hyper-parameters.

Those that prune parameters have a `plan` that says what goes; those that prune tokens say it while the model runs.
"""

from .baselines import GlobalMagnitude, SparseGPT, Wanda
from .comp import CoMP
from .comp_baselines import JointSequential, JointSimultaneous, ParametersOnly, TokensOnly
from .divprune import DivPrune
from .ecoflap import ECoFLaP
from .fastv import FastV
from .lookm import LookM
from .magnitude import Magnitude
from .mope import MoPE
from .plphp import PLPHP
from .pyramiddrop import PyramidDrop
from .random import Random
from .random_tokens import RandomTokens
from .taylor import Taylor
from .tome import ToMe
from .visionzip import VisionZip

STRUCTURED = {"mope": MoPE, "magnitude": Magnitude, "random": Random, "taylor": Taylor}
LAYERWISE = {"ecoflap": ECoFLaP, "wanda": Wanda, "sparsegpt": SparseGPT, "globalmagnitude": GlobalMagnitude}
COLLABORATIVE = {
    "comp": CoMP,
    "parametersonly": ParametersOnly,
    "tokensonly": TokensOnly,
    "jointsequential": JointSequential,
    "jointsimultaneous": JointSimultaneous,
}
TOKENS = {
    "fastv": FastV,
    "pyramiddrop": PyramidDrop,
    "visionzip": VisionZip,
    "tome": ToMe,
    "divprune": DivPrune,
    "plphp": PLPHP,
    "lookm": LookM,
    "random": RandomTokens,
}
METHODS = {**STRUCTURED, **LAYERWISE, **COLLABORATIVE}

__all__ = [
    "COLLABORATIVE",
    "LAYERWISE",
    "METHODS",
    "PLPHP",
    "STRUCTURED",
    "TOKENS",
    "CoMP",
    "DivPrune",
    "ECoFLaP",
    "FastV",
    "GlobalMagnitude",
    "JointSequential",
    "JointSimultaneous",
    "LookM",
    "Magnitude",
    "MoPE",
    "ParametersOnly",
    "PyramidDrop",
    "Random",
    "RandomTokens",
    "SparseGPT",
    "Taylor",
    "ToMe",
    "TokensOnly",
    "VisionZip",
    "Wanda",
]
