"""What a method of token pruning says: where visual tokens leave, and how much each of them is worth.

There are three kinds, by what they change. `DropTokens`: tokens leave the residual stream of the language model, or
what its cross-attention reads, at some blocks. `EvictTokens`: they leave the key-value cache after the prefill.
`MergeTokens`: they are merged within the vision tower.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .. import ops
from ..anatomy import Anatomy
from ..anatomy.patch import Patches
from .pruning import Pruning

POSITIONS = ("keep", "renumber")


@dataclass(frozen=True)
class View:
    """Tokens at the door of a block: T of them, visual ones and others."""

    layer: int
    states: Tensor  # [B, T, D] what enters the block
    visual: Tensor  # [B, T] bool
    count: Tensor  # [B] int64, how many visual tokens will stay
    received: Tensor | None = None  # [B, T] fp32, see DropTokens.reads_attention
    ids: Tensor | None = None  # [B, T0] int64, the ids of the whole batch, before anything left; 0 where padded
    summary: Tensor | None = None  # [B, T] fp32, see SummariseTokens


@dataclass(frozen=True)
class Features:
    """What a vision tower knows of its images: N of them, P patches each."""

    states: Tensor  # [N, P, D] what the language model is going to get
    cls_attention: Tensor  # [N, P] fp32, what the class token gives each patch, summed over heads
    keys: Tensor  # [N, P, d] fp32, of the same attention, their mean over heads


@dataclass(frozen=True)
class CacheView:
    """The key-value cache of one block after the prefill, and what the attention gave each key."""

    layer: int
    keys: Tensor  # [B, H, T, d], H key-value heads
    values: Tensor  # [B, H, T, d]
    visual: Tensor  # [B, T] bool
    valid: Tensor  # [B, T] bool, no padding
    counts: tuple[tuple[int, int], ...]  # for each sample: visual tokens, all tokens
    received: Tensor  # [B, H, T] fp32, by the query heads of each key head: from `EvictTokens.rows`

    def choose(self, score: Tensor, counts: list[int]) -> tuple[Tensor, Tensor | None]:
        """For each head, the ``counts[b]`` tokens that stay, text first: as `choose`, [B, H, K] and [B, K]."""
        heads = self.keys.shape[1]

        def each(x: Tensor) -> Tensor:
            return x[:, None].expand(-1, heads, -1).flatten(0, 1)

        score = score.masked_fill(~self.valid[:, None], torch.nan).flatten(0, 1)
        text = each(self.valid & ~self.visual)
        index, counted = choose(score, text, [count for count in counts for _ in range(heads)])
        index = index.unflatten(0, (-1, heads))
        if counted is None:
            return index, None
        # Fillers go to the front, so that the same entries count in every head.
        counted = counted.unflatten(0, (-1, heads))
        order = counted.int().argsort(dim=2, stable=True)
        return index.gather(2, order), counted.gather(2, order)[:, 0]

    def at(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, K, d] at positions [B, H, K]."""
        flat = [x.flatten(0, 1) for x in (self.keys, self.values)]
        keys, values = ops.compact_tokens(index.flatten(0, 1), flat)
        heads = self.keys.shape[1]
        return keys.unflatten(0, (-1, heads)), values.unflatten(0, (-1, heads))

    def kept(self, index: Tensor, counted: Tensor | None) -> Tensor:
        """[B, H, T] bool: which tokens each head keeps."""
        stays = torch.ones_like(index) if counted is None else counted[:, None].expand_as(index).long()
        return (
            torch.zeros(self.received.shape, dtype=torch.int64, device=index.device).scatter_add_(2, index, stays) > 0
        )


@dataclass(frozen=True)
class Asking:
    """The attention of a block of a decoder: who asks what."""

    query: Tensor  # [B, H, T, d]
    key: Tensor  # [B, Hkv, T, d]
    scale: float
    layer: int  # of the block
    visual: Tensor  # [B, T] bool
    valid: Tensor  # [B, T] bool
    row: Tensor  # [B] the last instruction token

    @property
    def prompt(self) -> Tensor:
        """[B, T] bool: what is up to the last instruction token."""
        return self.valid & (torch.arange(self.key.shape[2], device=self.key.device) <= self.row[:, None])

    def from_row(self) -> Tensor:
        """[B, Hkv, T]: the attention of the last instruction token, summed over the query heads of each key head."""
        from .attention import from_rows

        asking = ops.compact_tokens(self.row[:, None], [self.query], [2])[0]
        return from_rows(asking, self.key, self.scale, self.prompt)


