"""What `examine` finds units worth, against eqs. (3) and (4) on activations that plain hooks caught."""

from __future__ import annotations

import math

import pytest
import torch
from comp.eager import CLS, HARD, Eager, inputs
from comp.masking import masked
from models import tiny
from tokens import oracle

from vlprune_ext.anatomy import describe
from vlprune_ext.anatomy.patch import Patches
from vlprune_ext.comp.masks import Masks, examine, inputs_of
from vlprune_ext.objectives import objective_named

NAMES = ("clip", "blip_vqa", "llava")


def batches_of(name, model, n=5, size=2):
    """(objective, tower -> batches as an objective feeds them)"""
    objective = objective_named("retrieval" if name == "clip" else "exact_match")
    return objective, inputs_of(describe(model), objective, tiny.retrieval_data(name, model, n), size)


def caught(name, objective, batches, limits):
    """(site -> [(x [B, T, C], importance of this or of the next layer, alive [B, T])], one of each batch)."""
    eager = Eager(name, limits)
    found, now, answers = {}, {}, []

    def catch(key):
        return lambda _, args: now.__setitem__(key, args[0])

    with Patches() as patches:
        for t, tower in eager.anatomy.towers.items():
            for layer, block in enumerate(tower.blocks):
                for kind, site in block.sites.items():
                    patches.pre_hook(site.out, catch((t, layer, kind)))
        if name == "blip_vqa":
            decoder = eager.model.text_decoder.bert
            patches.pre_hook(decoder, lambda _, a, k: answers.append(k["attention_mask"]), with_kwargs=True)
        for tower, batch in ((tower, batch) for tower, of_tower in batches.items() for batch in of_tower):
            now.clear()
            whole = {**inputs(name, len(next(iter(batch.values())))), **batch}  # CLIP: one tower runs
            with eager.installed(whole), torch.no_grad():
                objective.outputs(eager.anatomy, tower, batch)
            for (t, layer, kind), x in now.items():
                of = t, min(layer + (kind == "neurons"), len(eager.anatomy.tower(t)) - 1)
                alive = eager.entered.get(of)
                if alive is None:  # BLIP's decoder, of which nothing leaves
                    alive = torch.ones(x.shape[:2]) if answers[-1] is None else answers[-1].bool()
                found.setdefault((t, layer, kind), []).append((x, eager.importance.get(of), alive))
    return found


def by_hand(weight, parts, cls, weigh):
    """[C] by eq. (4), or by eq. (3): w is 1 for what is no padding."""
    total, samples = 0.0, 0
    for x, importance, alive in parts:
        for b in range(len(x)):
            w = alive[b].double()
            if weigh and importance is not None:
                rest = importance[b].clone()
                rest[:cls] = 0
                rest[~alive[b]] = 0
                w = rest / rest.sum()
                w[:cls] = 1
            total = total + (w[:, None] * x[b].double() ** 2).sum(0)
            samples += 1
    norm = (total / samples).sqrt()
    rows = weight.shape[0]
    return torch.stack([weight[:, i].double().abs().sum() / rows * norm[i] for i in range(weight.shape[1])])


@pytest.mark.parametrize("weigh", [True, False], ids=["cip", "plain"])
@pytest.mark.parametrize("limits", [{}, HARD], ids=["dense", "tokens"])
@pytest.mark.parametrize("name", NAMES)
def test_units(name, limits, weigh):
    model = oracle.model(name)
    objective, batches = batches_of(name, model)
    with masked(model, limits) as masks:
        found = examine(masks, objective, batches, weigh_tokens=weigh)
    expected = caught(name, objective, batches, limits)
    assert found.units.keys() == expected.keys() == masks.sites.keys()
    for key, parts in expected.items():
        site = masks.sites[key]
        score = by_hand(site.out.weight.detach(), parts, CLS[name].get(key[0], 0), weigh)
        score = torch.stack([part.mean() for part in score.split(site.width)])
        torch.testing.assert_close(
            found.units[key].double(), score, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("name", NAMES)
def test_tokens_say_something(name):
    """With weights and without, the order of units is another one."""
    model = oracle.model(name)
    objective, batches = batches_of(name, model)
    with masked(model, {}) as masks:
        found = [examine(masks, objective, batches, weigh_tokens=weigh).units for weigh in (True, False)]
    assert any(not torch.equal(a.argsort(), found[1][key].argsort()) for key, a in found[0].items())


@pytest.mark.parametrize("name", NAMES)
def test_batches_do_not_matter(name):
    model = oracle.model(name)
    scores = []
    for size in (1, 2, 5):
        objective, batches = batches_of(name, model, size=size)
        with masked(model, HARD) as masks:
            scores.append(examine(masks, objective, batches).units)
    for key, value in scores[0].items():
        for other in scores[1:]:
            torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-6)


def test_what_is_masked_is_worth_nothing():
    """Units are scored as they are: a neuron held at zero has no activations; examining leaves no hook behind."""
    model = tiny.build("clip")
    objective, batches = batches_of("clip", model)
    gone = {("vision", 1, "neurons"): torch.ones(64).index_fill_(0, torch.tensor([3, 9]), 0)}
    with masked(model, {}, gone) as masks:
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        model.train()
        score = examine(masks, objective, batches).units["vision", 1, "neurons"]
        assert model.training
        assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
        assert masks.flow.on_importance is None
    assert (score == 0).nonzero().flatten().tolist() == [3, 9]


def test_a_run_that_fails():
    model = tiny.build("clip")
    objective, batches = batches_of("clip", model)
    batches["text"][-1] = {key: value[:, :0] for key, value in batches["text"][-1].items()}
    masks = Masks(describe(model))
    with Patches() as patches:
        masks.install(patches)
        with pytest.raises((RuntimeError, IndexError, ValueError)):
            examine(masks, objective, batches)
        assert masks.flow.on_importance is None
        score = examine(masks, objective, {"vision": batches["vision"]}).units["vision", 0, "head"]
    assert math.isfinite(float(score.sum()))
