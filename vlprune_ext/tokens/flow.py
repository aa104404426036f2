"""Token masks on a model's towers: importance of each token, its weight as a key, and which tokens are pruned.

A token whose importance in a block is not above the threshold is pruned behind that block (CoMP, arXiv 2604.02956).
While a model trains, its mask is annealed from 1 to 0: the mask scales its attention weight as a key in all later
blocks, and at 0 the token is masked out. `planned.TokenRemoval` also drops such tokens from the sequence, so that later
blocks compute less.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy, Tower
from ..anatomy.patch import Patches
from .attention import log_sum_exp, weigh
from .checks import check_runs_once
from .decoder import last_instruction, placeholders, read_prompt, spread_over
from .importance import token_importance
from .method import share

HeadMasks = Callable[[str, int], Tensor | None]  # (tower, layer) -> [H] fp32; None: all ones


@dataclass(frozen=True)
class Threshold:
    """Token mask M^t of a tower, eq. (1) of CoMP: a threshold on importance, or a keep ratio for each block.

    Parameters
    ----------
    going : float
        Soft threshold: tokens of at most this importance get mask ``soft``.
    gone : float
        Hard threshold, at most ``going``: tokens of at most this importance get mask 0.
    soft : float
        Mask between both thresholds, annealed from 1 to 0 during training.
    keep : tuple of float, optional
        In place of thresholds: for each block, the ratio of the tower's prunable tokens that are kept behind it.
    """

    going: float = 0.0
    gone: float = 0.0
    soft: float = 0.0
    keep: tuple[float, ...] | None = None

    @property
    def active(self) -> bool:
        """Whether any token can be pruned."""
        return self.going > 0 or self.keep is not None

    def mask(
        self, importance: Tensor, free: Tensor, alive: Tensor, layer: int = 0, movable: Tensor | None = None
    ) -> Tensor:
        """Return the mask of each token behind a block.

        Parameters
        ----------
        importance : Tensor [B, T], fp32
            Token importance in the block.
        free : Tensor [B, T], bool
            True for prunable tokens; the others get mask 1.
        alive : Tensor [B, T], bool
            True for tokens not pruned so far. With thresholds, the most important of the prunable ones always gets 1.
        layer : int
            The block, an index into ``keep``.
        movable : Tensor [B], int64, optional
            How many tokens of each sample were prunable at the tower's input, which the ratios of ``keep`` refer to; by
            default those of ``free``.

        Returns
        -------
        Tensor [B, T], fp32
            In [0, 1].
        """
        there = free & alive
        worth = importance.masked_fill(~there, -torch.inf)
        if self.keep is not None:
            counts_of = (free.sum(1) if movable is None else movable).tolist()
            left = torch.tensor([share(self.keep[layer], n) for n in counts_of], device=free.device)
            stays = worth.argsort(dim=1, descending=True, stable=True).argsort(dim=1) < left[:, None]
            return (stays | ~free).float()
        counts = torch.ones_like(importance)
        if self.going > self.gone:
            counts.masked_fill_(worth <= self.going, self.soft)
        counts.masked_fill_(worth <= self.gone, 0.0)
        best = worth == worth.amax(1, keepdim=True)
        return counts.masked_fill(best | ~free, 1.0)


@dataclass(frozen=True)
class Tokens:
    """Tokens of one tower in one batch at a block's input; T of them are in the sequence.

    Parameters
    ----------
    valid : Tensor [B, T], bool
        False for padding and, in `planned.TokenRemoval`, for dropped tokens.
    free : Tensor [B, T], bool
        True for tokens that, if valid, are prunable: not the pooled one, nor the text of a prompt.
    asks : Tensor [B, T], bool
        True for tokens that, if valid, are the queries and keys of the attention by which importance is measured.
    whole : bool
        Whether there is no padding and every token is a query.
    mask : Tensor [B, T], fp32, optional
        Weight of each token as a key, 0 for padding; None until a token is pruned.
    index : Tensor [B, T], int64, optional
        Positions in the full sequence, once `planned.TokenRemoval` has dropped tokens.
    length : int
        Length of the full sequence.
    movable : Tensor [B], int64, optional
        How many of its tokens are prunable.
    entered : tuple of Tensor [B], int64
        How many tokens entered each block so far.
    """

    valid: Tensor
    free: Tensor
    asks: Tensor
    whole: bool = False
    mask: Tensor | None = None
    index: Tensor | None = None
    length: int = 0
    movable: Tensor | None = None
    entered: tuple[Tensor, ...] = ()

    @property
    def alive(self) -> Tensor:
        """Mask [B, T] bool of valid tokens that are not pruned."""
        return self.valid if self.mask is None else self.valid & (self.mask > 0)


def token_towers(anatomy: Anatomy) -> tuple[str, ...]:
    """Return the names of the towers whose tokens are prunable.

    A vision tower, if one row of its output is pooled or its patches become visual tokens one by one; a text tower, if
    one of its rows is pooled or it cross-attends to images; of a language model with visual tokens among its text, only
    those are prunable.
    """
    visual = anatomy.family.visual
    found = []
    for name, tower in anatomy.towers.items():
        if name == "vision":
            suits = tower.paths.pool == "first" or (visual is not None and bool(visual.reader or visual.projector))
        elif visual is not None:
            suits = name == visual.tower
        else:
            suits = name == "text" and tower.paths.pool in ("first", "eot", "last")
        if suits:
            found.append(name)
    return tuple(found)


def class_tokens(anatomy: Anatomy, tower: str) -> int:
    """Return how many class tokens lead a tower's sequence: those with weight w_0 in CoMP's eq. (4)."""
    visual = anatomy.family.visual
    bert = anatomy.tower(tower).paths.pool == "first" or (visual is not None and bool(visual.reader))
    return anatomy.tower("vision").cls if tower == "vision" else int(bert)


@dataclass
class TokenFlow:
    """Compute token importance in a model's towers and mask tokens by it, by hooks.

    Parameters
    ----------
    anatomy : Anatomy
    thresholds : dict of Threshold
        By tower; tokens of other towers are not pruned.
    head_masks : callable (tower, layer) -> Tensor [H], fp32, or None
        Head masks of eq. (7); None: all heads have weight 1.
    state : dict of Tokens
        By tower, of the running batch; replaced as a whole, never changed in place, so that replay can save and restore
        it.
    on_importance : callable (tower, layer, tokens, importance [B, T] fp32) -> None, optional
        Called with the importance in each block; without it, only what the thresholds need is computed.
    """

    anatomy: Anatomy
    thresholds: dict[str, Threshold] = field(default_factory=dict)
    head_masks: HeadMasks = lambda tower, layer: None
    state: dict[str, Tokens] = field(default_factory=dict)
    on_importance: Callable[[str, int, Tokens, Tensor], None] | None = None

    def __post_init__(self) -> None:
        self.towers = token_towers(self.anatomy)
        self._memory_of = memories(self.anatomy)
        self._found: dict[str, Tensor] = {}  # tower -> importance in the running block
        self._signature = inspect.signature(self.anatomy.model.forward)

    # --- hooks -------------------------------------------------------------------------------------------------------

    def install(self, patches: Patches) -> None:
        """Register the hooks; ``patches`` removes them when it exits."""
        patches.pre_hook(self.anatomy.model, self._begin, with_kwargs=True)
        for name, tower in self.anatomy.towers.items():
            owner = self.anatomy.model.get_submodule(tower.owner)
            patches.pre_hook(owner, self._begin_tower(tower), with_kwargs=True)
            for layer, block in enumerate(tower.blocks):
                patches.pre_hook(block.module, self._enter(tower, layer), with_kwargs=True)
                if name in self.towers:
                    weigh(patches, block.sites["head"], self._mask_of(name), self._look(tower, layer))
                    patches.hook(block.module, self._leave(tower, layer), prepend=True)
                if name in self._memory_of and "cross_head" in block.sites:
                    weigh(patches, block.sites["cross_head"], self._memory_mask(name))

    @contextmanager
    def hardened(self) -> Iterator[None]:
        """Set the soft mask of every threshold to 0 inside the ``with`` block: what is being annealed is pruned."""
        before = self.thresholds
        self.thresholds = {name: replace(t, soft=0.0) for name, t in before.items()}
        try:
            yield
        finally:
            self.thresholds = before

    def active(self, tower: str) -> bool:
        """Return whether a tower's tokens can be pruned."""
        return tower in self.thresholds and self.thresholds[tower].active

    def _memory_mask(self, reader: str) -> Callable[[], Tensor | None]:
        """Return a function that gives the mask of the tokens that a tower cross-attends to."""
        return self._mask_of(self._memory_of[reader])

    def _mask_of(self, tower: str) -> Callable[[], Tensor | None]:
        """Return a function that gives the current token mask of a tower."""

        def mask() -> Tensor | None:
            tokens = self.state.get(tower)
            return None if tokens is None else tokens.mask

        return mask

    def _set(self, tower: str, tokens: Tokens) -> None:
        """Replace the tokens of a tower, without changing the state dict in place."""
        self.state = {**self.state, tower: tokens}

    # --- a batch begins ----------------------------------------------------------------------------------------------

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Reset the state for a batch; of a language model, read the prompt's visual and query tokens."""
        given = self._signature.bind_partial(*args, **kwargs).arguments
        ahead = bool(given.get("mm_encoder_outputs"))  # `generate` encodes the images before it calls the model
        self.state = {name: tokens for name, tokens in self.state.items() if ahead and name == "vision"}
        visual = self.anatomy.family.visual
        if visual is None or visual.reader or visual.tower not in self.towers:
            return
        cache = given.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            raise ValueError("past_key_values: holds tokens already; expected a forward of the whole sequence")
        ids, seen, valid = read_prompt(given, placeholders(self.anatomy))
        row = last_instruction(valid, seen, given.get("labels"))
        asks = valid & (torch.arange(ids.shape[1], device=ids.device) <= row[:, None])
        self._set(visual.tower, Tokens(valid, seen, asks))

    def _begin_tower(self, tower: Tower):
        """Return a pre-hook of the tower's owner that reads a text tower's tokens from its ``input_ids``."""

        def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            check_runs_once("CoMP", tower.container)
            ids = kwargs.get("input_ids", args[0] if args else None)
            if tower.name == "vision":
                self.state = {name: tokens for name, tokens in self.state.items() if name != "vision"}
            elif isinstance(ids, Tensor) and not ids.is_floating_point():
                self._set(tower.name, _of_text(tower, ids, kwargs.get("attention_mask")))

        return begin

    def _enter(self, tower: Tower, layer: int):
        """Return a pre-hook that counts the tokens that enter a block."""

        def enter(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            tokens = self.state.get(tower.name)
            if layer == 0:
                tokens = self._first(tower, tokens, args[0] if args else kwargs["hidden_states"])
            assert tokens is not None
            counted = tokens.alive.sum(1)
            if layer >= tower.depth and self.active(tower.name):  # `TokenRemoval` skips blocks whose output is unread
                counted = torch.zeros_like(counted)
            self._set(tower.name, replace(tokens, entered=(*tokens.entered, counted)))

        return enter

    def _first(self, tower: Tower, tokens: Tokens | None, hidden: Tensor) -> Tokens:
        """Return the tokens at the first block's input, in a language model without patches pruned before."""
        batch, length = hidden.shape[:2]
        if tokens is None:
            valid = torch.ones(batch, length, dtype=torch.bool, device=hidden.device)
            cls = tower.cls if tower.name == "vision" else 0
            tokens = Tokens(valid, valid & (torch.arange(length, device=hidden.device) >= cls), valid, whole=True)
        tokens = replace(tokens, length=length, movable=tokens.free.sum(1))
        visual, patches = self.anatomy.family.visual, self.state.get("vision")
        if visual is None or visual.reader or tower.name != visual.tower or patches is None or patches.mask is None:
            return tokens
        # Patches pruned in the vision tower are masked in the language model.
        seen = spread_over(patches.mask[:, self.anatomy.tower("vision").cls :], tokens.free)
        return replace(tokens, mask=torch.where(tokens.free, seen, tokens.valid.float()))

    # --- a block -----------------------------------------------------------------------------------------------------

    def _look(self, tower: Tower, layer: int):
        """Return a watcher that computes token importance in a block."""
        causal = tower.causal
        # Prefix-LM and sliding-window masks are unknown to `importance_in`: their log-sum-exp runs over other keys.
        visual = self.anatomy.family.visual
        prefix = visual is not None and visual.prefix and tower.name == visual.tower
        known = not prefix and getattr(tower.config, "sliding_window", None) is None

        @torch.no_grad()
        def look(query: Tensor, key: Tensor, scale: float, lse: Tensor | None) -> None:
            leaves = self.active(tower.name) and _leaves_behind(tower, layer)
            if not leaves and self.on_importance is None:
                return
            tokens = self.state[tower.name]
            votes = self.head_masks(tower.name, layer)
            if votes is not None:
                votes = votes.repeat_interleave(query.shape[1] // len(votes))
            found = importance_in(query, key, scale, tokens, votes, causal, lse if known else None)
            if self.on_importance is not None:
                self.on_importance(tower.name, layer, tokens, found)
            if leaves:
                self._found[tower.name] = found

        return look

    def _leave(self, tower: Tower, layer: int):
        """Return a hook that updates the token mask behind a block."""

        def leave(block: nn.Module, args: tuple, output: Any) -> None:
            importance = self._found.pop(tower.name, None)
            if importance is None:
                return
            tokens = self.state[tower.name]
            counts = self.thresholds[tower.name].mask(importance, tokens.free, tokens.alive, layer, tokens.movable)
            before = tokens.valid.float() if tokens.mask is None else tokens.mask
            self._set(tower.name, replace(tokens, mask=counts * before))

        return leave


def importance_in(
    query: Tensor,
    key: Tensor,
    scale: float,
    tokens: Tokens,
    votes: Tensor | None,
    causal: bool,
    lse: Tensor | None = None,
) -> Tensor:
    """Return token importance in one block, from its attention with the current token masks as key weights.

    Parameters
    ----------
    query : Tensor [B, H, T, d], fp32/bf16/fp16
        Queries, after any rotary embedding.
    key : Tensor [B, Hkv, T, d], dtype of query
        Keys, likewise.
    scale : float
        Factor of the attention logits.
    tokens : Tokens
        At the block's input.
    votes : Tensor [H], fp32, or None
        Head masks of eq. (7).
    causal : bool
        Whether the attention is causal.
    lse : Tensor [B, H, T], fp32, optional
        Log-sum-exp of that attention, for the queries that importance sums over; computed if None.

    Returns
    -------
    Tensor [B, T], fp32
    """
    weights = None
    if not tokens.whole or tokens.mask is not None:
        weights = (tokens.valid.float() if tokens.mask is None else tokens.mask) * tokens.asks
    if lse is None:
        added = None
        if weights is not None:
            added = weights.log().to(query.dtype)[:, None, None].expand(-1, -1, query.shape[2], -1)
        copies = query.shape[1] // key.shape[1]
        lse = log_sum_exp(query, key.repeat_interleave(copies, 1) if copies > 1 else key, scale, causal, added)
    asks = None if weights is None else weights > 0
    return token_importance(
        query, key, lse, head_mask=votes, query_mask=asks, key_weight=weights, causal=causal, scale=scale
    )


def _of_text(tower: Tower, ids: Tensor, attention_mask: Tensor | None) -> Tokens:
    """Return the tokens of a text tower: all prunable but the one that is pooled."""
    whole = attention_mask is None or attention_mask.dim() != 2
    valid = torch.ones_like(ids, dtype=torch.bool) if whole else attention_mask.bool()  # type: ignore[union-attr]
    pooled = tower.rows_read({"input_ids": ids})
    pooled = 0 if pooled is None else pooled
    places = torch.arange(ids.shape[1], device=ids.device)
    free = valid & (places != (pooled % ids.shape[1] if isinstance(pooled, int) else pooled))
    return Tokens(valid, free, valid, whole=whole)


def _leaves_behind(tower: Tower, layer: int) -> bool:
    """Return whether anything reads a block's full output: not of the last block if one of its rows is pooled."""
    return layer < tower.depth - (tower.paths.pool is not None)


def memories(anatomy: Anatomy) -> dict[str, str]:
    """Return reader tower -> the tower that its cross-attention attends to, which is the one before it."""
    names = list(anatomy.towers)
    return {
        name: names[place - 1]
        for place, name in enumerate(names)
        if place and any("cross_head" in block.sites for block in anatomy.towers[name].blocks)
    }
