"""What a method cannot have of a model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from .method import DropTokens, EvictTokens


def check_stages(method: DropTokens, depth: int) -> dict[int, float]:
    """The stages of a method. Raises ValueError for a block that a model does not have."""
    stages = method.stages(depth)
    first = 1 if method.watches(0) else 0
    for layer in stages:
        if not first <= layer < depth:
            raise ValueError(
                f"{method.name}: layer {layer}, expected {first} <= layer < {depth}, the blocks of the language model"
                + (" (it reads the attention of the block before)" if first else "")
            )
    return stages


def check_start(method: EvictTokens, depth: int) -> int:
    """The first block whose cache shrinks. Raises ValueError for one that a model does not have."""
    start = method.starts(depth)
    if not 0 <= start < depth:
        raise ValueError(
            f"{method.name}: it skips {start} blocks; expected 0 <= skip < {depth}, those of the language model"
        )
    return start


def check_runs_once(name: str, blocks: Iterable[nn.Module]) -> None:
    """Raise ValueError if blocks are going to run again in the backward pass, where they would prune again."""
    if torch.is_grad_enabled() and any(
        block.training and getattr(block, "gradient_checkpointing", False) for block in blocks
    ):
        raise ValueError(f"{name}: token pruning does not work with gradient checkpointing; disable it")
