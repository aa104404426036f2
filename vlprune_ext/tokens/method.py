"""Interfaces of token-pruning methods: where visual tokens are pruned, and a score for each of them.

By what they prune: `DropTokens`, the residual stream of the language model, or the states that its cross-attention
reads; `EvictTokens`, the KV cache after the prefill; `MergeTokens`, the vision tower, whose tokens are merged;
`PruneTowers`, any tower, by hooks of its own.
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
    """Inputs of `DropTokens.score`: the T tokens at a block's input, visual and others.

    Parameters
    ----------
    layer : int
        The block.
    states : Tensor [B, T, D]
        Hidden states that enter it.
    visual : Tensor [B, T], bool
        True for visual tokens.
    count : Tensor [B], int64
        How many visual tokens to keep.
    received : Tensor [B, T], fp32, optional
        Attention that each token receives in the block before; see `DropTokens.reads_attention`.
    ids : Tensor [B, T0], int64, optional
        Ids of the whole prompt before any drop; 0 at padding.
    summary : Tensor [B, T], fp32, optional
        1 for visual tokens kept by `SummariseTokens.summarise`.
    """

    layer: int
    states: Tensor
    visual: Tensor
    count: Tensor
    received: Tensor | None = None
    ids: Tensor | None = None
    summary: Tensor | None = None


@dataclass(frozen=True)
class Features:
    """Inputs of `SummariseTokens.summarise`: a vision tower's features of P patches of N images.

    Parameters
    ----------
    states : Tensor [N, P, D]
        Input of the projector to the language model.
    cls_attention : Tensor [N, P], fp32
        Attention weights of the class token, summed over heads.
    keys : Tensor [N, P, d], fp32
        Keys of the same attention, mean over heads.
    """

    states: Tensor
    cls_attention: Tensor
    keys: Tensor


@dataclass(frozen=True)
class CacheView:
    """Inputs of `EvictTokens.evict`: one block's KV cache after the prefill; H is the number of key-value heads.

    Parameters
    ----------
    layer : int
        The block.
    keys, values : Tensor [B, H, T, d]
        The cache entries.
    visual : Tensor [B, T], bool
        True for visual tokens.
    valid : Tensor [B, T], bool
        False for padding.
    counts : tuple of B (int, int)
        For each sample: visual tokens, all tokens.
    received : Tensor [B, H, T], fp32
        Attention that each key receives from the queries of `EvictTokens.rows`, summed over the heads of its group.
    """

    layer: int
    keys: Tensor
    values: Tensor
    visual: Tensor
    valid: Tensor
    counts: tuple[tuple[int, int], ...]
    received: Tensor

    def choose(self, score: Tensor, counts: list[int]) -> tuple[Tensor, Tensor | None]:
        """Return the ``counts[b]`` entries that each head keeps: text first, then by score.

        Parameters
        ----------
        score : Tensor [B, H, T], fp32
            The highest are kept.
        counts : list of B int
            Entries to keep of each sample, text included.

        Returns
        -------
        index : Tensor [B, H, K], int64
            Positions; K is the largest count.
        valid : Tensor [B, K], bool, or None
            False for padding of samples that keep fewer; None: there is none.
        """
        heads = self.keys.shape[1]

        def each(x: Tensor) -> Tensor:
            return x[:, None].expand(-1, heads, -1).flatten(0, 1)

        score = score.masked_fill(~self.valid[:, None], torch.nan).flatten(0, 1)
        text = each(self.valid & ~self.visual)
        index, counted = choose(score, text, [count for count in counts for _ in range(heads)])
        index = index.unflatten(0, (-1, heads))
        if counted is None:
            return index, None
        # Padding goes to the front, so that one mask [B, K] serves every head.
        counted = counted.unflatten(0, (-1, heads))
        order = counted.int().argsort(dim=2, stable=True)
        return index.gather(2, order), counted.gather(2, order)[:, 0]

    def at(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Gather keys and values [B, H, K, d] at positions [B, H, K]."""
        flat = [x.flatten(0, 1) for x in (self.keys, self.values)]
        keys, values = ops.compact_tokens(index.flatten(0, 1), flat)
        heads = self.keys.shape[1]
        return keys.unflatten(0, (-1, heads)), values.unflatten(0, (-1, heads))

    def kept(self, index: Tensor, counted: Tensor | None) -> Tensor:
        """Return the mask [B, H, T] bool of the entries that each head keeps.

        Parameters
        ----------
        index : Tensor [B, H, K], int64
            Positions.
        counted : Tensor [B, K], bool, or None
            False for padding among them; None: there is none.
        """
        stays = torch.ones_like(index) if counted is None else counted[:, None].expand_as(index).long()
        return (
            torch.zeros(self.received.shape, dtype=torch.int64, device=index.device).scatter_add_(2, index, stays) > 0
        )


