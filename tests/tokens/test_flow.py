"""Tokens under CoMP's masks against eager models, whole attention maps and a softmax of our own."""

from __future__ import annotations

import pytest
import torch
from comp.eager import HARD, KEEP, NAMES, Eager, differ, inputs, run, same
from comp.masking import masked
from models import tiny
from tokens import oracle

from vlprune_ext.anatomy import describe
from vlprune_ext.comp.masks import masked_columns
from vlprune_ext.tokens import attention
from vlprune_ext.tokens.flow import Threshold

SOFT = {"vision": {"going": 0.1, "gone": 0.07, "soft": 0.3}, "text": {"going": 0.08, "gone": 0.03, "soft": 0.6}}
GROUPS = {"llava": 2, "paligemma": 2}  # query heads of each key head, in the text tower


def seen(masks):
    """(tower, layer) -> (importance, what was alive), as the masks find them."""
    found = {}

    def note(tower, layer, tokens, importance):
        found[tower, layer] = (importance, tokens.alive)

    masks.flow.on_importance = note
    return found


@pytest.mark.parametrize("limits", [{}, HARD, SOFT, KEEP], ids=["none", "hard", "soft", "few"])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_importances(name, limits):
    values, eager = inputs(name), Eager(name, limits)
    expected = eager(values)
    with masked(oracle.model(name), limits) as masks:
        importances = seen(masks)
        found = run(name, oracle.model(name), values)
    same(found, expected)
    if limits:
        differ(found, run(name, oracle.model(name), values))
    assert importances.keys() == eager.importance.keys()
    for key, (importance, alive) in importances.items():
        assert torch.equal(alive, eager.entered[key]), key
        torch.testing.assert_close(importance.double(), eager.importance[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tower", ["vision", "text"])
@pytest.mark.parametrize("name", NAMES)
def test_one_tower(name, tower):
    values, limits = inputs(name, labels=name == "blip_vqa"), {tower: SOFT[tower]}
    with masked(oracle.model(name), limits):
        same(run(name, oracle.model(name), values), Eager(name, limits)(values))


@pytest.mark.parametrize("heads_vote", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_heads_that_are_gone_do_not_vote(name, heads_vote):
    """Eq. (7): gone, they say nothing; going, they say less. Without CIT they still have their say."""
    anatomy = describe(oracle.model(name))
    units = {}
    for tower in ("vision", "text"):
        for layer in range(len(anatomy.tower(tower))):
            mask = torch.ones(anatomy.tower(tower).blocks[layer].sites["head"].units)
            mask[layer % 2], mask[-1] = 0.0, 0.4 if len(mask) > 2 else mask[-1]
            units[tower, layer, "head"] = mask
    votes = {}
    for (tower, layer, _), mask in units.items() if heads_vote else ():
        votes[tower, layer] = mask.repeat_interleave(GROUPS.get(name, 1) if tower == "text" else 1)
    values, eager = inputs(name), Eager(name, HARD, votes=votes, units=units)
    expected = eager(values)
    with masked(oracle.model(name), HARD, units, heads_vote=heads_vote) as masks:
        importances = seen(masks)
        same(run(name, oracle.model(name), values), expected)
    for key, (importance, _) in importances.items():
        torch.testing.assert_close(importance.double(), eager.importance[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "side"), [("clip", "right"), ("blip_vqa", "right"), ("llava", "right"), ("llava", "left")]
)
def test_alone_or_among_others(name, side):
    """What leaves, and what comes of it, does not depend on who shares the batch."""
    model = oracle.model(name)
    values = inputs(name, 4, labels=name == "blip_vqa")
    values = oracle.left_padded(values) if side == "left" else values
    with masked(model, SOFT) as masks, torch.no_grad():
        importances = seen(masks)
        together, state, among = model(**values), masks.flow.state, dict(importances)
        for sample, valid in enumerate(values["attention_mask"].bool()):
            one = {key: value[sample : sample + 1] for key, value in values.items()}
            one |= {key: one[key][:, valid] for key in ("input_ids", "attention_mask")}
            alone = model(**one)
            for (tower, layer), (importance, _) in importances.items():
                expected = among[tower, layer][0][sample]
                if tower == "text":
                    assert not expected[~valid].any()
                    expected = expected[valid]
                torch.testing.assert_close(importance[0], expected, rtol=1e-4, atol=1e-6)
            assert torch.equal(masks.flow.state["text"].mask[0], state["text"].mask[sample, valid])
            assert torch.equal(masks.flow.state["vision"].mask[0], state["vision"].mask[sample])
            if name == "clip":
                oracle.close(alone.image_embeds[0], together.image_embeds[sample])
                oracle.close(alone.text_embeds[0], together.text_embeds[sample])
            elif name == "llava":
                text = values["input_ids"][sample, valid] != tiny.IMAGE
                oracle.close(alone.logits[0, text], together.logits[sample, valid][text])


@pytest.mark.parametrize("name", [*NAMES, "siglip", "blip_itr", "vit"])
def test_nothing_leaves(name):
    """At thresholds of 0 the model runs as if it were alone, bit by bit, trained or not."""
    model = oracle.model(name)
    values = tiny.inputs(name, model)
    plain = tiny.outputs(name, model, values)
    zero = {tower: {"going": 0.0, "gone": 0.0, "soft": 0.0} for tower in ("vision", "text")}
    with masked(model, zero) as masks:
        assert torch.equal(tiny.outputs(name, model, values), plain)
        seen(masks)  # nor does looking change anything
        assert torch.equal(tiny.outputs(name, model, values), plain)
        assert all(tokens.mask is None for tokens in masks.flow.state.values())


def patched(model):
    return [
        (name, m.__dict__.get("forward"), len(m._forward_hooks), len(m._forward_pre_hooks), id(getattr(m, "config", 0)))
        for name, m in model.named_modules()
    ]


@pytest.mark.parametrize("name", NAMES)
def test_everything_is_as_before(name):
    model = tiny.build(name)
    values = inputs(name)
    plain = run(name, model, values)  # transformers puts in place hooks of its own
    before = patched(model)
    broken = {**values, "pixel_values": values["pixel_values"][:, :2]}
    with masked(model, SOFT):
        assert patched(model) != before
        run(name, model, values)
    assert patched(model) == before
    with pytest.raises((RuntimeError, ValueError)), masked(model, SOFT):
        run(name, model, broken)
    assert patched(model) == before
    after = run(name, model, values)
    assert all(torch.equal(value, plain[key]) for key, value in after.items())


def test_hardened():
    """What counts less does not count; units and tokens are soft again behind it."""
    values = inputs("clip")
    units = {("vision", 1, "head"): torch.tensor([1.0, 0.5, 1.0, 1.0]), ("text", 0, "neurons"): torch.ones(48)}
    units["text", 0, "neurons"][::3] = 0.25
    hard = {key: (mask == 1).float() for key, mask in units.items()}
    none = {tower: {**limit, "soft": 0.0} for tower, limit in SOFT.items()}
    model = oracle.model("clip")
    with masked(model, SOFT, units, heads_vote=False) as masks:
        softly = run("clip", model, values)
        same(softly, Eager("clip", SOFT, units=units)(values))
        with masks.hardened():
            same(run("clip", model, values), Eager("clip", none, units=hard)(values))
            assert masks.kept() == {("vision", 1, "head"): 3, ("text", 0, "neurons"): 32}
        assert masks.kept() == {("vision", 1, "head"): 4, ("text", 0, "neurons"): 48}
        again = run("clip", model, values)
    assert all(torch.equal(value, softly[key]) for key, value in again.items())
    differ(softly, Eager("clip", none, units=hard)(values))


# --- the parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_a_key_counts_so_many_times(causal):
    """A weight multiplies a key's share of the softmax, and gradients are those of that."""
    torch.manual_seed(1)
    query, key, value = (torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    times = torch.tensor([[1.0, 0.5, 0.25, 1.0, 0.0], [1.0, 0.0, 1.0, 0.125, 0.75]], dtype=torch.float64)

    def ours(query, key, value):
        mask = attention._heavier(None, times, query, causal)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.5)

    weights = (0.5 * query @ key.mT).exp() * times[:, None, None]
    weights = weights.tril() if causal else weights
    expected = weights / weights.sum(-1, keepdim=True) @ value
    torch.testing.assert_close(ours(query, key, value), expected)
    assert torch.autograd.gradcheck(ours, (query, key, value))
    found = torch.autograd.grad(ours(query, key, value).square().sum(), (query, key, value))
    wanted = torch.autograd.grad(expected.square().sum(), (query, key, value))
    torch.testing.assert_close(found, wanted)
    assert not found[2][0, :, 4].any()  # a key that does not count
    assert not found[1][0, :, 4].any()


def test_masked_columns():
    """Weights masked are activations masked, eq. (1); gradients reach weights, activations and the mask."""
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([1.0, 0.5, 0.0, 0.25], dtype=torch.float64, requires_grad=True)
    masked = torch.cat([part * m for part, m in zip(x.split(2, -1), mask, strict=True)], -1)
    torch.testing.assert_close(x @ masked_columns(weight, mask, 2).T, masked @ weight.T)
    assert torch.autograd.gradcheck(lambda x, w, m: x @ masked_columns(w, m, 2).T, (x, weight, mask))


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name):
    """Under soft masks, every parameter gets the gradient that it gets from the attention written out."""
    values = inputs(name)
    more = {"return_loss": True} if name == "clip" else {}

    def gradients(model):
        parameters = {key: p for key, p in model.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(model(**values, **more).loss, list(parameters.values()), allow_unused=True)
        return dict(zip(parameters, found, strict=True))

    eager = Eager(name, SOFT)
    with eager.installed(values):
        expected = gradients(eager.model)
    plain = gradients(oracle.model(name))
    with masked(oracle.model(name), SOFT):
        found = gradients(oracle.model(name))
    changed = 0
    for key, value in found.items():
        if expected[key] is None:
            assert value is None
            continue
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-4 * float(expected[key].abs().max()) + 1e-7)
        changed += float((value - plain[key]).abs().max()) > 1e-3 * float(value.abs().max())
    assert changed > len(found) / 2


def test_threshold():
    """Eq. (1): some are going, some gone; who is not free stays, and so does the best."""
    importance = torch.tensor([[0.0, 0.1, 0.3, 0.2, 0.4], [0.1, 0.1, 0.05, 0.0, 0.0]])
    free = torch.tensor([[False, True, True, True, True], [True, True, True, False, True]])
    alive = torch.tensor([[True, True, True, True, True], [True, True, True, True, False]])
    found = Threshold(going=0.3, gone=0.1, soft=0.5).mask(importance, free, alive)
    assert found.tolist() == [[1.0, 0.0, 0.5, 0.5, 1.0], [1.0, 1.0, 0.0, 1.0, 0.0]]
    few = Threshold(keep=(1.0, 0.5, 0.0))
    assert few.mask(importance, free, alive, 0).tolist() == [[1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0, 0.0]]
    assert few.mask(importance, free, alive, 1).tolist() == [[1.0, 0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0, 0.0]]
    assert few.mask(importance, free, alive, 2).tolist() == [[1.0, 0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0, 0.0]]
    assert [Threshold().active, few.active, Threshold(going=0.1).active] == [False, True, True]


def test_refuses():
    model = tiny.build("llava")
    values = inputs("llava", labels=False)
    with masked(model, SOFT):
        cache = model(**values, use_cache=True).past_key_values
    with masked(model, SOFT), pytest.raises(ValueError, match="past_key_values: holds tokens already"):
        model(input_ids=values["input_ids"][:, -1:], past_key_values=cache)
    model.train()
    model.gradient_checkpointing_enable()
    with masked(model, SOFT), pytest.raises(ValueError, match="CoMP: token pruning does not work with gradient"):
        model(**values)
