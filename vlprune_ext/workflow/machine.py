"""What runs here: versions, what was compiled, the processor, GPUs."""

from __future__ import annotations

import platform
from typing import Any

import torch
import transformers

from .. import zoo
from .._native import build_info
from .._version import __version__


def environment() -> dict[str, Any]:
    """Return versions, what was compiled and what it runs on, as plain data."""
    content: dict[str, Any] = {
        "vlprune_ext": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": machine(),
        "threads": torch.get_num_threads(),
    }
    content |= build_info()
    content["gpus"] = [
        f"{torch.cuda.get_device_name(i)}, sm_{''.join(map(str, torch.cuda.get_device_capability(i)))}"
        for i in range(torch.cuda.device_count())
    ]
    content["zoo"] = zoo.names()
    return content


def machine() -> str:
    """Return the processor's name."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        pass
    return name