@dataclass(frozen=True)
class Asking:
    """Inputs of `DropTokens.receive`: queries and keys of one decoder block during the prefill.

    Parameters
    ----------
    query : Tensor [B, H, T, d]
        Queries, after rotary embedding.
    key : Tensor [B, Hkv, T, d]
        Keys, likewise.
    scale : float
        Factor of the attention logits.
    layer : int
        The block.
    visual : Tensor [B, T], bool
        True for visual tokens.
    valid : Tensor [B, T], bool
        False for padding.
    row : Tensor [B], int64
        Index of the last instruction token.
    """

    query: Tensor
    key: Tensor
    scale: float
    layer: int
    visual: Tensor
    valid: Tensor
    row: Tensor

    @property
    def prompt(self) -> Tensor:
        """Mask [B, T] bool of valid tokens up to the last instruction token."""
        return self.valid & (torch.arange(self.key.shape[2], device=self.key.device) <= self.row[:, None])

    def from_row(self) -> Tensor:
        """Return the attention weights [B, Hkv, T] of the last instruction token, summed over grouped heads."""
        from .attention import from_rows

        asking = ops.compact_tokens(self.row[:, None], [self.query], [2])[0]
        return from_rows(asking, self.key, self.scale, self.prompt)


def share(keep: float, count: int) -> int:
    """Return a keep ratio as a number of tokens: rounded to the nearest, at least 1 unless ``count`` is 0."""
    return min(count, max(1, round(keep * count))) if count else 0


def choose(score: Tensor, protected: Tensor, counts: list[int]) -> tuple[Tensor, Tensor | None]:
    """Select the ``counts[b]`` tokens of highest score in each row, protected ones first.

    Parameters
    ----------
    score : Tensor [B, T], fp32
        NaN (padding) ranks below all others.
    protected : Tensor [B, T], bool
        True for tokens that rank above all others.
    counts : list of B int
        How many to keep in each row.

    Returns
    -------
    index : Tensor [B, K], int64
        Positions, ascending; K is the largest count.
    valid : Tensor [B, K], bool, or None
        False for padding of rows that keep fewer; None: there is none.
    """
    keep = max(counts)
    index = ops.select_tokens(score, keep, protected)
    if min(counts) == keep:
        return index, None
    worth = score.gather(1, index).nan_to_num(nan=-torch.inf).masked_fill(protected.gather(1, index), torch.inf)
    rank = worth.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return index, rank < torch.tensor(counts, device=rank.device)[:, None]


class TokenMethod:
    """Base of all token-pruning methods: frozen dataclasses whose fields are the hyper-parameters."""

    keep: float  # keep ratio, of what each method defines

    @property
    def name(self) -> str:
        """Class name, for messages."""
        return type(self).__name__


