"""The methods: one dataclass each, whose fields are its hyper-parameters and whose `plan` says what goes."""

from .ecoflap import ECoFLaP
from .magnitude import Magnitude
from .mope import MoPE
from .random import Random
from .taylor import Taylor

STRUCTURED = {"mope": MoPE, "magnitude": Magnitude, "random": Random, "taylor": Taylor}
METHODS = {**STRUCTURED, "ecoflap": ECoFLaP}

__all__ = ["METHODS", "STRUCTURED", "ECoFLaP", "Magnitude", "MoPE", "Random", "Taylor"]
