"""Tokens on their way through a model's towers: what each is worth, how much it counts, and which ones are gone.

A token that the attention of a block finds unimportant leaves behind that block. While a model trains, it only counts
less and less as a key of what comes after: its weight in the softmax goes from 1 to 0, and at 0 it is as if it were
not there. `TokenFlow` can also take such tokens out, so that later blocks compute less.
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

HeadMasks = Callable[[str, int], Tensor | None]  # (tower, layer) -> [H], or None: all heads vote


@dataclass(frozen=True)
class Threshold:
    """M^t of a tower, eq. (1): which tokens leave behind each block, by their importance.

    going  tokens up to this importance count ``soft`` times
    gone   tokens up to this one do not count; at most ``going``
    soft   from 1 down to 0
    keep   instead of thresholds: for each block, the share of the tower's own tokens that are left behind it
    """

    going: float = 0.0
    gone: float = 0.0
    soft: float = 0.0
    keep: tuple[float, ...] | None = None

    @property
    def active(self) -> bool:
        return self.going > 0 or self.keep is not None

    def mask(
        self, importance: Tensor, free: Tensor, alive: Tensor, layer: int = 0, movable: Tensor | None = None
    ) -> Tensor:
        """What each token counts behind a block, [B, T], by its importance [B, T].

        Tokens that are not ``free`` to leave count 1, and so does the best of the others that are ``alive``. Shares are
        of those that were ``movable`` at first, [B].
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
    """The tokens of one tower in one batch, at the door of a block.

    valid    [B, T] bool, no padding; nor one that left, where `TokenRemoval` takes them out
    free     [B, T] bool, if valid, may leave: not what is pooled, nor the text of a prompt
    asks     [B, T] bool, if valid, they and their attention to each other say what tokens are worth
    whole    nothing is padding, and all of them ask
    mask     [B, T] fp32, what they count as keys, 0 for padding; None while nothing has left
    index    [B, T] their places in the whole sequence, once `TokenRemoval` has found that some left
    length   of the whole sequence
    movable  [B] how many of it were free to leave
    entered  how many entered each block so far, [B] each
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
        """[B, T] bool."""
        return self.valid if self.mask is None else self.valid & (self.mask > 0)


def token_towers(anatomy: Anatomy) -> tuple[str, ...]:
    """The towers whose tokens can leave.

    A vision tower of whose output one row is pooled, or whose patches are read one by one; a text tower of which one
    row is pooled, or that reads images; a language model with visual tokens, which are those that leave.
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
    """How many class tokens are in front of a tower's tokens: those that w_0 of eq. (4) is for."""
    visual = anatomy.family.visual
    bert = anatomy.tower(tower).paths.pool == "first" or (visual is not None and bool(visual.reader))
    return anatomy.tower("vision").cls if tower == "vision" else int(bert)


