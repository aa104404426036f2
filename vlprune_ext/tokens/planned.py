"""Token pruning by a plan: the trained threshold or keep ratio of each tower, with pruned tokens dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..anatomy import Anatomy, Tower, describe
from ..anatomy.patch import Patches
from .decoder import DecoderStream, spread_over
from .flow import Threshold, TokenFlow, Tokens, importance_in
from .method import Asking, DropTokens, PruneTowers, View
from .pruning import Pruning


@dataclass(frozen=True)
class PlannedTokens(PruneTowers):
    """Prune tokens as `Plan.tokens` says.

    Parameters
    ----------
    towers : mapping
        Tower -> {"threshold": importance} or {"keep": [keep ratio behind each block]}.
    votes : mapping of (tower, layer) to Tensor [H], fp32
        Head masks of eq. (7) in CoMP (arXiv 2604.02956), for heads that are zeroed but not removed.
    """

    towers: Mapping[str, Mapping[str, Any]]
    votes: Mapping[tuple[str, int], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> PlannedTokens:
        """Return the method of the plans that were applied to a model; the latest one decides for each tower."""
        towers: dict[str, Mapping[str, Any]] = {}
        plans = (getattr(model, "vlprune", None) or {}).get("plans", [])
        for record in plans:
            towers |= record["plan"].get("tokens", {})
            for tower, gone in record["plan"]["layers"].items() if record["mode"] == "remove" else ():
                if "keep" in towers.get(tower, {}):
                    shares = enumerate(towers[tower]["keep"])
                    towers[tower] = {"keep": [share for layer, share in shares if layer not in gone]}
        votes: dict[tuple[str, int], Tensor] = {}
        if any(entry["kind"] in ("head", "layer") for record in plans for entry in record["zeroed"]):
            votes = _votes(describe(model), towers)
        return cls(towers, votes)

    def install(self, patches: Patches, anatomy: Anatomy, pruning: Pruning) -> None:
        if not self.towers:
            return
        thresholds = {name: _threshold(schedule) for name, schedule in self.towers.items()}
        visual = anatomy.family.visual
        decoder = visual.tower if visual is not None and not visual.reader else None
        removal = TokenRemoval(
            anatomy,
            {name: limit for name, limit in thresholds.items() if name != decoder},
            head_masks=lambda tower, layer: self.votes.get((tower, layer)),
            pruning=pruning,
        )
        unknown = [name for name in thresholds if name not in removal.towers and name != decoder]
        if unknown:
            raise ValueError(f"plan: tokens of {', '.join(unknown)}; {type(anatomy.model).__name__} cannot prune them")
        removal.install(patches)
        if decoder is not None:
            removal.pruning = None
            limit = thresholds.get(decoder, Threshold())
            DecoderStream(anatomy, ByImportance(limit, removal, self.votes), pruning).install(patches)


def _votes(anatomy: Anatomy, towers: Iterable[str]) -> dict[tuple[str, int], Tensor]:
    """Return head masks (tower, layer) -> [H] fp32: 0 for heads whose columns of the output projection are zero."""
    votes = {}
    for name in towers:
        for layer, block in enumerate(anatomy.tower(name).blocks):
            site = block.sites["head"]
            votes[name, layer] = site.out.weight.detach().unflatten(1, (-1, site.width)).ne(0).any(0).any(1).float()
    return votes


def _threshold(schedule: Mapping[str, Any]) -> Threshold:
    """Return the threshold of a plan's entry."""
    if "keep" in schedule:
        return Threshold(keep=tuple(schedule["keep"]))
    return Threshold(going=schedule["threshold"], gone=schedule["threshold"])


