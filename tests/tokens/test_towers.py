"""ToMe against a loop over eager blocks, and vision towers without a class token."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny
from tokens import oracle

import vlprune_ext as vp
from vlprune_ext.anatomy import describe

# norm, attention, norm; queries, keys, values, projection
CLIP = ("layer_norm1", "self_attn", "layer_norm2", ("q_proj", "k_proj", "v_proj", "out_proj"))
VIT = ("layernorm_before", "attention", "layernorm_after", ("q_proj", "k_proj", "v_proj", "o_proj"))
BLIP = ("layer_norm1", "self_attn", "layer_norm2", ("qkv", "projection"))
TOWERS = {"clip": (CLIP, 1), "siglip": (CLIP, 0), "vit": (VIT, 1), "blip_itr": (BLIP, 1), "blip_vqa": (BLIP, 1)}
READERS = {"llava": (CLIP, 1), "paligemma": (CLIP, 0)}


def vision_blocks(model):
    return describe(model).tower("vision").container


# --- ToMe, a second time ---------------------------------------------------------------------------------------------


class Loop:
    """Blocks that merge: softmax attention over keys that count as often as they have patches, then ToMe's matching."""

    def __init__(self, layout, cls, schedule):
        self.layout, self.cls, self.schedule = layout, cls, schedule
        self.sizes: list[list[list[int]]] = []  # of each image, the patches in each token

    def block(self, block, layer, hidden):
        first, attention, second, names = self.layout
        attention = getattr(block, attention)
        if layer == 0:
            self.sizes = [[[token] for token in range(hidden.shape[1])] for _ in hidden]
        normed = getattr(block, first)(hidden)
        projections = [getattr(attention, name) for name in names]
        packed = [projection(normed) for projection in projections[:-1]]
        query, key, value = packed if len(packed) == 3 else packed[0].chunk(3, -1)
        query, key, value = (x.unflatten(-1, (4, -1)).transpose(1, 2) for x in (query, key, value))
        times = torch.tensor([[float(len(group)) for group in groups] for groups in self.sizes])
        weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).exp() * times[:, None, None]
        context = weights / weights.sum(-1, keepdim=True) @ value
        hidden = hidden + projections[-1](context.transpose(1, 2).flatten(2))
        if self.schedule[layer]:
            keys = key.mean(1)
            rows = [self.merged(image, hidden[image], keys[image], layer) for image in range(len(hidden))]
            hidden = torch.stack(rows)
        return hidden + block.mlp(getattr(block, second)(hidden))

    def merged(self, image, hidden, keys, layer):
        keys = F.normalize(keys, dim=-1)
        even, odd = range(self.cls, len(keys), 2), range(self.cls + 1, len(keys), 2)
        near = {}
        for source in even:
            best = max(odd, key=lambda target: float(keys[source] @ keys[target]))
            near[source] = (float(keys[source] @ keys[best]), best)
        order = sorted(near, key=lambda source: -near[source][0])
        going = order[: self.schedule[layer]]
        if len(going) < len(order):
            assert near[going[-1]][0] - near[order[len(going)]][0] > oracle.GAP, "a choice that rounding decides"
        groups, states = self.sizes[image], []
        left = [token for token in range(len(keys)) if token not in going]
        for token in left:
            members = [token, *(source for source in going if near[source][1] == token)]
            weight = torch.tensor([float(len(groups[member])) for member in members])
            states.append((weight[:, None] * hidden[members]).sum(0) / weight.sum())
        self.sizes[image] = [
            groups[token] + [patch for s in going if near[s][1] == token for patch in groups[s]] for token in left
        ]
        return torch.stack(states)


@contextmanager
def looped(model, loop):
    """A dense eager model whose vision blocks are those of ``loop``."""
    handles = []
    for layer in range(len(loop.schedule)):
        block = vision_blocks(model)[layer]

        def forward(hidden_states, *args, block=block, layer=layer, **kwargs):
            return loop.block(block, layer, hidden_states)

        block.forward = forward
        handles.append(block)
    try:
        yield
    finally:
        for block in handles:
            del block.forward


