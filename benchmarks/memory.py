"""Memory at its peak while something runs."""

from __future__ import annotations

import resource
from collections.abc import Callable

import torch


def peak_mb(run: Callable[[], object], device: str) -> float:
    """Beyond what was held before: of CUDA's allocator, or of this process, where nothing may have held more before."""
    if device == "cuda":
        run()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) / 1024
