"""Token pruning written a second time: dense eager models, whole attention maps, and keys that nobody sees any more."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from models import tiny
from torch import Tensor, nn

from vlprune_ext.anatomy import describe

PER_TOKEN = ("input_ids", "attention_mask", "labels", "token_type_ids", "mm_token_type_ids")
GAP = 1e-5  # by how much scores differ at the cut, so that rounding cannot change a choice


# --- models and prompts ----------------------------------------------------------------------------------------------


@functools.cache
def model(name: str, implementation: str = "sdpa") -> nn.Module:
    """A tiny model that tests share; whoever changes it builds its own."""
    built = tiny.build(name)
    built.set_attn_implementation(implementation)
    return built


def prompts(name: str, n: int = 4, side: str = "right", seed: int = 0, *, labels: bool = False) -> dict[str, Tensor]:
    """``n`` prompts of different lengths, padded on a side."""
    values = tiny.inputs(name, model(name), n, seed)
    if not labels:
        values.pop("labels", None)
        if "token_type_ids" in values:  # of the prompt alone
            values["token_type_ids"] = torch.zeros_like(values["token_type_ids"])
    if n == 1:
        return alone(values, 0)
    return values if side == "right" else left_padded(values)


def left_padded(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same samples, padded in front."""
    shifts = (values["attention_mask"] == 0).sum(1).tolist()
    out = dict(values)
    for name in PER_TOKEN:
        if name in values:
            rows = [row.roll(shift) for row, shift in zip(values[name], shifts, strict=True)]
            out[name] = torch.stack(rows)
    return out


def alone(values: dict[str, Tensor], sample: int) -> dict[str, Tensor]:
    """One sample without padding. Every sample has as many images."""
    valid = values["attention_mask"][sample].bool()
    batch = len(values["input_ids"])
    out = {}
    for name, value in values.items():
        if name in PER_TOKEN:
            out[name] = value[sample : sample + 1, valid]
        else:
            of_each = len(value) // batch
            out[name] = value[sample * of_each : (sample + 1) * of_each]
    return out


def llava_prompts(samples: list[tuple[int, int]], side: str = "right", seed: int = 0) -> dict[str, Tensor]:
    """LLaVA prompts of (images, words), text between and behind the images."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for images, words in samples:
        row = [tiny.BOS]
        for _ in range(images):
            row += torch.randint(3, tiny.BOS, (2,), generator=generator).tolist() + [tiny.IMAGE] * tiny.PATCHES
        rows.append(row + torch.randint(3, tiny.BOS, (words,), generator=generator).tolist())
    length = max(map(len, rows))
    pixels = torch.randn(sum(images for images, _ in samples), 3, 12, 12, generator=generator)
    values = {
        "input_ids": torch.tensor([row + [tiny.PAD] * (length - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
        "pixel_values": pixels,
    }
    return values if side == "right" else left_padded(values)


def close(found: Tensor, expected: Tensor) -> None:
    """Equal but for rounding, for states and logits as large as these."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5 * float(expected.abs().max()))


def visual(values: dict[str, Tensor]) -> Tensor:
    """[B, T] bool."""
    return values["input_ids"] == tiny.IMAGE


def valid(values: dict[str, Tensor]) -> Tensor:
    """[B, T] bool."""
    return values["attention_mask"].bool()


# --- keys out of sight -----------------------------------------------------------------------------------------------


def blocks(dense: nn.Module) -> nn.ModuleList:
    """Of the language model."""
    return describe(dense).tower("text").container


def gone_behind(values: dict[str, Tensor], kept: dict[int, Tensor], depth: int = 4) -> dict[int, Tensor]:
    """Block -> [B, T] bool, what it does not see any more, of the tokens that enter some blocks."""
    gone, now = {}, None
    for layer in range(depth):
        if layer in kept:
            now = valid(values) & ~kept[layer]
        if now is not None:
            gone[layer] = now
    return gone