def share(keep: float, count: int) -> int:
    """How many of ``count`` tokens a share is: rounded to the nearest, at least one of any."""
    return min(count, max(1, round(keep * count))) if count else 0


def choose(score: Tensor, protected: Tensor, counts: list[int]) -> tuple[Tensor, Tensor | None]:
    """The ``counts[b]`` tokens of highest score in each row [B, T], protected ones first.

    Returns positions [B, K], ascending, K the largest count, and which of them count [B, K] bool; None if all do. A
    score of NaN (padding) comes after all others.
    """
    keep = max(counts)
    index = ops.select_tokens(score, keep, protected)
    if min(counts) == keep:
        return index, None
    worth = score.gather(1, index).nan_to_num(nan=-torch.inf).masked_fill(protected.gather(1, index), torch.inf)
    rank = worth.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return index, rank < torch.tensor(counts, device=rank.device)[:, None]


class TokenMethod:
    """A method of token pruning: a frozen dataclass whose fields are its hyper-parameters."""

    keep: float  # the share that the method is told to keep, of what is its own business

    @property
    def name(self) -> str:
        return type(self).__name__


@dataclass(frozen=True)
class DropTokens(TokenMethod, ABC):
    """Visual tokens leave at the door of some blocks. Text always stays.

    positions    "keep"      tokens keep the position ids that they had (default)
                 "renumber"  those that are left are counted anew from the block on at which tokens left
    """

    positions: str = field(default="keep", kw_only=True)
    reads_attention: ClassVar[bool] = False  # `View.received`: from the last instruction token, in the block before

    @abstractmethod
    def stages(self, blocks: int) -> dict[int, float]:
        """Block -> share of the visual tokens of the input that enter it, for a language model of so many blocks."""

    @abstractmethod
    def score(self, view: View) -> Tensor:
        """[B, T]: the visual tokens of highest score stay. Values at other tokens do not matter."""

    def stay(self, view: View) -> Tensor | None:
        """[B, T] bool: the visual tokens that stay, where they are not so many as `stages` says; None: as many."""
        return None

    def watches(self, layer: int) -> bool:
        """Whether a stage looks at the attention of the block before."""
        return self.reads_attention

    def receive(self, asking: Asking) -> Tensor:
        """[B, T] fp32: `View.received`, here what all heads of the last instruction token give each key."""
        return asking.from_row().sum(1)


@dataclass(frozen=True)
class SummariseTokens(DropTokens, ABC):
    """`DropTokens` that looks at the vision tower's features before the language model reads them."""

    @abstractmethod
    def summarise(self, features: Features, count: int) -> tuple[Tensor, Tensor]:
        """``count`` tokens of each image, before they enter the language model: kept [N, P] bool and their states."""


class PruneTowers(TokenMethod, ABC):
    """Tokens of any tower leave behind its blocks, visual or not."""

    @abstractmethod
    def install(self, patches: Patches, anatomy: Anatomy, pruning: Pruning) -> None:
        """Put the hooks in place."""


@dataclass(frozen=True)
class EvictTokens(TokenMethod, ABC):
    """Visual tokens leave the key-value cache after the prefill, each head its own."""

    rows: ClassVar[str] = "last"  # whose attention counts: that of the "last" instruction token, or of "all" tokens

    def starts(self, blocks: int) -> int:
        """The first block whose cache shrinks."""
        return 0

    @abstractmethod
    def evict(self, view: CacheView) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Positions that stay [B, H, K], which of them count [B, K] (None: all), their keys and values [B, H, K, d]."""


@dataclass(frozen=True)
class MergeTokens(TokenMethod, ABC):
    """Visual tokens are merged within the blocks of the vision tower, between attention and MLP."""

    @abstractmethod
    def schedule(self, tokens: int, blocks: int) -> list[int]:
        """How many of ``tokens`` patches each block merges into others."""

    @abstractmethod
    def merge(self, states: Tensor, keys: Tensor, size: Tensor, merged: int, cls: int) -> tuple[Tensor, Tensor, Tensor]:
        """One block's step.

        states [N, T, D]; keys [N, T, d], mean over heads; size [N, T] patches in each token; merged: how many go; cls:
        class tokens in front, which stay apart. Returns states, sizes and the positions that stay [N, T - merged].
        """
