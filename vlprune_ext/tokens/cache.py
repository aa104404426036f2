"""Key-value cache layers from which tokens have left."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class PrunedLayer(DynamicLayer):
    """A cache layer that holds fewer entries than the sequence has tokens, and counts as if it held all of them.

    So transformers prepares masks and positions for the whole sequence, and only the block itself sees what is left.
    """

    def __init__(self, tokens: int, left: int, valid: Tensor | None) -> None:
        super().__init__()
        self.tokens = tokens  # of the prefill
        self.left = left  # entries of them that the layer holds
        self.valid = valid  # [B, left] bool: entries that stand for a token; None: all do

    def get_seq_length(self) -> int:
        length = super().get_seq_length()
        return length + self.tokens - self.left if length else 0

    def reset(self) -> None:
        super().reset()
        self.keys = self.values = None  # transformers 5.17 leaves zeros
        self.is_initialized = False
        self.tokens, self.left, self.valid = 0, 0, None  # what comes next lacks nothing

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        if self.valid is not None:
            self.valid = self.valid.index_select(0, beam_idx.to(self.valid.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.valid is not None:
            self.valid = self.valid.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.valid is not None:
            self.valid = self.valid[indices]

    def count(self, batch: int, device: torch.device) -> Tensor:
        """[B]: tokens of the prefill that are left."""
        if self.valid is None:
            return torch.full((batch,), self.left, device=device)
        return self.valid.sum(1)


def check_cache(cache: Any, layers: list[int]) -> None:
    """Raise ValueError unless these layers of a cache grow with the sequence and forget nothing."""
    if not isinstance(cache, Cache):
        raise ValueError(f"past_key_values is a {type(cache).__name__}; expected a transformers DynamicCache")
    for layer in layers:
        kind: type | None = cache.layer_class_to_replicate
        if layer < len(cache.layers):
            kind = type(cache.layers[layer])
        if kind not in (DynamicLayer, PrunedLayer):
            name = getattr(kind, "__name__", kind)
            raise ValueError(
                f"past_key_values: layer {layer} is a {name}; token pruning needs a DynamicCache of full attention"
            )


def put_layer(cache: Cache, layer: int, pruned: PrunedLayer) -> None:
    """Let a pruned layer stand at its place, in a cache that may not have grown so far yet."""
    while len(cache.layers) <= layer:
        cache.layers.append(DynamicLayer())
    cache.layers[layer] = pruned