@dataclass
class TokenFlow:
    """The hooks on a model's towers that watch tokens, and mask them or take them out.

    thresholds     tower -> `Threshold`; tokens of other towers stay
    head_masks     what heads have to say, eq. (7)
    state          tower -> `Tokens`, of the batch that runs; exchanged whole, so that it can be kept and put back
    on_importance  told of each block's importances as they are found: (tower, layer, tokens, [B, T]). None: only those
                   that thresholds need are computed
    """

    anatomy: Anatomy
    thresholds: dict[str, Threshold] = field(default_factory=dict)
    head_masks: HeadMasks = lambda tower, layer: None
    state: dict[str, Tokens] = field(default_factory=dict)
    on_importance: Callable[[str, int, Tokens, Tensor], None] | None = None

    def __post_init__(self) -> None:
        self.towers = token_towers(self.anatomy)
        self._memory_of = memories(self.anatomy)
        self._found: dict[str, Tensor] = {}  # importance behind the block that runs
        self._signature = inspect.signature(self.anatomy.model.forward)

    # --- hooks -------------------------------------------------------------------------------------------------------

    def install(self, patches: Patches) -> None:
        """Put the hooks in place, for as long as ``patches`` lives."""
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
        """What counts less does not count at all."""
        before = self.thresholds
        self.thresholds = {name: replace(t, soft=0.0) for name, t in before.items()}
        try:
            yield
        finally:
            self.thresholds = before

    def active(self, tower: str) -> bool:
        """Whether tokens of a tower leave."""
        return tower in self.thresholds and self.thresholds[tower].active

    def _memory_mask(self, reader: str) -> Callable[[], Tensor | None]:
        """What the tokens count that a tower's cross-attention reads."""
        return self._mask_of(self._memory_of[reader])

    def _mask_of(self, tower: str) -> Callable[[], Tensor | None]:
        def mask() -> Tensor | None:
            tokens = self.state.get(tower)
            return None if tokens is None else tokens.mask

        return mask

    def _set(self, tower: str, tokens: Tokens) -> None:
        self.state = {**self.state, tower: tokens}

    # --- a batch begins ----------------------------------------------------------------------------------------------

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = self._signature.bind_partial(*args, **kwargs).arguments
        ahead = bool(given.get("mm_encoder_outputs"))  # `generate` looks at the images before it calls the model
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
        """The owner of a tower is called: with ids, where these are its tokens."""

        def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            check_runs_once("CoMP", tower.container)
            ids = kwargs.get("input_ids", args[0] if args else None)
            if tower.name == "vision":
                self.state = {name: tokens for name, tokens in self.state.items() if name != "vision"}
            elif isinstance(ids, Tensor) and not ids.is_floating_point():
                self._set(tower.name, _of_text(tower, ids, kwargs.get("attention_mask")))

        return begin

    def _enter(self, tower: Tower, layer: int):
        def enter(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            tokens = self.state.get(tower.name)
            if layer == 0:
                tokens = self._first(tower, tokens, args[0] if args else kwargs["hidden_states"])
            assert tokens is not None
            counted = tokens.alive.sum(1)
            if layer >= tower.depth and self.active(tower.name):  # `TokenRemoval` passes blocks by that nothing reads
                counted = torch.zeros_like(counted)
            self._set(tower.name, replace(tokens, entered=(*tokens.entered, counted)))

        return enter

    def _first(self, tower: Tower, tokens: Tokens | None, hidden: Tensor) -> Tokens:
        """The tokens that enter the first block."""
        batch, length = hidden.shape[:2]
        if tokens is None:
            valid = torch.ones(batch, length, dtype=torch.bool, device=hidden.device)
            cls = tower.cls if tower.name == "vision" else 0
            tokens = Tokens(valid, valid & (torch.arange(length, device=hidden.device) >= cls), valid, whole=True)
        tokens = replace(tokens, length=length, movable=tokens.free.sum(1))
        visual, patches = self.anatomy.family.visual, self.state.get("vision")
        if visual is None or visual.reader or tower.name != visual.tower or patches is None or patches.mask is None:
            return tokens
        # A language model does not see what left in the vision tower.
        seen = spread_over(patches.mask[:, self.anatomy.tower("vision").cls :], tokens.free)
        return replace(tokens, mask=torch.where(tokens.free, seen, tokens.valid.float()))

    # --- a block -----------------------------------------------------------------------------------------------------

    def _look(self, tower: Tower, layer: int):
        causal = tower.causal
        # Masks that `importance_in` knows nothing of: prefixes, windows. Their log-sum-exp is of other keys.
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
    """[B, T]: what tokens are worth by one block's attention as it runs, where those that fade count less.

    lse  [B, H, T] of that attention, of queries that ask; None: to be computed
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
    """The tokens of a text tower: all may leave but the one that is pooled, or that stands for all others."""
    whole = attention_mask is None or attention_mask.dim() != 2
    valid = torch.ones_like(ids, dtype=torch.bool) if whole else attention_mask.bool()  # type: ignore[union-attr]
    pooled = tower.rows_read({"input_ids": ids})
    pooled = 0 if pooled is None else pooled
    places = torch.arange(ids.shape[1], device=ids.device)
    free = valid & (places != (pooled % ids.shape[1] if isinstance(pooled, int) else pooled))
    return Tokens(valid, free, valid, whole=whole)


def _leaves_behind(tower: Tower, layer: int) -> bool:
    """Whether anything runs on, or reads, the tokens that a block leaves: not where one row of the last is pooled."""
    return layer < tower.depth - (tower.paths.pool is not None)


def memories(anatomy: Anatomy) -> dict[str, str]:
    """Tower -> the tower that its cross-attention reads: the one before it."""
    names = list(anatomy.towers)
    return {
        name: names[place - 1]
        for place, name in enumerate(names)
        if place and any("cross_head" in block.sites for block in anatomy.towers[name].blocks)
    }
