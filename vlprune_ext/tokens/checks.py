"""Checks that a token method's block indices and a model's training settings allow token pruning."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from .method import DropTokens, EvictTokens


def check_stages(method: DropTokens, depth: int) -> dict[int, float]:
    """Return the stages of a method, block -> keep ratio.

    Parameters
    ----------
    method : DropTokens
        Its ``stages`` are checked.
    depth : int
        Number of blocks of the language model.

    Raises
    ------
    ValueError
        A block out of range; block 0 for a method that reads the attention of the block before.
    """
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
    """Return the first block whose KV cache is pruned.

    Parameters
    ----------
    method : EvictTokens
        Its ``starts`` is checked.
    depth : int
        Number of blocks of the language model.

    Raises
    ------
    ValueError
        A block out of range.
    """
    start = method.starts(depth)
    if not 0 <= start < depth:
        raise ValueError(
            f"{method.name}: skip is {start}; expected 0 <= skip < {depth}, the blocks of the language model"
        )
    return start


def check_runs_once(name: str, blocks: Iterable[nn.Module]) -> None:
    """Raise ValueError if gradient checkpointing would rerun blocks in the backward pass, where they would prune again.

    Parameters
    ----------
    name : str
        The method's name, for the message.
    blocks : iterable of nn.Module
        The tower's transformer blocks.
    """
    if torch.is_grad_enabled() and any(
        block.training and getattr(block, "gradient_checkpointing", False) for block in blocks
    ):
        raise ValueError(f"{name}: token pruning does not work with gradient checkpointing; disable it")
