"""Token pruning in a decoder: visual tokens are dropped from the residual stream, or evicted from the KV cache.

Transformers still sees the full sequence: it prepares masks and positions for all of it, and the last block's output is
scattered back over it. A dropped token takes the state of the last token kept before it, whose logits predict the next
kept token. So labels, losses and `generate` need no change; only the blocks behind a drop compute less.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..anatomy import IGNORED, Anatomy
from ..anatomy.patch import Patches
from . import attention, masks
from .cache import PrunedLayer, check_cache, put_layer
from .checks import check_runs_once, check_stages, check_start
from .method import Asking, CacheView, DropTokens, EvictTokens, View, choose, share
from .pruning import Pruning


@dataclass(frozen=True)
class Prompt:
    """Batch of sequences during its prefill; T' is the number of tokens not dropped so far.

    Parameters
    ----------
    tokens : int
        T, the length of the full sequence.
    ids : Tensor [B, T], int64
        Token ids; 0 at padding.
    texts : list of B int
        Tokens of each sample that are neither visual nor padding.
    images : list of B int
        Visual tokens of each sample in the input.
    visual : Tensor [B, T'], bool
        True for visual tokens.
    valid : Tensor [B, T'], bool
        False for padding, of the input or of samples that keep fewer tokens.
    row : Tensor [B], int64
        Index of the last instruction token among the T'.
    prefix : list of B int
        Leading tokens of each sample that attend to each other bidirectionally.
    spans : list of B (start, stop)
        The positions of each sample's tokens between its padding.
    index : Tensor [B, T'], int64, optional
        Positions of the kept tokens in the full sequence; None: nothing was dropped.
    padded : bool
        Whether samples keep different numbers of tokens, so that some entries are padding.
    """

    tokens: int
    ids: Tensor
    texts: list[int]
    images: list[int]
    visual: Tensor
    valid: Tensor
    row: Tensor
    prefix: list[int]
    spans: list[tuple[int, int]]
    index: Tensor | None = None
    padded: bool = False


class DecoderStream:
    """Drop visual tokens between a decoder's blocks, or evict them from its KV cache, by hooks.

    Parameters
    ----------
    anatomy : Anatomy
        A model whose visual tokens are among a decoder's text.
    method : DropTokens or EvictTokens
    pruning : Pruning
        Records which tokens are kept.
    """

    def __init__(self, anatomy: Anatomy, method: DropTokens | EvictTokens, pruning: Pruning) -> None:
        visual = anatomy.family.visual
        assert visual is not None
        self.anatomy, self.method, self.pruning = anatomy, method, pruning
        self.paths = visual
        self.tower = anatomy.tower(visual.tower)
        pruning.tower, pruning.blocks = self.tower.name, len(self.tower)
        self.sites = [block.sites["head"] for block in self.tower.blocks]
        self.layer_of = [site.attention.layer_idx for site in self.sites]
        depth = len(self.tower)
        if isinstance(method, DropTokens):
            self.stages = check_stages(method, depth)
            self.first = min(self.stages)
        else:
            self.stages = {}
            self.first = check_start(method, depth)
        self.placeholders = placeholders(anatomy)
        self.signature = inspect.signature(anatomy.model.forward)
        self.prompt: Prompt | None = None
        self.received: dict[int, Tensor] = {}
        self.summary: Tensor | None = None  # [N, P] fp32, 1 for kept patches, where the method summarises features
        self._embeddings: tuple[Tensor, Tensor] | None = None
        self._mask: Tensor | None = None

    def install(self, patches: Patches) -> None:
        """Register the hooks; ``patches`` removes them when it exits."""
        patches.pre_hook(self.anatomy.model, self._begin, with_kwargs=True)
        blocks = list(self.tower.container)
        for layer in range(self.first, len(blocks)):
            # A patched forward: hooks on every block would dominate the overhead of a decode step.
            patches.forward(blocks[layer], self._entering(layer, blocks[layer].forward))
        if isinstance(self.method, EvictTokens):
            for layer in range(self.first, len(blocks)):
                attention.watch(patches, self.sites[layer], self._watcher(layer))
                patches.hook(blocks[layer], self._evict_hook(layer), with_kwargs=True)
            return
        for layer in self.stages:
            if self.method.watches(layer):
                attention.watch(patches, self.sites[layer - 1], self._watcher(layer))
        patches.hook(blocks[-1], self._leave, prepend=True)

    # --- full sequence -----------------------------------------------------------------------------------------------

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Read the prompt of a prefill; clear it in a decode step."""
        self.prompt, self._embeddings, self._mask = None, None, None
        self.received.clear()
        check_runs_once(self.method.name, self.tower.container)
        given = self.signature.bind_partial(*args, **kwargs).arguments
        cache = given.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            if given.get("pixel_values") is not None or given.get("mm_encoder_outputs"):
                raise ValueError("pixel_values: images after the first forward of a sequence are not pruned")
            return
        if cache is not None:
            check_cache(cache, self.layer_of[self.first :])
        ids, visual, valid = read_prompt(given, self.placeholders)
        types = given.get("token_type_ids") if self.paths.prefix else None
        both = torch.zeros_like(valid) if types is None else (types == 0) & valid
        places = torch.arange(ids.shape[1], device=ids.device)
        start, stop = valid.int().argmax(1), (places * valid).amax(1) + 1
        # A host-device synchronisation, once per prefill.
        images, lengths, prefix, starts, stops = torch.stack(
            [visual.sum(1), valid.sum(1), both.sum(1), start, stop]
        ).tolist()
        if not any(images):
            raise ValueError(f"input_ids: no visual token (id {self.placeholders}) in a batch of {len(ids)}")
        self.prompt = Prompt(
            tokens=ids.shape[1],
            ids=ids * valid,
            texts=[length - image for length, image in zip(lengths, images, strict=True)],
            images=images,
            visual=visual,
            valid=valid,
            row=last_instruction(valid, visual, given.get("labels")),
            prefix=prefix,
            spans=list(zip(starts, stops, strict=True)),
        )
        self.pruning.begin(visual)

    # --- one block ---------------------------------------------------------------------------------------------------

    def _entering(self, layer: int, forward: Callable) -> Callable:
        """Return the forward of a block that narrows its inputs to the kept tokens."""

        def run(*args: Any, **kwargs: Any) -> Any:
            changed = (self._decode if self.prompt is None else self._prefill)(layer, args, kwargs)
            if changed is not None:
                args, kwargs = changed
            return forward(*args, **kwargs)

        return run

    def _prefill(self, layer: int, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Return the block's arguments for the kept tokens, after its own drop; None if nothing was dropped."""
        assert self.prompt is not None
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if layer in self.stages:
            hidden = self._drop(layer, hidden, kwargs)
        prompt = self.prompt
        if prompt.index is None:
            return None
        kwargs["attention_mask"], kwargs["position_embeddings"] = self._mask, self._embeddings
        kwargs["position_ids"] = None  # with gaps they would be taken for packed sequences
        cache = kwargs.get("past_key_values")
        if cache is not None:
            check_cache(cache, [self.layer_of[layer]])
            valid = prompt.valid if prompt.padded else None
            put_layer(cache, self.layer_of[layer], PrunedLayer(prompt.tokens, prompt.index.shape[1], valid))
        return (hidden, *args[1:]), kwargs

    def _drop(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Return the hidden states [B, K, D] of the tokens that a stage keeps; record their positions and mask."""
        prompt, method = self.prompt, self.method
        assert prompt is not None
        assert isinstance(method, DropTokens)
        if self.summary is None:
            kept = [share(self.stages[layer], count) for count in prompt.images]
        else:
            patches, stay = self.summary.shape[1], int(self.summary[0].sum())  # the same number in every image
            kept = [count // patches * stay for count in prompt.images]
        if kept == prompt.images and type(method).stay is DropTokens.stay:
            return hidden
        view = View(
            layer=layer,
            states=hidden,
            visual=prompt.visual,
            count=torch.tensor(kept, device=hidden.device),
            received=self.received.pop(layer, None),
            ids=prompt.ids,
            summary=None if self.summary is None else spread_over(self.summary, prompt.visual),
        )
        text = prompt.valid & ~prompt.visual
        stays = method.stay(view)
        if stays is not None:
            kept, seen = torch.stack([(stays & prompt.visual).sum(1), prompt.visual.sum(1)]).tolist()
            if kept == seen:
                return hidden
        score = (method.score(view) if stays is None else stays).float().masked_fill(~prompt.valid, torch.nan)
        counts = [of_text + of_image for of_text, of_image in zip(prompt.texts, kept, strict=True)]
        index, valid = choose(score, text, counts)
        given, embeddings = self._mask, self._embeddings
        if prompt.index is None:
            given, embeddings = kwargs.get("attention_mask"), kwargs["position_embeddings"]
        assert embeddings is not None
        places = torch.arange(prompt.tokens, device=hidden.device)[None] if prompt.index is None else prompt.index
        hidden, cos, sin, places, visual, still_valid = ops.compact_tokens(
            index, [hidden, *embeddings, places, prompt.visual, prompt.valid]
        )
        if valid is not None:
            visual, still_valid = visual & valid, valid
        self.prompt = replace(
            prompt,
            visual=visual,
            valid=still_valid,
            # The instruction token may be visual and dropped itself: then the last one kept before it.
            row=(
                torch.arange(index.shape[1], device=index.device) * ((index <= prompt.row[:, None]) & still_valid)
            ).amax(1),
            index=places,
            padded=valid is not None,
        )
        flash = "flash" in self.tower.config._attn_implementation
        self._mask = masks.shrink(given, index, valid, flash)
        self._embeddings = (cos, sin)
        if method.positions == "renumber":
            self._embeddings = self._rotary(hidden, (still_valid.cumsum(1) - 1).clamp(min=0))
        self.pruning.note(layer, places, still_valid)
        return hidden

    def _rotary(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin of the rotary embedding at new position ids [B, T]."""
        owner = self.tower.prefix.rpartition(".")[0]
        rotary: Any = self.anatomy.model.get_submodule(owner).rotary_emb
        return rotary(hidden, position_ids)

    def _leave(self, block: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Scatter the last block's output [B, K, D] over the full sequence [B, T, D]."""
        prompt = self.prompt
        if prompt is None or prompt.index is None:
            return None
        # [B, T] inclusive count of kept tokens; padding entries add 0.
        kept = prompt.valid.new_zeros(prompt.index.shape[0], prompt.tokens, dtype=torch.int64)
        kept.scatter_add_(1, prompt.index, prompt.valid.long())
        order = prompt.valid.int().argsort(dim=1, descending=True, stable=True)
        back = order.gather(1, (kept.cumsum(1) - 1).clamp(min=0))
        return ops.compact_tokens(back, [output])[0]

    # --- decode steps ------------------------------------------------------------------------------------------------

    def _decode(self, layer: int, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Return the block's arguments in a decode step, for its pruned cache; None if the cache is unpruned."""
        cache = kwargs.get("past_key_values")
        if cache is None or self.layer_of[layer] >= len(cache.layers):
            return None
        pruned = cache.layers[self.layer_of[layer]]
        if not isinstance(pruned, PrunedLayer):
            return None
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        flash = "flash" in self.tower.config._attn_implementation
        assert pruned.keys is not None
        held = pruned.keys.shape[-2]
        kwargs["attention_mask"] = masks.extend(
            kwargs.get("attention_mask"), pruned.tokens, pruned.valid, held, pruned.left, hidden, flash
        )
        if isinstance(self.method, DropTokens) and self.method.positions == "renumber":
            start = pruned.count(hidden.shape[0], hidden.device) + held - pruned.left
            kwargs["position_embeddings"] = self._rotary(
                hidden, start[:, None] + torch.arange(hidden.shape[1], device=hidden.device)
            )
        kwargs["position_ids"] = None
        return args, kwargs

    # --- attention and cache -----------------------------------------------------------------------------------------

    def _watcher(self, layer: int):
        """Return a watcher that records for ``layer`` the attention its keys, or the previous block's, receive."""

        def look(query: Tensor, key: Tensor, scale: float) -> None:
            prompt = self.prompt
            if prompt is None:
                return
            if isinstance(self.method, EvictTokens) and self.method.rows == "all":
                self.received[layer] = attention.from_all(query, key, scale, prompt.spans, prompt.prefix)
                return
            block = layer if isinstance(self.method, EvictTokens) else layer - 1
            asking = Asking(query, key, scale, block, prompt.visual, prompt.valid, prompt.row)
            if isinstance(self.method, EvictTokens):
                self.received[layer] = asking.from_row()
            else:
                self.received[layer] = self.method.receive(asking)

        return look

    def _evict_hook(self, layer: int):
        """Return a hook that replaces the block's KV-cache layer by a pruned one after the prefill."""

        def evict(block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
            prompt, method = self.prompt, self.method
            cache = kwargs.get("past_key_values")
            received = self.received.pop(layer, None)
            if prompt is None or cache is None or received is None:
                return
            assert isinstance(method, EvictTokens)
            check_cache(cache, [self.layer_of[layer]])
            full = cache.layers[self.layer_of[layer]]
            view = CacheView(
                layer=layer,
                keys=full.keys,
                values=full.values,
                visual=prompt.visual,
                valid=prompt.valid,
                counts=tuple((image, image + text) for image, text in zip(prompt.images, prompt.texts, strict=True)),
                received=received,
            )
            index, valid, keys, values = method.evict(view)
            pruned = PrunedLayer(prompt.tokens, index.shape[2], valid)
            pruned.lazy_initialization(keys, values)
            pruned.keys, pruned.values = keys, values
            put_layer(cache, self.layer_of[layer], pruned)
            self.pruning.note_cache(layer, index, valid)

        return evict


def placeholders(anatomy: Anatomy) -> list[int]:
    """Return the token ids of the placeholders that visual tokens replace in ``input_ids``."""
    visual = anatomy.family.visual
    assert visual is not None
    found = (getattr(anatomy.model.config, name, None) for name in visual.placeholders)
    return [token for token in found if token is not None]


def read_prompt(given: Mapping[str, Any], placeholders: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ids of a forward's arguments with their masks of visual and of valid tokens.

    Parameters
    ----------
    given : mapping
        The arguments by name: ``input_ids`` [B, T] and, optionally, ``attention_mask`` [B, T].
    placeholders : list of int
        Ids that mark visual tokens.

    Returns
    -------
    ids : Tensor [B, T], int64
    visual : Tensor [B, T], bool
    valid : Tensor [B, T], bool
        False for padding.

    Raises
    ------
    ValueError
        No ``input_ids``, or an attention mask of other than two dimensions.
    """
    ids = given.get("input_ids")
    if ids is None:
        raise ValueError("input_ids: none came; token pruning finds the visual tokens by their ids")
    mask = given.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        raise ValueError(f"attention_mask has shape {list(mask.shape)}; expected [B, T] for token pruning")
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    return ids, torch.isin(ids, torch.tensor(placeholders, device=ids.device)) & valid, valid


def last_instruction(valid: Tensor, visual: Tensor, labels: Tensor | None) -> Tensor:
    """Return the position of the last instruction token: the one whose logits predict the answer.

    Parameters
    ----------
    valid : Tensor [B, T], bool
        False for padding.
    visual : Tensor [B, T], bool
        True for visual tokens.
    labels : Tensor [B, T], int64, or None
        -100 where no loss is computed.

    Returns
    -------
    Tensor [B], int64
        The token before the first label behind all images; without such labels, the last valid token.
    """
    places = torch.arange(valid.shape[1], device=valid.device)
    last = (places * valid).amax(1)
    if labels is None:
        return last
    behind = places > (places * visual).amax(1, keepdim=True)
    labelled = (labels != IGNORED) & valid & behind
    first = (labelled.int().argmax(1) - 1).clamp(min=0)
    return torch.where(labelled.any(1), first, last)


def spread_over(of_images: Tensor, visual: Tensor) -> Tensor:
    """Scatter the values of image patches to the positions of their visual tokens.

    `generate` encodes the images once and then repeats each sample, for beams or several answers: values are repeated
    likewise.

    Parameters
    ----------
    of_images : Tensor [N, P]
        One value for each patch of each image.
    visual : Tensor [B, T], bool
        True for visual tokens.

    Returns
    -------
    Tensor [B, T], dtype of ``of_images``
        0 at other tokens.

    Raises
    ------
    ValueError
        Patches and visual tokens do not match one to one.
    """
    images, patches = of_images.shape
    tokens = visual.sum(1)
    copies = int(tokens.sum()) // of_images.numel()
    of_samples = (tokens[:: max(copies, 1)] // patches).tolist()
    if int(tokens.sum()) != copies * of_images.numel() or sum(of_samples) != images:
        raise ValueError(
            f"input_ids: {int(tokens.sum())} visual tokens for {of_images.numel()} patches; expected one of each"
        )
    repeated = torch.cat([part for part in of_images.split(of_samples) for _ in range(copies)])
    return of_images.new_zeros(visual.shape).masked_scatter(visual, repeated)
