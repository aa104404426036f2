"""The methods: one dataclass each, whose fields are its hyper-parameters and whose `plan` says what goes."""

from .magnitude import Magnitude
from .mope import MoPE
from .random import Random
from .taylor import Taylor

METHODS = {"mope": MoPE, "magnitude": Magnitude, "random": Random, "taylor": Taylor}

__all__ = ["METHODS", "Magnitude", "MoPE", "Random", "Taylor"]
