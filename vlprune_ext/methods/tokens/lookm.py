"""LOOK-M (arXiv 2406.18139): KV cache eviction of visual tokens, with evicted entries merged into kept ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import ops
from ...tokens import EvictTokens
from ...tokens.method import CacheView, share
from .checks import expect_share, expect_whole


@dataclass(frozen=True)
class LookM(EvictTokens):
    """Evict visual tokens of least accumulated attention from the KV cache, per head, and merge them into kept entries.

    Text entries are always kept. An evicted key and value are averaged into the kept entry whose key is nearest
    (cosine).

    Source: LOOK-M (arXiv 2406.18139).

    Parameters
    ----------
    keep : float
        Share of the visual tokens whose entries are kept, in (0, 1]. The paper gives a share of all tokens, and ranks
        every visual token below all text; as long as text fits, that is the same.
    merge : bool
        True: merge evicted entries. False: discard them.
    skip : int
        First blocks, whose cache is not pruned.
    """

    keep: float = 0.5
    merge: bool = True
    skip: int = 0
    rows: ClassVar[str] = "all"

    def __post_init__(self) -> None:
        expect_share("keep", self.keep)
        expect_whole("skip", self.skip)
        if not isinstance(self.merge, bool):
            raise ValueError(f"merge is {self.merge!r}; expected True or False")

    def starts(self, blocks: int) -> int:
        return self.skip

    def evict(self, view: CacheView) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        counts = [everything - visual + share(self.keep, visual) for visual, everything in view.counts]
        index, valid = view.choose(view.received, counts)
        if not self.merge:
            return index, valid, *view.at(index)
        kept = view.kept(index, valid)
        source = view.visual[:, None] & ~kept
        if valid is None:
            return index, valid, *self._merge(view.keys, view.values, kept, source, index)
        # Samples that keep different numbers are merged one by one: evicted entries that pad `index` must merge too.
        merged = []
        for sample, counted in enumerate(valid):
            here = slice(sample, sample + 1)
            of_sample = self._merge(
                view.keys[here], view.values[here], kept[here], source[here], index[here][..., counted]
            )
            merged.append([F.pad(x, (0, 0, index.shape[2] - x.shape[2], 0)) for x in of_sample])
        keys, values = (torch.cat(parts) for parts in zip(*merged, strict=True))
        return index, valid, keys, values

    @staticmethod
    def _merge(keys: Tensor, values: Tensor, kept: Tensor, source: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Average the ``source`` entries into the nearest ``kept`` ones; return keys and values at ``index``."""
        shape = (*keys.shape[:2], -1, keys.shape[3])
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        _, match = ops.match_tokens(keys, kept.flatten(0, 1), source=source.flatten(0, 1))
        (keys, values), _ = ops.merge_tokens(index.flatten(0, 1), match, [keys, values])
        return keys.view(shape), values.view(shape)
