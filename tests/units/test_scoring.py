"""`score`, `plan_cost` and the numbers around them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from models import tiny

import vlprune_ext as vp
from vlprune_ext.anatomy import describe
from vlprune_ext.anatomy.flops import count_flops
from vlprune_ext.objectives import Contrastive, objective_named
from vlprune_ext.plan import Module, Plan
from vlprune_ext.units.candidates import candidates, neuron_groups, rewired_order, tokens_of


@pytest.fixture(scope="module")
def clip():
    model = tiny.build("clip")
    return model, tiny.retrieval_data("clip", model, 40)


def naive_drop(model, data, plan):
    """Mean drop of the contrastive objective, by running the whole model with a plan masked in."""
    before = vp.evaluate(model, data, "contrastive")["contrastive_loss"]
    with vp.masked(model, plan):
        return vp.evaluate(model, data, "contrastive")["contrastive_loss"] - before


def test_every_score_is_the_naive_one(clip):
    model, data = clip
    scores = vp.score(model, data, modules=("head", "neurons", "layer"), neurons_per_group=16)
    shape = describe(model).shape()
    assert len(scores) == sum(b["head"] + b["neurons"] // 16 + 1 for blocks in shape.values() for b in blocks)
    for module, value in scores:
        plan = Plan(shape)
        units = {"head": [module.index], "layer": []}.get(module.kind)
        if units is None:
            units = list(range(16 * module.index, 16 * module.index + 16))
        plan.add(module.tower, module.kind, module.layer, units)
        assert value == pytest.approx(naive_drop(model, data, plan), abs=1e-5), module
        assert scores.get(*module) == value
    assert scores.dense == pytest.approx(-vp.evaluate(model, data, "contrastive")["contrastive_loss"], abs=1e-5)


def test_errors_are_those_of_paired_differences(clip):
    model, data = clip
    scores = vp.score(model, data, modules=("head",))
    assert scores.samples.shape == (len(scores), data.n_images)
    expected = scores.samples.double().std(1, correction=1) / math.sqrt(data.n_images)
    torch.testing.assert_close(scores.error, expected)
    assert (scores.count == data.n_images).all()
    pairs = scores.indistinguishable()
    order = scores.ranking()
    for a, b in pairwise(order):
        difference = (scores.samples[b] - scores.samples[a]).double()
        z = difference.mean().abs() / (difference.std(correction=1) / math.sqrt(len(difference)))
        assert ((a, b) in pairs) == (z.item() <= 1.96)


def test_grouped_query_heads_go_together():
    model = tiny.build("llava")
    data = tiny.retrieval_data("llava", model, 6)
    scores = vp.score(model, data, modules=("head",), towers=("text",), objective="lm_loss")
    assert {m.index for m in scores.modules} == {0, 1}  # two key/value heads of two query heads each


def test_scores_of_a_partly_pruned_model(clip):
    model, data = clip
    plan = Plan(describe(model).shape())
    plan.add("vision", "head", 0, [0, 3])
    plan.add("vision", "neurons", 1, list(range(20)))
    plan.add("vision", "layer", 2, [])
    scores = vp.score(
        model, data, towers=("vision",), neurons_per_group=16, plan=plan, modules=("head", "neurons", "layer")
    )
    assert not [m for m in scores.modules if m.layer == 2]
    assert [m.index for m in scores.modules if m.layer == 0 and m.kind == "head"] == [1, 2]
    # Group 0 of layer 1 is gone, of group 1 the last 12 neurons are left.
    assert [m.index for m in scores.modules if m.layer == 1 and m.kind == "neurons"] == [1, 2, 3]
    with vp.masked(model, plan):
        before = vp.evaluate(model, data, "contrastive")["contrastive_loss"]
    more = Plan.from_dict(__import__("json").loads(plan.to_json()))
    more.add("vision", "neurons", 1, list(range(16, 32)))
    with vp.masked(model, more):
        after = vp.evaluate(model, data, "contrastive")["contrastive_loss"]
    assert scores.get("vision", "neurons", 1, 1) == pytest.approx(after - before, abs=1e-5)


def test_cost_is_the_parameters_that_go():
    model = tiny.build("clip")
    groups = neuron_groups(describe(model), ("vision",), 24)
    for candidate in candidates(describe(model), ("vision",), ("head", "neurons", "layer"), groups):
        pruned = tiny.build("clip")
        plan = Plan(describe(pruned).shape())
        module = candidate.module
        plan.add(module.tower, module.kind, module.layer, list(candidate.intervention.units))
        vp.apply(pruned, plan, round_to=1)
        assert candidate.cost == sum(p.numel() for p in model.parameters()) - sum(
            p.numel() for p in pruned.parameters()
        )


@pytest.mark.parametrize("name", ["clip", "llava"])
def test_attention_is_counted_on_every_device(name):
    model = tiny.build(name)
    data = tiny.retrieval_data(name, model, 2)
    fused = vp.measure(model, data)["flops"]
    model.set_attn_implementation("eager")  # plain matrix products, which torch counts everywhere
    assert vp.measure(model, data)["flops"] == fused


@pytest.mark.parametrize("name", ["clip", "llava"])
def test_cost_in_flops(name):
    """What torch counts less without a module; it does not count biases and norms."""
    model = tiny.build(name)
    data, tower = tiny.retrieval_data(name, model, 3), "text" if name == "llava" else "vision"
    objective = objective_named(None, describe(model))

    def counted(subject):
        anatomy = describe(subject)
        batch = objective.batches(anatomy, tower, data.subset(1), 1)[0]
        with torch.no_grad():
            return count_flops(lambda: objective.outputs(anatomy, tower, batch))

    tokens = tokens_of(describe(model), (tower,), data, objective)
    groups = neuron_groups(describe(model), (tower,), 24)
    for candidate in candidates(describe(model), (tower,), ("head", "neurons", "layer"), groups, tokens=tokens)[:6]:
        pruned = tiny.build(name)
        plan = Plan(describe(pruned).shape())
        module = candidate.module
        plan.add(module.tower, module.kind, module.layer, list(candidate.intervention.units))
        vp.apply(pruned, plan, round_to=1)
        assert candidate.cost == pytest.approx(counted(model) - counted(pruned), rel=0.06)


def test_rewired_groups(clip):
    model, data = clip
    anatomy = describe(model)
    order = rewired_order(anatomy, ("vision",), data, Contrastive(), 16)
    with torch.no_grad():
        seen = []
        site = anatomy.tower("vision").blocks[1].sites["neurons"]
        handle = site.out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model.get_image_features(**data.images)
        handle.remove()
    importance = seen[0].flatten(0, 1).double().pow(2).sum(0).sqrt() * site.out.weight.double().norm(dim=0)
    assert (importance[order["vision"][1]].diff() <= 1e-9).all()
    scores = vp.score(model, data, modules=("neurons",), towers=("vision",), neurons_per_group=16, rewire=True)
    assert scores.neurons["vision"][1][0] == order["vision"][1][:16].tolist()


def test_uneven_groups():
    groups = neuron_groups(describe(tiny.build("clip")), ("text",), 20)  # 48 neurons
    assert [len(g) for g in groups["text"][0]] == [20, 20, 8]


def test_files(clip, tmp_path):
    model, data = clip
    scores = vp.score(model, data, modules=("head", "layer"))
    for name in ("scores.json", "scores.csv"):
        scores.save(tmp_path / name)
        back = vp.Scores.load(tmp_path / name)
        assert back.modules == scores.modules
        assert torch.equal(back.value, scores.value)
        assert torch.equal(back.error, scores.error)
        assert torch.equal(back.cost, scores.cost)
    with pytest.raises(ValueError, match="not kept in files"):
        back.indistinguishable()
    with pytest.raises(ValueError, match="not a plan file"):
        vp.Plan.load(tmp_path / "scores.json")


def test_the_choice_of_stack_height_changes_nothing(clip):
    model, data = clip
    values = [vp.score(model, data, modules=("head",), stacked_rows=rows).value for rows in (8, 32, 500)]
    for other in values[1:]:
        torch.testing.assert_close(values[0], other, rtol=0, atol=1e-5)


def test_progress_reaches_the_total(clip):
    model, data = clip
    calls = []
    vp.score(model, data, modules=("head",), towers=("text",), progress=lambda *call: calls.append(call))
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert done[-1] == calls[-1][1]


def test_plan_cost(clip):
    model, data = clip
    cost = vp.plan_cost(model, data, modules=("head", "neurons", "layer"), neurons_per_group=16)
    scores = vp.score(model, data, modules=("head", "neurons", "layer"), neurons_per_group=16)
    assert cost["block_runs"] == scores.block_runs < cost["naive_block_runs"]
    assert cost["modules"] == len(scores)
    assert cost["towers"]["vision"]["stream_bytes"] == 40 * 10 * 32 * 4
    assert cost["seconds"] > 0
    assert cost["flops"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modules": ("heads",)}, "'heads', expected some of head"),
        ({"modules": ()}, "none given"),
        ({"towers": ("audio",)}, "'audio', expected some of vision, text"),
        ({"objective": "bleu"}, "'bleu', expected one of"),
        ({"neurons_per_group": 0}, "neurons_per_group: 0"),
        ({"cost": "bytes"}, "cost: 'bytes', expected one of params, flops"),
        ({"exact": False}, "pools: needed with exact=False"),
        ({"modules": ("cross_head",)}, "no cross_head left"),
    ],
)
def test_bad_input(clip, arguments, message):
    model, data = clip
    with pytest.raises(ValueError, match=message):
        vp.score(model, data, **arguments)


def test_not_finite_is_named():
    model = tiny.build("clip")
    data = tiny.retrieval_data("clip", model, 6)
    data.images["pixel_values"][4] = math.nan
    with pytest.raises(ValueError, match=r"NaN|not finite"):
        vp.score(model, data, modules=("head",))


def test_module_names():
    assert str(Module("vision", "head", 3, 5)) == "vision.3.head5"
    assert str(Module("text", "layer", 2)) == "text.2"
