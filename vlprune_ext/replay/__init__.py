"""Replay: a model's objective under many ablations or weight perturbations, with shared computation."""

from .engine import Replay
from .interventions import DropHead, DropLayer, DropNeurons, Intervention, PerturbWeight, Removal, Within

__all__ = ["DropHead", "DropLayer", "DropNeurons", "Intervention", "PerturbWeight", "Removal", "Replay", "Within"]
