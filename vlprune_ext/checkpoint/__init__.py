"""Saved models: the one writer and reader of a pruned model's folder, and loading a model by its name."""

from .load import load_pruned
from .models import Loaded, load_model
from .record import Record, applied_plan, load_record
from .save import save_pruned

__all__ = ["Loaded", "Record", "applied_plan", "load_model", "load_pruned", "load_record", "save_pruned"]