@dataclass
class TokenRemoval(TokenFlow):
    """Drop tokens that `TokenFlow` would mask, in towers other than a decoder with visual tokens.

    Samples that keep fewer tokens than others of their batch are padded with masked entries. Behind the last block a
    tower's tokens are scattered to their positions in the full sequence, 0 where dropped; a reader that cross-attends
    to all of them gets the kept ones only.

    Parameters
    ----------
    pruning : Pruning, optional
        Records which tokens are kept in the tower it names.
    """

    pruning: Pruning | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        visual = self.anatomy.family.visual
        if visual is not None and not visual.reader:
            self.towers = tuple(name for name in self.towers if name != visual.tower)
        self._read: dict[str, Tensor | None] = {}  # tower -> the mask of what its cross-attention reads

    def install(self, patches: Patches) -> None:
        for name, tower in self.anatomy.towers.items():
            if name in self.towers and self.active(name):
                for block in tower.blocks[tower.depth :]:  # nothing reads their output
                    patches.forward(block.module, _pass_by)
        super().install(patches)
        for name in self._memory_of:
            owner = self.anatomy.model.get_submodule(self.anatomy.tower(name).owner)
            patches.pre_hook(owner, self._compact_memory(name), with_kwargs=True)

    def patches_left(self) -> Tensor | None:
        """Return the mask [N, P] fp32 of patches kept by the vision tower, 1 for kept; None if nothing was dropped."""
        tokens = self.state.get("vision")
        if tokens is None or tokens.index is None:
            return None
        found = torch.zeros(tokens.index.shape[0], tokens.length, dtype=torch.float32, device=tokens.index.device)
        found.scatter_add_(1, tokens.index, tokens.valid.float())
        return found[:, self.anatomy.tower("vision").cls :].clamp(max=1)

    # --- what others read --------------------------------------------------------------------------------------------

    def _memory_mask(self, reader: str) -> Callable[[], Tensor | None]:
        return lambda: self._read.get(reader)

    def _compact_memory(self, tower: str):
        """Return a pre-hook that passes a reader only the kept states to cross-attend to."""

        def enter(owner: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            states, tokens = kwargs.get("encoder_hidden_states"), self.state.get(self._memory_of[tower])
            self._read[tower] = None
            if states is None or tokens is None or tokens.index is None:
                return None
            copies = states.shape[0] // tokens.index.shape[0]  # beams, or several answers
            index = tokens.index.repeat_interleave(copies, 0)
            self._read[tower] = None if tokens.mask is None else tokens.mask.repeat_interleave(copies, 0)
            states = ops.compact_tokens(index, [states])[0]
            return args, {**kwargs, "encoder_hidden_states": states, "encoder_attention_mask": None}

        return enter

    # --- a block -----------------------------------------------------------------------------------------------------

    def _enter(self, tower: Tower, layer: int):
        """Return a pre-hook that counts tokens and removes masks of the full sequence from the block's arguments."""
        count = super()._enter(tower, layer)

        def enter(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            if tower.name not in self.towers:
                return None
            count(block, args, kwargs)
            if layer == 0 and self.pruning is not None and self.active(tower.name):
                self.pruning.tower, self.pruning.blocks = tower.name, tower.depth
                self.pruning.begin(self.state[tower.name].free)
            if self.state[tower.name].index is None:
                return None
            # Padding and dropped tokens are masked by the key weights instead.
            args = tuple(None if isinstance(a, Tensor) and a.dim() == 4 else a for a in args)
            return args, {**kwargs, "attention_mask": None} if "attention_mask" in kwargs else kwargs

        return enter

    def _leave(self, tower: Tower, layer: int):
        """Return a hook that drops the tokens pruned in the block, and scatters back behind the last one."""
        leave = super()._leave(tower, layer)

        def take_out(block: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            before = self.state[tower.name].mask
            leave(block, args, output)
            tokens = self.state[tower.name]
            if tokens.mask is not before:
                tokens, picked = _taken_out(tokens)
                self._set(tower.name, tokens)
                pruning = self.pruning
                if pruning is not None and pruning.tower == tower.name and tokens.index is not None:
                    pruning.note(layer + 1, tokens.index, tokens.valid)
                output = output if picked is None else ops.compact_tokens(picked, [output])[0]
            if tokens.index is not None and layer == tower.depth - 1:
                return _whole(tokens, output)
            return output if tokens.index is not None else None

        return take_out


def _taken_out(tokens: Tokens) -> tuple[Tokens, Tensor | None]:
    """Return the unpruned tokens, padded to the longest sample, and their indices [B, K] in the block's output.

    The indices are None where one sample keeps all of its tokens, so that the sequence cannot shrink.
    """
    alive = tokens.alive
    counts = alive.sum(1).tolist()
    least, most, length = min(counts), max(counts), alive.shape[1]
    if least == length:
        return replace(tokens, whole=True, mask=None), None
    valid, free, asks, places, picked = alive, tokens.free, tokens.asks, tokens.index, None
    if places is None:
        places = torch.arange(tokens.length, device=alive.device).expand(alive.shape[0], -1).contiguous()
    if most < length:
        picked = ops.select_tokens(alive.float(), most)
        valid, free, asks, places = ops.compact_tokens(picked, [valid, free, asks, places])
    mask = None if least == most else valid.float()
    return replace(tokens, valid=valid, free=free, asks=asks, whole=mask is None, mask=mask, index=places), picked


def _whole(tokens: Tokens, output: Tensor) -> Tensor:
    """Scatter a block's output [B, K, D] to its positions in the full sequence [B, T, D]; 0 at dropped tokens."""
    assert tokens.index is not None
    place = tokens.index.masked_fill(~tokens.valid, tokens.length)  # padding goes to a row that is cut off
    full = output.new_zeros(output.shape[0], tokens.length + 1, output.shape[2])
    return full.scatter(1, place[..., None].expand_as(output), output)[:, : tokens.length]


def _pass_by(hidden_states: Tensor, *_: object, **__: object) -> Tensor:
    """Return the hidden states unchanged, in place of a block's forward."""
    return hidden_states


@dataclass(frozen=True)
class ByImportance(DropTokens):
    """Drop a decoder's visual tokens by eq. (7) of CoMP, after those dropped in the vision tower.

    Parameters
    ----------
    limit : Threshold
        Of the decoder.
    removal : TokenRemoval
        Of the other towers.
    votes : mapping of (tower, layer) to Tensor [H], fp32
        Head masks.
    """

    limit: Threshold
    removal: TokenRemoval
    votes: Mapping[tuple[str, int], Tensor]

    @property
    def name(self) -> str:
        return "PlannedTokens"

    def stages(self, blocks: int) -> dict[int, float]:
        first = {0: 1.0} if self.removal.active("vision") else {}
        return first | (dict.fromkeys(range(1, blocks), 1.0) if self.limit.active else {}) or {0: 1.0}

    def watches(self, layer: int) -> bool:
        return layer > 0

    def score(self, view: View) -> Tensor:
        return self.stay(view).float()

    def receive(self, asking: Asking) -> Tensor:
        visual = self.removal.anatomy.family.visual
        assert visual is not None
        tower = self.removal.anatomy.tower(visual.tower)
        votes = self.votes.get((tower.name, asking.layer))
        if votes is not None:
            votes = votes.to(asking.query.device).repeat_interleave(asking.query.shape[1] // len(votes))
        tokens = Tokens(asking.valid, asking.visual, asking.prompt)
        return importance_in(asking.query, asking.key, asking.scale, tokens, votes, tower.causal)

    def stay(self, view: View) -> Tensor:
        if view.layer == 0:
            left = self.removal.patches_left()
            return view.visual if left is None else spread_over(left, view.visual) > 0
        assert view.received is not None
        return self.limit.mask(view.received, view.visual, view.visual, view.layer - 1, view.count) > 0
