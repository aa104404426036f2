"""FLOPs of what is run: two per multiply-add, in matrix products, convolutions and attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """Products with keys and values of [B, H, T, d] queries; masked ones count too, as torch has it on a GPU."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[-2] * (width + value[-1])


# torch's own counter leaves out what attention runs as on a CPU.
_ON_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


def count_flops(run: Callable[[], object]) -> int:
    """What one call of ``run`` takes, by torch's FlopCounterMode; the same on a CPU and on a GPU."""
    with FlopCounterMode(display=False, custom_mapping=_ON_CPU) as counter:
        run()
    return counter.get_total_flops()
