"""vlprune_ext: pruning vision-language models with C++ and CUDA kernels."""

__version__ = "0.1.0"

from . import ops, reference

__all__ = ["__version__", "ops", "reference"]