@contextmanager
def blinded(
    dense: nn.Module, gone: dict[int, Tensor], *, since: int = 0, positions: dict[int, Tensor] | None = None
) -> Iterator[None]:
    """No row from ``since`` on sees the keys ``gone[layer]``, [B, T] or [B, key heads, T]; later keys are seen.

    positions: block -> [B, T], of all its tokens.
    """
    handles = []
    for layer, block in enumerate(blocks(dense)):
        if layer in gone:
            new = None if positions is None else positions[layer]
            hook = functools.partial(_hide, dense=dense, gone=gone[layer], since=since, positions=new)
            handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hide(block, args, kwargs, *, dense, gone, since, positions):
    mask = kwargs["attention_mask"]  # [B or 1, 1, Tq, Tk]
    rows, keys = mask.shape[-2:]
    gone = F.pad(gone, (0, keys - gone.shape[-1]))
    gone = gone[:, None] if gone.dim() == 2 else gone.repeat_interleave(block.self_attn.num_key_value_groups, 1)
    late = torch.arange(keys - rows, keys) >= since
    hidden = gone[:, :, None] & late[:, None]
    mask = mask.expand(hidden.shape[0], hidden.shape[1], -1, -1).masked_fill(hidden, torch.finfo(mask.dtype).min)
    kwargs = {**kwargs, "attention_mask": mask}
    if positions is not None:
        owner = describe(dense).tower("text").prefix.rpartition(".")[0]
        kwargs["position_embeddings"] = dense.get_submodule(owner).rotary_emb(args[0], positions)
    return args, kwargs


def logits_with(dense: nn.Module, values: dict[str, Tensor], kept: dict[int, Tensor]) -> Tensor:
    """[B, T, V] of a dense model whose blocks do not see what is not kept."""
    with torch.no_grad(), blinded(dense, gone_behind(values, kept)):
        return dense(**values).logits


def grown(values: dict[str, Tensor], sequences: Tensor) -> dict[str, Tensor]:
    """Prompts and what was generated behind them, as one input."""
    new = sequences.shape[1] - values["input_ids"].shape[1]
    after = {"attention_mask": 1, "token_type_ids": 1, "mm_token_type_ids": 0}
    out = {**values, "input_ids": sequences}
    for name, value in after.items():
        if name in values:
            out[name] = F.pad(values[name], (0, new), value=value)
    return out


# --- what is chosen --------------------------------------------------------------------------------------------------


def share(keep: float, count: int) -> int:
    """How many of ``count`` tokens, at least one of any."""
    return max(1, round(keep * count)) if count else 0


def top(score: Tensor, among: Tensor, count: int) -> Tensor:
    """[T] bool: those of highest score."""
    found, order = score.masked_fill(~among, -torch.inf).sort(descending=True)
    assert count in (0, int(among.sum())) or found[count - 1] - found[count] > GAP, "a choice that rounding decides"
    return torch.zeros_like(among).index_fill_(0, order[:count], True)


def asking(values: dict[str, Tensor]) -> list[int]:
    """The last instruction token of each sample."""
    rows = []
    for sample, mask in enumerate(values["attention_mask"].tolist()):
        row = max(place for place, seen in enumerate(mask) if seen)
        if "labels" in values:
            row = min(place for place, label in enumerate(values["labels"][sample].tolist()) if label != -100) - 1
        rows.append(row)
    return rows


def maps(dense: nn.Module, values: dict[str, Tensor], kept: dict[int, Tensor] | None = None) -> tuple[Tensor, ...]:
    """Block -> [B, H, T, T]."""
    with torch.no_grad(), blinded(dense, gone_behind(values, kept or {})):
        return dense(**values, output_attentions=True).attentions


def by_last_row(dense: nn.Module, values: dict[str, Tensor], stages: dict[int, float]) -> dict[int, Tensor]:
    """FastV and PyramidDrop: the tokens that enter each stage, by where the last instruction token looked.

    Where that one left, the last token kept before it asks.
    """
    kept: dict[int, Tensor] = {}
    left = visual(values)
    for layer, keep in stages.items():
        seen = maps(dense, values, kept)[layer - 1].mean(1)
        now = valid(values) & ~visual(values)
        there = kept[max(kept)] if kept else valid(values)
        for sample, row in enumerate(asking(values)):
            row = max(place for place in range(row + 1) if there[sample, place])
            count = share(keep, int(visual(values)[sample].sum()))
            now[sample] |= top(seen[sample, row], left[sample], count)
        kept[layer], left = now, now & visual(values)
    return kept