@dataclass(frozen=True)
class DropTokens(TokenMethod, ABC):
    """Drop visual tokens from the residual stream before some blocks; text tokens are always kept.

    Parameters
    ----------
    positions : {"keep", "renumber"}
        "keep": kept tokens retain their position ids. "renumber": they are numbered consecutively, from the first block
        behind a drop on.
    """

    positions: str = field(default="keep", kw_only=True)
    reads_attention: ClassVar[bool] = False  # fill `View.received`, from the attention of the block before

    @abstractmethod
    def stages(self, blocks: int) -> dict[int, float]:
        """Return block -> ratio of the input's visual tokens that enter it, of ``blocks`` blocks."""

    @abstractmethod
    def score(self, view: View) -> Tensor:
        """Return scores [B, T]: the visual tokens of highest score are kept; those of other tokens are ignored."""

    def stay(self, view: View) -> Tensor | None:
        """Return the mask [B, T] bool of visual tokens to keep; None: as many as `stages` says, by `score`."""
        return None

    def watches(self, layer: int) -> bool:
        """Return whether the stage at block ``layer`` reads the attention of the block before."""
        return self.reads_attention

    def receive(self, asking: Asking) -> Tensor:
        """Return `View.received` [B, T] fp32: here the last instruction token's attention, summed over all heads."""
        return asking.from_row().sum(1)


@dataclass(frozen=True)
class SummariseTokens(DropTokens, ABC):
    """Drop visual tokens by the vision tower's features, some of which may be merged, before the language model."""

    @abstractmethod
    def summarise(self, features: Features, count: int) -> tuple[Tensor, Tensor]:
        """Choose ``count`` tokens of each image before the projector.

        Parameters
        ----------
        features : Features
            Of P patches of N images.
        count : int
            Tokens to keep of each image.

        Returns
        -------
        kept : Tensor [N, P], bool
            True at the positions that are kept.
        states : Tensor [N, P, D]
            The projector's input, with merged features at kept positions.
        """


class PruneTowers(TokenMethod, ABC):
    """Prune tokens of any tower, visual or not, by the method's own hooks."""

    @abstractmethod
    def install(self, patches: Patches, anatomy: Anatomy, pruning: Pruning) -> None:
        """Register the method's hooks.

        Parameters
        ----------
        patches : Patches
            Owns the hooks; they are removed when it exits.
        anatomy : Anatomy
            The model.
        pruning : Pruning
            To record which tokens are kept.
        """


@dataclass(frozen=True)
class EvictTokens(TokenMethod, ABC):
    """Evict visual tokens from the KV cache after the prefill, for each key-value head separately."""

    rows: ClassVar[str] = "last"  # queries of `CacheView.received`: the "last" instruction token, or "all" tokens

    def starts(self, blocks: int) -> int:
        """Return the first block whose KV cache is pruned, of ``blocks`` blocks."""
        return 0

    @abstractmethod
    def evict(self, view: CacheView) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Choose the cache entries of one block that are kept, H key-value heads each for itself.

        Parameters
        ----------
        view : CacheView
            The block's cache after the prefill.

        Returns
        -------
        index : Tensor [B, H, K], int64
            Positions to keep.
        valid : Tensor [B, K], bool, or None
            False for padding of samples that keep fewer; None: there is none.
        keys, values : Tensor [B, H, K, d]
            The new entries, perhaps merged with evicted ones.
        """


@dataclass(frozen=True)
class MergeTokens(TokenMethod, ABC):
    """Merge visual tokens within the blocks of the vision tower, between attention and MLP."""

    @abstractmethod
    def schedule(self, tokens: int, blocks: int) -> list[int]:
        """Return how many of ``tokens`` patches each of ``blocks`` blocks merges away."""

    @abstractmethod
    def merge(self, states: Tensor, keys: Tensor, size: Tensor, merged: int, cls: int) -> tuple[Tensor, Tensor, Tensor]:
        """Merge ``merged`` tokens of one block into others.

        Parameters
        ----------
        states : Tensor [N, T, D]
            Residual stream after the block's attention.
        keys : Tensor [N, T, d], fp32
            The attention's keys, mean over heads.
        size : Tensor [N, T], fp32
            Number of patches merged into each token.
        merged : int
            How many tokens to merge away.
        cls : int
            Leading class tokens, which are never merged.

        Returns
        -------
        states : Tensor [N, T - merged, D]
        size : Tensor [N, T - merged], fp32
        index : Tensor [N, T - merged], int64
            Positions of the kept tokens.
        """
