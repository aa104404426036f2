"""Hooks on attention modules: observe queries and keys, reweigh keys, and sum attention weights without a T x T map.

Attention modules of most families look up their attention function by a name in their config (transformers'
`AttentionInterface`). A hooked module gets a copy of its config that names a wrapper around the original function;
other modules, and the construction of attention masks, are unaffected.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import ops
from ..anatomy import Site
from ..anatomy.patch import Patches

# (attend, query [B, H, Tq, d], key [B, Hkv, Tk, d], value, mask, causal) -> the attention's output. causal: the mask is
# implicit, as in SDPA's `is_causal`.
Advice = Callable[[Callable, Tensor, Tensor, Tensor, Tensor | None, bool], Any]
Watcher = Callable[[Tensor, Tensor, float], None]  # query, key, scale
# query, key, scale, and the log-sum-exp [B, H, Tq] of the reweighed logits; None where the kernel does not expose it.
LseWatcher = Callable[[Tensor, Tensor, float, Tensor | None], None]


# --- hooks -----------------------------------------------------------------------------------------------------------


def _original(module: nn.Module, implementation: str) -> Callable:
    """Return the attention function that the module's config would select without the hook."""
    if implementation == "eager":  # each family has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[implementation]


def _advised(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    """Call the advice of a hooked module; the attention function that its copied config names."""
    ours: Any = module.config
    theirs, advice = ours.vlprune_original, ours.vlprune_advice

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Any:
        module.config = theirs  # flash attention reads the name of its kernel there
        try:
            return _original(module, theirs._attn_implementation)(module, query, key, value, mask, **kwargs)
        finally:
            module.config = ours

    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", False) if causal is None else causal
    return advice(attend, query, key, value, mask, bool(causal) and mask is None and query.shape[2] > 1)


def _around(patches: Patches, attention: Any, advice: Advice) -> None:
    """Wrap the attention function that an attention module's config names in ``advice``."""
    ours = copy.copy(attention.config)
    name = f"vlprune_{ours._attn_implementation}"  # what is flash attention is known by its name
    AttentionInterface.register(name, _advised)
    ours._attn_implementation_internal = name
    ours.vlprune_original, ours.vlprune_advice = attention.config, advice
    patches.attribute(attention, "config", ours)


def watch(patches: Patches, site: Site, watcher: Watcher) -> None:
    """Call ``watcher`` with the queries and keys of an attention, just before their scores are computed.

    Parameters
    ----------
    patches : Patches
        Owns the hooks; they are removed when it exits.
    site : Site
        The "head" or "cross_head" site of a block.
    watcher : callable (query, key, scale) -> None
        ``query`` [B, H, Tq, d] and ``key`` [B, Hkv, Tk, d], after any rotary embedding; ``scale``, the factor of the
        attention logits.
    """
    attention = site.attention
    if site.paths.interface:
        scale = attention.scaling if hasattr(attention, "scaling") else attention.scale

        def look(attend: Callable, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, _: bool) -> Any:
            watcher(query, key, scale)
            return attend(query, key, value, mask)

        _around(patches, attention, look)
        return
    scale = site.width**-0.5
    if len(site.inputs) == 1:  # a fused qkv projection

        def split(_: nn.Module, __: tuple, packed: Tensor) -> None:
            query, key, _value = _heads(packed, 3 * site.units).chunk(3, 1)
            watcher(query, key, scale)

        patches.hook(site.inputs[0], split)
        return
    queries: list[Tensor] = []

    def first(_: nn.Module, __: tuple, output: Tensor) -> None:
        queries.append(_heads(output, site.units))

    def second(_: nn.Module, __: tuple, output: Tensor) -> None:
        watcher(queries.pop(), _heads(output, site.units), scale)

    patches.hook(site.inputs[0], first)
    patches.hook(site.inputs[1], second)


def weigh(patches: Patches, site: Site, weight: Callable[[], Tensor | None], watcher: LseWatcher | None = None) -> None:
    """Scale the attention weight of each key by ``weight()`` before normalisation: log w_j is added to its logits.

    Where w counts the tokens merged into one, this is the proportional attention of ToMe (arXiv 2210.09461). A query
    all of whose visible keys have weight 0 gets a finite but meaningless output.

    Parameters
    ----------
    patches : Patches
        Owns the hooks; they are removed when it exits.
    site : Site
        The "head" or "cross_head" site of a block.
    weight : callable () -> Tensor [B, Tk], fp32, or None
        Called in every forward; values >= 0, where 0 masks a key. None: all 1, and the attention runs unchanged.
    watcher : callable (query, key, scale, lse) -> None, optional
        As in `watch`; ``lse`` [B, H, Tq], fp32, is the log-sum-exp of the reweighed logits, or None where the attention
        kernel does not expose it.

    Raises
    ------
    ValueError
        When the attention runs: flash attention, which takes no additive mask.
    """
    attention = site.attention
    if site.paths.interface:
        of_scale = attention.scaling if hasattr(attention, "scaling") else attention.scale

        def heavier(
            attend: Callable, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool
        ) -> Any:
            times = weight()
            if times is not None:
                if "flash" in attention.config._attn_implementation:
                    raise ValueError('token weights need an additive mask; expected attn_implementation="sdpa"')
                mask = _heavier(mask, times, query, causal)
            if watcher is None:
                return attend(query, key, value, mask)
            kept = _KeepLse()
            with kept if query.device.type == "cpu" else nullcontext():
                output = attend(query, key, value, mask)
            watcher(query, key, of_scale, kept.lse)
            return output

        _around(patches, attention, heavier)
        return
    if len(site.inputs) > 1:
        name = "encoder_attention_mask" if site.kind == "cross_head" else "attention_mask"

        def enter(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            times = weight()
            if times is None:
                return None
            return args, {**kwargs, name: _heavier(kwargs.get(name), times, args[0], causal=False)}

        patches.pre_hook(attention, enter, with_kwargs=True)
        if watcher is not None:
            watch(patches, site, lambda query, key, scale: watcher(query, key, scale, None))
        return
    original, of_scale = attention.forward, site.width**-0.5
    if watcher is not None:

        def plainly(query: Tensor, key: Tensor, scale: float) -> None:
            if weight() is None:
                watcher(query, key, scale, None)

        watch(patches, site, plainly)

    def forward(hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        times = weight()
        if times is None:
            return original(hidden_states, **kwargs)
        query, key, value = _heads(site.inputs[0](hidden_states), 3 * site.units).chunk(3, 1)
        dropout = attention.dropout.p if attention.training else 0.0
        added = _heavier(None, times, query, causal=False)
        with _KeepLse() as kept:
            context = F.scaled_dot_product_attention(query, key, value, attn_mask=added, dropout_p=dropout)
        if watcher is not None:
            watcher(query, key, of_scale, kept.lse)
        return site.out(context.transpose(1, 2).flatten(2)), None

    patches.forward(attention, forward)


class _KeepLse(TorchFunctionMode):
    """Keep the log-sum-exp of the latest scaled dot-product attention in ``lse``; its output is unchanged.

    ``lse`` is that of torch's flash attention on a CPU, for ungrouped heads, without autocast; None otherwise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lse: Tensor | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
    ) -> Tensor:
        """Run scaled dot-product attention, by the flash kernel's own op if torch would choose that kernel."""
        given: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        self.lse = None
        if query.device.type == "cpu" and not enable_gqa and not torch.is_autocast_enabled("cpu"):
            chosen = torch._fused_sdp_choice(query, key, value, attn_mask=attn_mask, **given)
            if chosen == SDPBackend.FLASH_ATTENTION.value:
                if attn_mask is not None and attn_mask.dtype == torch.bool:
                    attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
                flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
                output, self.lse = flash(query, key, value, attn_mask=attn_mask, **given)
                return output
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, enable_gqa=enable_gqa, **given)


def _heavier(mask: Tensor | None, times: Tensor, query: Tensor, causal: bool) -> Tensor:
    """Return the additive mask [B, 1, 1 or Tq, Tk] that scales each key's attention weight by ``times`` [B, Tk]."""
    never = torch.finfo(query.dtype).min
    added = times.log().to(query.dtype)[:, None, None]
    if causal:
        length = times.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=times.device).tril()
    if mask is None:
        return added.clamp(min=never)
    if mask.dtype == torch.bool:
        return added.masked_fill(~mask, never).clamp(min=never)
    return (added + mask).clamp(min=never)


def _heads(x: Tensor, heads: int) -> Tensor:
    """Split [B, T, H * d] into heads [B, H, T, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


# --- attention received by each key ----------------------------------------------------------------------------------


def log_sum_exp(query: Tensor, key: Tensor, scale: float, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """Return the log-sum-exp of each query's attention logits, as flash attention does beside its output.

    Parameters
    ----------
    query : Tensor [B, H, Tq, d], fp32/bf16/fp16
        Queries, after any rotary embedding.
    key : Tensor [B, H, Tk, d], dtype of query
        As many heads as the queries have: repeat grouped key heads first.
    scale : float
        Factor of the logits.
    causal : bool
        Mask keys behind the query.
    mask : Tensor [B, 1, 1, Tk], dtype of query, optional
        Additive attention mask.

    Returns
    -------
    Tensor [B, H, Tq], fp32
    """
    if query.device.type == "cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(query, key, key, is_causal=causal, attn_mask=mask, scale=scale)[1]
    if mask is not None:  # the kernel wants rows of the mask aligned to 16 bytes
        length = mask.shape[-1]
        mask = F.pad(mask, (0, -length % 16))[..., :length].expand(*query.shape[:3], -1)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    lse = efficient(query, key, key, mask, True, is_causal=causal, scale=scale)[1]
    return lse[..., : query.shape[2]]


def from_rows(
    query: Tensor,
    key: Tensor,
    scale: float,
    key_mask: Tensor | None = None,
    query_weight: Tensor | None = None,
) -> Tensor:
    """Sum the attention weights that each key receives from a few queries, over queries and the heads of each group.

    Parameters
    ----------
    query : Tensor [B, H, Tq, d], fp32/bf16/fp16
        The rows of the attention map that are wanted; few.
    key : Tensor [B, Hkv, Tk, d], dtype of query
        Hkv divides H (grouped-query attention).
    scale : float
        Factor of the attention logits.
    key_mask : Tensor [B, Tk], bool, optional
        True for the keys that the softmax runs over; all by default.
    query_weight : Tensor [B, Tq], fp32, optional
        Weight of each query in the sum; all 1 by default.

    Returns
    -------
    Tensor [B, Hkv, Tk], fp32
    """
    b, hkv, tk, d = key.shape
    rows = query.shape[2]
    group = query.shape[1] // hkv
    folded = query.reshape(b, hkv, group * rows, d)  # a group's query heads as rows: they share the key head
    mask = None
    if key_mask is not None:
        mask = torch.zeros(b, 1, 1, tk, dtype=query.dtype, device=query.device)
        mask.masked_fill_(~key_mask[:, None, None], -torch.inf)
    lse = log_sum_exp(folded, key, scale, mask=mask)
    return _by_head(folded, key, lse, scale, key_mask, None if query_weight is None else query_weight.repeat(1, group))


def _by_head(query, key, lse, scale, key_mask=None, query_weight=None, causal=False) -> Tensor:
    """Sum the attention weights [B, Hkv, Tk] that keys receive from queries [B, Hkv, Tq, d] of ungrouped heads."""
    b, hkv, tk, _ = key.shape

    def spread(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[:, None].expand(b, hkv, -1).reshape(b * hkv, -1)

    received = ops.attention_importance(
        query.reshape(b * hkv, 1, *query.shape[2:]),
        key.reshape(b * hkv, 1, *key.shape[2:]),
        lse.reshape(b * hkv, 1, -1),
        key_mask=spread(key_mask),
        query_weight=spread(query_weight),
        causal=causal,
        scale=scale,
    )
    return received.view(b, hkv, tk)


def from_all(query: Tensor, key: Tensor, scale: float, spans: list[tuple[int, int]], prefix: list[int]) -> Tensor:
    """Sum the attention weights that each key receives from all queries of its sample, over the heads of each group.

    No attention map is stored. The tokens of a sample are contiguous between its padding, so that no kernel call needs
    a mask.

    Parameters
    ----------
    query : Tensor [B, H, T, d], fp32/bf16/fp16
        Queries of the whole sequence.
    key : Tensor [B, Hkv, T, d], dtype of query
        Hkv divides H (grouped-query attention).
    scale : float
        Factor of the attention logits.
    spans : list of B (start, stop)
        The positions of each sample's tokens.
    prefix : list of B int
        How many leading tokens of each sample attend to each other bidirectionally (prefix-LM mask); the others attend
        causally.

    Returns
    -------
    Tensor [B, Hkv, T], fp32
        0 at padding.
    """
    b, hkv, tokens, _ = key.shape
    group = query.shape[1] // hkv
    received = key.new_zeros((b, hkv, tokens), dtype=torch.float32)
    alike = len({*zip(spans, prefix, strict=True)}) == 1
    for part in [slice(None)] if alike else [slice(sample, sample + 1) for sample in range(b)]:
        start, stop = spans[part][0]
        both = min(prefix[part][0], stop - start)
        # Where the query rows end, whether they are causal, and how many leading rows are already summed.
        for end, causal, counted in ((start + both, False, 0), (stop, True, both)):
            rows = end - start
            if counted == rows:
                continue
            weight = (torch.arange(rows, device=key.device) >= counted).float().expand(len(spans[part]), -1)
            keys = key[part, :, start:end]
            for head in range(group):  # one query head of each group at a time
                queries = query[part, head::group, start:end]
                lse = log_sum_exp(queries, keys, scale, causal)
                by_head = _by_head(queries, keys, lse, scale, query_weight=weight if counted else None, causal=causal)
                received[part, :, start:end] += by_head
    return received
