"""The methods: one dataclass each, whose fields are its hyper-parameters and whose `plan` says what goes."""

from .baselines import GlobalMagnitude, SparseGPT, Wanda
from .ecoflap import ECoFLaP
from .magnitude import Magnitude
from .mope import MoPE
from .random import Random
from .taylor import Taylor

STRUCTURED = {"mope": MoPE, "magnitude": Magnitude, "random": Random, "taylor": Taylor}
LAYERWISE = {"ecoflap": ECoFLaP, "wanda": Wanda, "sparsegpt": SparseGPT, "globalmagnitude": GlobalMagnitude}
METHODS = {**STRUCTURED, **LAYERWISE}

__all__ = [
    "LAYERWISE",
    "METHODS",
    "STRUCTURED",
    "ECoFLaP",
    "GlobalMagnitude",
    "Magnitude",
    "MoPE",
    "Random",
    "SparseGPT",
    "Taylor",
    "Wanda",
]
