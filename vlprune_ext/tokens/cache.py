"""KV-cache layers from which tokens were evicted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class PrunedLayer(DynamicLayer):
    """KV-cache layer that holds fewer entries than the sequence has tokens, yet reports the full sequence length.

    So transformers prepares attention masks and positions for the full sequence; the block's hook narrows them to the
    entries held.

    Parameters
    ----------
    tokens : int
        Length T of the prefill.
    left : int
        Entries of the prefill that the layer holds, padding included.
    valid : Tensor [B, left], bool, or None
        True for entries that hold a token, False for padding of samples that keep fewer; None: all hold one.
    """

    def __init__(self, tokens: int, left: int, valid: Tensor | None) -> None:
        super().__init__()
        self.tokens = tokens
        self.left = left
        self.valid = valid

    def get_seq_length(self) -> int:
        length = super().get_seq_length()
        return length + self.tokens - self.left if length else 0

    def reset(self) -> None:
        super().reset()
        self.keys = self.values = None  # transformers 5.17 leaves zeros
        self.is_initialized = False
        self.tokens, self.left, self.valid = 0, 0, None  # a later sequence starts unpruned

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
        """Return how many prefill tokens each sample holds, [B] int64."""
        if self.valid is None:
            return torch.full((batch,), self.left, device=device)
        return self.valid.sum(1)


def check_cache(cache: Any, layers: list[int]) -> None:
    """Raise ValueError unless these layers of a cache are dynamic: they grow with the sequence and evict nothing.

    Parameters
    ----------
    cache : object
        A model's ``past_key_values``.
    layers : list of int
        Layer indices in the cache; a layer that does not exist yet is judged by the class the cache would create.

    Raises
    ------
    ValueError
        Not a transformers cache, or a static, sliding-window or otherwise different layer.
    """
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
    """Set one layer of a cache, padding the list with empty dynamic layers where it has not grown so far yet.

    Parameters
    ----------
    cache : transformers.Cache
        Changed in place.
    layer : int
        Index of the layer in the cache.
    pruned : PrunedLayer
        Takes the place of what the cache holds there.
    """
    while len(cache.layers) <= layer:
        cache.layers.append(DynamicLayer())
    cache.layers[layer] = pruned
