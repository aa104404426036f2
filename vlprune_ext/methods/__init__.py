"""The methods: one dataclass each, whose fields are its hyper-parameters.

Those that prune parameters have a `plan` that says what goes; those that prune tokens say it while the model runs.
"""

from .baselines import GlobalMagnitude, SparseGPT, Wanda
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
METHODS = {**STRUCTURED, **LAYERWISE}

__all__ = [
    "LAYERWISE",
    "METHODS",
    "PLPHP",
    "STRUCTURED",
    "TOKENS",
    "DivPrune",
    "ECoFLaP",
    "FastV",
    "GlobalMagnitude",
    "LookM",
    "Magnitude",
    "MoPE",
    "PyramidDrop",
    "Random",
    "RandomTokens",
    "SparseGPT",
    "Taylor",
    "ToMe",
    "VisionZip",
    "Wanda",
]
