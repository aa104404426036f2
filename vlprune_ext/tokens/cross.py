"""Token pruning for cross-attention: later blocks of the reader attend to fewer visual tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..anatomy import Anatomy
from ..anatomy.patch import Patches
from . import attention
from .checks import check_runs_once, check_stages
from .features import FeatureTap
from .method import DropTokens, SummariseTokens, View, choose, share
from .pruning import Pruning


class CrossStream:
    """Drop visual tokens from the ``encoder_hidden_states`` that a stack of blocks cross-attends to, by hooks.

    Every sample has the same number P of visual tokens, class token included.

    Parameters
    ----------
    anatomy : Anatomy
        A model whose family's visual tokens have a ``reader``.
    method : DropTokens
    pruning : Pruning
        Records which tokens are kept.
    """

    def __init__(self, anatomy: Anatomy, method: DropTokens, pruning: Pruning) -> None:
        visual = anatomy.family.visual
        assert visual is not None
        self.method, self.pruning = method, pruning
        self.tower = anatomy.tower(visual.tower)
        pruning.tower, pruning.blocks = self.tower.name, len(self.tower)
        self.reader = anatomy.model.get_submodule(visual.reader)
        self.cls = anatomy.tower("vision").cls
        self.stages = check_stages(method, len(self.tower))
        self.tap = FeatureTap(anatomy, method) if isinstance(method, SummariseTokens) else None
        self.received: dict[int, Tensor] = {}
        self.states: Tensor | None = None  # [B, P', D], the kept states, for the blocks still to run
        self.index: Tensor | None = None  # [B, P'], their positions among the P
        self.count = 0  # P
        self.ids: Tensor | None = None
        self.asking: Tensor | None = None  # [B, T] fp32, query weights: 1 for text tokens, 0 for padding

    def install(self, patches: Patches) -> None:
        """Register the hooks; ``patches`` removes them when it exits."""
        patches.pre_hook(self.reader, self._begin, with_kwargs=True)
        if self.tap is not None:
            self.tap.install(patches)
        for layer, block in enumerate(self.tower.container):
            patches.pre_hook(block, self._enter_hook(layer), with_kwargs=True)
        if self.method.reads_attention:
            for layer in self.stages:
                site = self.tower.blocks[layer - 1].sites["cross_head"]
                attention.watch(patches, site, self._watcher(layer))

    def _begin(self, reader: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Read the visual tokens and the question of a batch from the reader's arguments."""
        self.received.clear()
        self.index = None
        check_runs_once(self.method.name, self.tower.container)
        states = kwargs.get("encoder_hidden_states")
        if states is None:
            raise ValueError("encoder_hidden_states is missing; expected the visual tokens to prune")
        ids, mask = args[0] if args else kwargs["input_ids"], kwargs.get("attention_mask")
        valid = torch.ones_like(ids) if mask is None else mask
        self.ids, self.asking = ids * valid, valid.float()
        if self.tap is not None:
            patches = self.tap.summarise(states[:, self.cls :])
            states = torch.cat([states[:, : self.cls], patches], 1)
            kwargs = {**kwargs, "encoder_hidden_states": states}
        self.states, self.count = states, states.shape[1]
        self.pruning.begin(self._visual(states))
        return args, kwargs

    def _visual(self, states: Tensor) -> Tensor:
        """Return the mask [B, P] of visual tokens: all but the class token."""
        return (torch.arange(states.shape[1], device=states.device) >= self.cls).expand(states.shape[:2])

    def _enter_hook(self, layer: int):
        """Return a pre-hook that drops tokens at a stage and passes the kept states to the block."""

        def enter(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            if layer in self.stages:
                self._drop(layer)
            if self.index is None:
                return None
            kwargs = dict(kwargs)
            kwargs["encoder_attention_mask"] = None  # the kept states have no padding
            return (args[0], self.states, *args[2:]), kwargs

        return enter

    def _drop(self, layer: int) -> None:
        """Drop visual tokens from the states that block ``layer`` and later ones cross-attend to."""
        assert self.states is not None
        patches = self.count - self.cls
        keep = share(self.stages[layer], patches) if self.tap is None else self.tap.count
        if keep == patches:
            return
        batch, tokens = self.states.shape[:2]
        visual = self._visual(self.states)
        summary = None
        if self.tap is not None:
            assert self.tap.kept is not None
            summary = nn.functional.pad(self.tap.kept, (self.cls, 0))
        score = self.method.score(
            View(
                layer=layer,
                states=self.states,
                visual=visual,
                count=torch.full((batch,), keep, device=self.states.device),
                received=self.received.pop(layer, None),
                ids=self.ids,
                summary=summary,
            )
        )
        index, _ = choose(score.float(), ~visual, [keep + self.cls] * batch)
        places = torch.arange(tokens, device=index.device)[None] if self.index is None else self.index
        self.states, self.index = ops.compact_tokens(index, [self.states, places])
        self.pruning.note(layer, self.index, torch.ones_like(self.index, dtype=torch.bool))

    def _watcher(self, layer: int):
        """Return a watcher that records for ``layer`` the attention that visual tokens receive from the question."""

        def look(query: Tensor, key: Tensor, scale: float) -> None:
            if self.asking is not None:
                self.received[layer] = attention.from_rows(query, key, scale, query_weight=self.asking).sum(1)

        return look
