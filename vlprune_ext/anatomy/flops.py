"""FLOP counting: two per multiply-add, in matrix products, convolutions and attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """Return the FLOPs of attention with queries [B, H, T, d]; masked entries count too, as in torch on a GPU."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[-2] * (width + value[-1])


# torch's counter has no formula for the CPU's attention kernel.
_ON_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


def count_flops(run: Callable[[], object]) -> int:
    """Return the FLOPs of one call of ``run``, by torch's FlopCounterMode; the same on a CPU and on a GPU."""
    with FlopCounterMode(display=False, custom_mapping=_ON_CPU) as counter:
        run()
    return counter.get_total_flops()
