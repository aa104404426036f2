"""Image-text data as model inputs: ``load_data`` reads, ``Data`` is what everything else consumes."""

from .load import load_data
from .tensors import Classes, Data

__all__ = ["Classes", "Data", "load_data"]