def vision_inputs(name, n=3):
    return tiny.inputs(name, oracle.model(name), n)


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("name", TOWERS)
def test_tome_is_a_loop_over_blocks(name, keep):
    model, values = oracle.model(name), vision_inputs(name)
    states = []
    with vp.prune_tokens(model, vp.ToMe(keep=keep)) as pruning:
        hook = vision_blocks(model)[-1].register_forward_hook(lambda _, __, output: states.append(output))
        found = tiny.outputs(name, model, values)
        hook.remove()
    layout, cls = TOWERS[name]
    loop = Loop(layout, cls, vp.ToMe(keep=keep).schedule(9, 4))
    eager = oracle.model(name, "eager")
    with looped(eager, loop):
        hook = vision_blocks(eager)[-1].register_forward_hook(lambda _, __, output: states.append(output))
        expected = tiny.outputs(name, eager, values)
        hook.remove()
    oracle.close(found, expected)
    assert states[0].shape[1] == cls + oracle.share(keep, 9)
    oracle.close(states[0], states[len(states) // 2])
    leaders = torch.zeros(3, cls + 9, dtype=torch.bool)
    for image, groups in enumerate(loop.sizes):
        leaders[image, [group[0] for group in groups]] = True
    assert torch.equal(pruning.kept[max(pruning.kept)], leaders)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", READERS)
def test_tome_in_front_of_a_language_model(name, side, implementation):
    """Merged patches stand where their first one was; the language model does not see the other places."""
    model, values = oracle.model(name, implementation), oracle.prompts(name, 3, side)
    with vp.prune_tokens(model, vp.ToMe(keep=0.5)), torch.no_grad():
        logits = model(**values).logits
    layout, cls = READERS[name]
    dense = oracle.model(name, "eager")
    loop = Loop(layout, cls, vp.ToMe(keep=0.5).schedule(9, describe(dense).tower("vision").depth))
    kept = torch.zeros(3, 9, dtype=torch.bool)

    def spread(_, args):
        full = torch.zeros(3, 9, args[0].shape[2])
        for image, groups in enumerate(loop.sizes):
            kept[image, [group[0] - cls for group in groups[cls:]]] = True
            full[image, kept[image]] = args[0][image]
        return (full,)

    class Late(dict):
        """What the blocks do not see is known once the tower has run."""

        def __getitem__(self, layer):
            return oracle.visual(values).masked_scatter(oracle.visual(values), ~kept)

    handle = dense.model.multi_modal_projector.register_forward_pre_hook(spread)
    with torch.no_grad(), looped(dense, loop):
        dense.model.get_image_features(values["pixel_values"])
        with oracle.blinded(dense, Late.fromkeys(range(4))):
            expected = dense(**values).logits
    handle.remove()
    stays = oracle.valid(values).masked_scatter(oracle.visual(values), kept)
    oracle.close(logits[stays], expected[stays])


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 700), st.integers(1, 48), st.floats(0, 1, exclude_min=True))
def test_schedule(tokens, blocks, keep):
    method, final = vp.ToMe(keep=keep), oracle.share(keep, tokens)
    least = tokens
    for _ in range(blocks):
        least -= least // 2
    if least > final:
        with pytest.raises(ValueError, match=f"{blocks} vision blocks halve {tokens} tokens"):
            method.schedule(tokens, blocks)
        return
    merged, left = method.schedule(tokens, blocks), tokens
    assert len(merged) == blocks
    assert sum(merged) == tokens - final
    for going in merged:
        assert 0 <= going <= left // 2
        left -= going
    even = -(-(tokens - final) // blocks)
    if all(even <= (final + even * after) // 2 for after in range(1, blocks + 1)):
        assert max(merged) - min(merged) <= 1, "as many in each block, where that can be"


# --- towers of other makes -------------------------------------------------------------------------------------------


def siglip_llava():
    """A LLaVA whose vision tower has no class token."""
    vision = {**tiny._VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config={**tiny._LLAMA, "model_type": "llama"},
        image_token_index=tiny.IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = transformers.LlavaForConditionalGeneration(config)
    tiny.randomise(model)
    return model.eval()


def test_class_tokens_are_those_of_the_tower():
    assert describe(siglip_llava()).tower("vision").cls == 0
    found = {name: describe(oracle.model(name)).tower("vision").cls for name in ("llava", "paligemma", *TOWERS)}
    assert found == {"llava": 1, "paligemma": 0, **{name: cls for name, (_, cls) in TOWERS.items()}}


def test_tome_without_a_class_token_in_front_of_a_language_model():
    model, values = siglip_llava(), oracle.prompts("llava", 2)
    with vp.prune_tokens(model, vp.ToMe(keep=0.5)) as pruning, torch.no_grad():
        assert model(**values).logits.isfinite().all()
    assert (pruning.kept[max(pruning.kept)].sum(1) == 4).all()


@pytest.mark.parametrize("model", [siglip_llava, lambda: tiny.build("paligemma")], ids=["siglip", "paligemma"])
def test_vision_zip_needs_a_class_token(model):
    with pytest.raises(ValueError, match="VisionZip needs a class token"), vp.prune_tokens(model(), vp.VisionZip()):
        pass