def by_cache(dense: nn.Module, values: dict[str, Tensor], layer: int, rows: str, counts: list[int]) -> Tensor:
    """[B, key heads, T] bool, PLPHP and LOOK-M: text, and the visual tokens that a key head's queries look at most."""
    seen = maps(dense, values)[layer]  # [B, H, T, T]
    heads = dense.config.get_text_config().num_key_value_heads
    by_head = seen.unflatten(1, (heads, -1)).sum(2)
    kept = (valid(values) & ~visual(values))[:, None].repeat(1, heads, 1)
    for sample, row in enumerate(asking(values)):
        queries = valid(values)[sample].nonzero().flatten() if rows == "all" else [row]
        for head in range(heads):
            score = by_head[sample, head, queries].sum(0)
            kept[sample, head] |= top(score, visual(values)[sample], counts[sample])
    return kept


def dense_cache(dense: nn.Module, values: dict[str, Tensor]):
    """The key-value cache of a prompt, nothing missing."""
    with torch.no_grad():
        return dense(**values, use_cache=True).past_key_values


def averaged(keys: Tensor, values: Tensor, kept: Tensor, evicted: Tensor) -> tuple[Tensor, Tensor]:
    """LOOK-M's merge for one head, [T, d] each: the mean of a kept entry and of the evicted ones nearest to it."""
    keys, values = keys.double(), values.double()
    stays = kept.nonzero().flatten().tolist()
    members = {place: [place] for place in stays}
    for place in evicted.nonzero().flatten().tolist():
        nearness = [float(F.cosine_similarity(keys[place], keys[other], dim=0)) for other in stays]
        first, second = sorted(nearness)[-1], sorted(nearness)[-2]
        assert first - second > GAP, "a match that rounding decides"
        members[stays[nearness.index(first)]].append(place)
    return tuple(torch.stack([x[members[place]].mean(0) for place in stays]) for x in (keys, values))


def zipped(dense: nn.Module, pixels: Tensor, keep: float, contextual: float) -> tuple[Tensor, Tensor]:
    """VisionZip on LLaVA: kept [N, P] bool, and the states [N, P, D] that the projector gets."""
    tower = dense.model.vision_tower
    with torch.no_grad():
        out = tower(pixels, output_attentions=True, output_hidden_states=True)
        states = out.hidden_states[-2][:, 1:].clone()
        block = tower.encoder.layers[-2]
        keys = block.self_attn.k_proj(block.layer_norm1(out.hidden_states[-3]))[:, 1:]
    keys = F.normalize(keys.unflatten(-1, (block.self_attn.num_heads, -1)).mean(2), dim=-1)
    given = out.attentions[-2][:, :, 0, 1:].mean(1)
    images, patches = given.shape
    count = share(keep, patches)
    centres = share(contextual, count) if contextual else 0
    kept = torch.zeros(images, patches, dtype=torch.bool)
    for image in range(images):
        dominant = top(given[image], torch.ones(patches, dtype=torch.bool), count - centres)
        others = (~dominant).nonzero().flatten().tolist()
        targets = [others[i * (len(others) // centres)] for i in range(centres)]
        members = {target: [target] for target in targets}
        for place in others:
            if place not in members and targets:
                nearest = max(targets, key=lambda target: float(keys[image, place] @ keys[image, target]))
                members[nearest].append(place)
        merged = {target: states[image, group].mean(0) for target, group in members.items()}
        for target, state in merged.items():
            states[image, target] = state
        kept[image] = dominant.index_fill(0, torch.tensor(targets, dtype=torch.long), True)
    return kept, states


def farthest(states: Tensor, among: Tensor, count: int) -> Tensor:
    """DivPrune [T] bool: the token farthest from its nearest, then each time the one farthest from those chosen."""
    directions = F.normalize(states.double(), dim=-1)
    distance = 1 - directions @ directions.T
    candidates = among.nonzero().flatten().tolist()

    def alone(place: int) -> float:
        return min(float(distance[place, other]) for other in candidates if other != place)

    chosen = [max(candidates, key=alone)]
    while len(chosen) < count:
        rest = [place for place in candidates if place not in chosen]
        chosen.append(max(rest, key=lambda place: min(float(distance[place, other]) for other in chosen)))
    return torch.zeros_like(among).index_fill_(0, torch.tensor(chosen), True)
