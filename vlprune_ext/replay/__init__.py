"""Replay: a model's objective under many interventions, in few block runs."""

from .engine import Replay
from .interventions import DropHead, DropLayer, DropNeurons, Intervention, PerturbWeight, Removal, Within

__all__ = ["DropHead", "DropLayer", "DropNeurons", "Intervention", "PerturbWeight", "Removal", "Replay", "Within"]
