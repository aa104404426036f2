"""What models say once planned tokens have left, with a key-value cache that never held them."""

from __future__ import annotations

import pytest
import torch
from comp.eager import HARD, KEEP, Eager, inputs, schedules
from models import tiny
from tokens import oracle

import vlprune_ext as vp
from vlprune_ext.tokens.planned import PlannedTokens


@pytest.mark.parametrize("limits", [HARD, KEEP], ids=["threshold", "keep"])
def test_llava_generates(limits):
    """With a cache that never held what left: every token is the one that the dense model gives that sees as much."""
    values = oracle.prompts("llava", 3, "left")
    model, length = oracle.model("llava"), values["input_ids"].shape[1]
    limits = {"text": limits["text"]}
    with vp.prune_tokens(model, PlannedTokens(schedules("llava", limits))) as pruning:
        found = model.generate(**values, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    eager = Eager("llava", limits)
    eager(values)
    for layer in pruning.kept:
        assert torch.equal(pruning.kept[layer], eager.entered["text", layer])
    kept = {k: torch.nn.functional.pad(v, (0, 5), value=True) for k, v in pruning.kept.items()}
    logits = oracle.logits_with(oracle.model("llava", "eager"), oracle.grown(values, found), kept)
    logits[..., tiny.EOS] = -torch.inf  # none of so many tokens is the end
    assert torch.equal(found[:, length:], logits[:, length - 1 : -1].argmax(-1))


@pytest.mark.parametrize("name", ["llava", "paligemma"])
def test_generates_behind_a_pruned_vision_tower(name):
    """The first token is what the masked model says; beams are copies of their sample."""
    values, model = oracle.prompts(name, 3, "left"), oracle.model(name)
    eager = Eager(name, HARD)
    with eager.installed(values), torch.no_grad():
        logits = eager.model(**values).logits[:, -1]
    logits[..., tiny.EOS] = -torch.inf
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with vp.prune_tokens(model, PlannedTokens(schedules(name, HARD))):
        found = model.generate(**values, **settings)
        beams = model.generate(**values, **settings, num_beams=2)
        one = {key: value[1:2] for key, value in values.items()}
        alone = model.generate(**one, **settings, num_beams=2)
    assert torch.equal(found[:, -3], logits.argmax(-1))
    assert torch.equal(alone[0], beams[1])


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("limits", [HARD, KEEP], ids=["threshold", "keep"])
def test_blip_generates(limits, beams):
    model, changed = oracle.model("blip_vqa"), 0
    settings = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "output_logits": True}
    settings |= {"return_dict_in_generate": True}
    with vp.prune_tokens(model, PlannedTokens(schedules("blip_vqa", limits))):
        for seed in (0, 3):  # one batch after another
            values = {k: inputs("blip_vqa", 3, seed)[k] for k in ("pixel_values", "input_ids", "attention_mask")}
            eager = Eager("blip_vqa", limits)
            dense = oracle.model("blip_vqa", "eager").generate(**values, **settings)
            with eager.installed(values):
                expected = eager.model.generate(**values, **settings)
            found = model.generate(**values, **settings)
            assert torch.equal(found.sequences, expected.sequences)
            for step, wanted in zip(found.logits, expected.logits, strict=True):
                oracle.close(step, wanted)
            changed += float((found.logits[0] - dense.logits[0]).abs().max()) > 1e-3
    assert changed == 2
