"""Memory at its peak while something runs."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch


def _resident_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def peak_mb(run: Callable[[], object], device: str) -> float:
    """Beyond what was held before, in MB: of CUDA's allocator, or of this process."""
    if device == "cuda":
        run()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, so that it cannot be used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
    held = _resident_mb("VmRSS")
    run()
    return _resident_mb("VmHWM") - held
