"""The structured methods: what they remove, and in which order."""

from __future__ import annotations

import copy

import pytest
import torch
from models import tiny

import vlprune_ext as vp
from vlprune_ext.anatomy import describe
from vlprune_ext.methods import UNITS
from vlprune_ext.methods.units.magnitude import unit_norms
from vlprune_ext.methods.units.structured import Task
from vlprune_ext.objectives import Contrastive, objective_named
from vlprune_ext.plan import Plan
from vlprune_ext.units.candidates import candidates, neuron_groups, tokens_of


@pytest.fixture(scope="module")
def clip():
    model = tiny.build("clip")
    return model, tiny.retrieval_data("clip", model, 24)


def counts(plan, kind):
    return {tower: sum(map(len, layers.values())) for tower, layers in plan.units(kind).items()}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", list(UNITS))
def test_budgets_are_met(clip, name, steps):
    model, data = clip
    keep = {"keep_heads": 0.75, "keep_neurons": 0.5, "keep_layers": 0.75}
    method = UNITS[name](**keep, scope="kind", neurons_per_group=8, steps=steps)
    plan = method.plan(model, data)
    plan.check(describe(model))
    assert counts(plan, "head") == {"vision": 4, "text": 3}  # of 16 and 12
    assert counts(plan, "neurons") == {"vision": 128, "text": 72}  # of 256 and 144
    assert {tower: len(layers) for tower, layers in plan.layers.items()} == {"vision": 1, "text": 1}  # of 4 and 3
    assert plan.method["name"] == name
    assert len(method.scores) > 0


@pytest.mark.parametrize("name", list(UNITS))
def test_uniform(clip, name):
    model, data = clip
    plan = UNITS[name](scope="layer", neurons_per_group=16, keep_neurons=0.5).plan(model, data)
    for tower, blocks in describe(model).shape().items():
        for layer in range(len(blocks)):
            assert len(plan.removed(tower, "head", layer)) == 2
            # Of four groups of 16 two go, of three one and a half, rounded up.
            assert len(plan.removed(tower, "neurons", layer)) == 32


def test_competing_kinds_share_one_budget(clip):
    model, data = clip
    method = vp.MoPE(scope="model", cost="params", neurons_per_group=8, keep_heads=0.5, keep_neurons=0.5, steps=2)
    plan = method.plan(model, data)
    pruned = copy.deepcopy(model)
    vp.apply(pruned, plan, round_to=1)
    width = sum(
        site.unit_params * site.units
        for tower in describe(model).towers.values()
        for block in tower.blocks
        for site in block.sites.values()
    )
    left = sum(p.numel() for p in pruned.parameters()) - (sum(p.numel() for p in model.parameters()) - width)
    assert left / width == pytest.approx(0.5, abs=0.02)
    assert counts(plan, "head") != {"vision": 8, "text": 6}


def test_one_shot_mope_removes_the_lowest(clip):
    model, data = clip
    method = vp.MoPE(steps=1, scope="kind", neurons_per_group=16, towers=("vision",))
    plan = method.plan(model, data)
    scores = method.scores
    heads = [scores.modules[i] for i in scores.ranking("vision", "head")]
    assert {(m.layer, m.index) for m in heads[:8]} == {(la, h) for la, hs in plan.heads["vision"].items() for h in hs}
    assert "text" not in plan.heads


def test_steps_score_again(clip):
    """The second half of a two-step plan is the one-shot plan of the half-pruned model."""
    model, data = clip
    fields = {"neurons_per_group": 16, "towers": ("vision",), "keep_neurons": 1.0}
    half = vp.MoPE(steps=1, keep_heads=0.75, **fields).plan(model, data)
    whole = vp.MoPE(steps=2, keep_heads=0.5, **fields).plan(model, data)
    scores = vp.score(model, data, modules=("head",), towers=("vision",), plan=half)
    lowest = [scores.modules[i] for i in scores.ranking()[:4]]
    expected = {(la, h) for la, hs in half.heads["vision"].items() for h in hs} | {(m.layer, m.index) for m in lowest}
    assert expected == {(la, h) for la, hs in whole.heads["vision"].items() for h in hs}


def test_progress_names_the_round(clip):
    model, data = clip
    fields = {"neurons_per_group": 16, "towers": ("vision",)}
    heard = []
    vp.MoPE(steps=2, keep_layers=0.5, **fields).plan(model, data, progress=lambda *said: heard.append(said))
    assert [what for what in dict.fromkeys(what for *_, what in heard) if what.endswith("block 2")] == [
        f"round {number} of 4, vision block 2" for number in (1, 2, 3, 4)
    ]
    assert all(0 <= done <= total for done, total, _ in heard)
    heard.clear()
    vp.MoPE(steps=1, **fields).plan(model, data, progress=lambda *said: heard.append(said))
    assert {what for *_, what in heard} == {f"vision block {layer}" for layer in range(4)}


def test_depth_is_judged_on_the_narrowed_model(clip):
    model, data = clip
    fields = {"neurons_per_group": 16, "steps": 1, "towers": ("vision",)}
    width = vp.MoPE(**fields).plan(model, data)
    both = vp.MoPE(keep_layers=0.75, **fields).plan(model, data)
    scores = vp.score(model, data, modules=("layer",), towers=("vision",), plan=width)
    per_parameter = scores.value / scores.cost
    assert both.layers["vision"] == [scores.modules[int(per_parameter.argmin())].layer]
    at_once = vp.MoPE(keep_layers=0.75, stage="pretrain", **fields)
    at_once.plan(model, data)
    assert {m.kind for m in at_once.scores.modules} == {"head", "neurons", "layer"}


def test_planning_changes_nothing(clip):
    model, data = clip
    before = {name: p.detach().clone() for name, p in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    for method in UNITS.values():
        method(neurons_per_group=16, rewire=True).plan(model, data)
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())


def test_a_budget_in_flops(clip):
    """Both towers share one budget; what is left is half of what could go, to within a module."""
    model, data = clip
    anatomy, towers, kinds = describe(model), ("vision", "text"), ("head", "neurons")
    method = vp.MoPE(scope="model", neurons_per_group=8, steps=2)
    plan = method.plan(model, data)
    tokens = tokens_of(anatomy, towers, data, Contrastive())
    groups = neuron_groups(anatomy, towers, 8)
    every = [c.cost for c in candidates(anatomy, towers, kinds, groups, tokens=tokens)]
    left = sum(c.cost for c in candidates(anatomy, towers, kinds, groups, plan, tokens))
    assert left == pytest.approx(sum(every) / 2, abs=max(every))


def test_random_follows_its_seed(clip):
    model, data = clip
    plans = [vp.Random(seed=seed, neurons_per_group=8).plan(model, data) for seed in (0, 0, 1)]
    assert plans[0].heads == plans[1].heads
    assert plans[0].neurons == plans[1].neurons
    assert plans[0].heads != plans[2].heads


def test_magnitude_by_hand(clip):
    model, _ = clip
    block = describe(model).tower("vision").blocks[0]
    attention = block.module.self_attn
    head = slice(8, 16)  # the second of four heads of eight
    expected = sum(p.weight[head].abs().sum() for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    expected = expected + attention.out_proj.weight[:, head].abs().sum()
    assert unit_norms(block.sites["head"])[1].item() == pytest.approx(expected.item(), rel=1e-5)
    mlp = block.module.mlp
    expected = mlp.fc1.weight[5].abs().sum() + mlp.fc2.weight[:, 5].abs().sum()
    assert unit_norms(block.sites["neurons"])[5].item() == pytest.approx(expected.item(), rel=1e-5)


def test_magnitude_of_a_fused_projection():
    model = tiny.build("blip_itr")
    block = describe(model).tower("vision").blocks[0]
    attention = block.module.self_attn
    rows = attention.qkv.weight.view(3, 4, 8, -1)[:, 2]
    expected = rows.abs().sum() + attention.projection.weight[:, 16:24].abs().sum()
    assert unit_norms(block.sites["head"])[2].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("name", ["clip", "llava"])
def test_taylor_equals_finite_differences(name, per_sample):
    """The slope of the objective in a gate, by moving the gate."""
    model = tiny.build(name).double()
    data = tiny.retrieval_data(name, model, 5)
    data.images["pixel_values"] = data.images["pixel_values"].double()
    objective = objective_named("contrastive" if name == "clip" else "lm_loss")
    anatomy, tower = describe(model), "text"
    groups = neuron_groups(anatomy, (tower,), 16)
    task = Task(
        anatomy, data, objective, (tower,), ("head", "neurons"), groups, None, Plan(anatomy.shape()), None, None
    )
    scores = vp.Taylor(objective=objective, per_sample=per_sample, batch_size=2).importance(task)
    if per_sample:  # by the triangle inequality
        assert (scores.value >= vp.Taylor(objective=objective).importance(task).value - 1e-9).all()
        return
    other = objective.other(anatomy, tower, data, 5)
    if other is not None:
        other = other.detach()
    for kind, layer, index in (("head", 0, 1), ("neurons", 2, 0)):
        site = anatomy.tower(tower).blocks[layer].sites[kind]
        width = site.width * (16 if kind == "neurons" else 1)
        values = []
        for step in (1e-3, -1e-3):
            gate = torch.ones(site.out.in_features, dtype=torch.float64)
            gate[index * width : (index + 1) * width] += step
            handle = site.out.register_forward_pre_hook(lambda _, args, _g=gate: (args[0] * _g,))
            with torch.no_grad():
                out = objective.run(anatomy, tower, data, 5)
            handle.remove()
            values.append(objective.values(anatomy, tower, out.double(), other, data).double().mean())
        slope = ((values[0] - values[1]) / 2e-3).abs().item()
        assert scores.get(tower, kind, layer, index) == pytest.approx(slope, rel=0.02, abs=1e-5)


@pytest.mark.parametrize("name", ["clip", "llava"])
def test_early_stopping_agrees_where_it_is_sure(name):
    model = tiny.build(name)
    data = tiny.retrieval_data(name, model, 128)
    fields = {"objective": "contrastive" if name == "clip" else "lm_loss", "steps": 1, "neurons_per_group": 16}
    exact, early = vp.MoPE(**fields), vp.MoPE(exact=False, **fields)
    exact.plan(model, data)
    early.plan(model, data)
    assert early.scores.block_runs < exact.scores.block_runs
    full = early.scores.count == data.n_images
    assert 0 < full.sum() < len(full)  # some modules were decided early, those near the cut were not
    torch.testing.assert_close(early.scores.value[full], exact.scores.value[full], rtol=0, atol=1e-4)
    assert torch.equal(early.scores.samples.isfinite().sum(1), early.scores.count)
    assert early.scores.dense == pytest.approx(exact.scores.dense, abs=1e-5)
    sure = (early.scores.value - exact.scores.value).abs() <= 6 * early.scores.error + 1e-6
    assert sure.all()
    assert (early.scores.error >= 0.5 * exact.scores.error).all()


@pytest.mark.parametrize("objective", ["recall@1", "zero_shot", "margin"])
def test_early_stopping_by_any_objective(clip, objective):
    """Without a gradient samples are drawn evenly; class prompts are not sampled at all."""
    model, data = clip
    method = vp.MoPE(exact=False, objective=objective, steps=1, neurons_per_group=16)
    method.plan(model, data)
    text = method.scores.where("text")
    if objective == "zero_shot":
        assert (method.scores.count[text] == data.n_images).all()
    assert method.scores.value.isfinite().all()
    assert method.scores.count.min() < data.n_images


def test_early_stopping_never_stops_at_infinite_confidence(clip):
    model, data = clip
    fields = {"steps": 1, "neurons_per_group": 16}
    exact = vp.MoPE(**fields)
    careful = vp.MoPE(exact=False, confidence=1e9, **fields)
    assert exact.plan(model, data).heads == careful.plan(model, data).heads
    torch.testing.assert_close(exact.scores.value, careful.scores.value, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep_heads": 0.0}, "keep_heads: 0.0, expected a share"),
        ({"keep_neurons": 1.5}, "keep_neurons: 1.5"),
        ({"keep_layers": -1}, "keep_layers: -1"),
        ({"stage": "both"}, "stage: 'both'"),
        ({"scope": "global"}, "scope: 'global'"),
        ({"steps": 0}, "steps: 0"),
        ({"cost": "bytes"}, "cost: 'bytes'"),
        ({"objective": "x"}, "objective: 'x'"),
    ],
)
def test_bad_fields(fields, message):
    for method in UNITS.values():
        with pytest.raises(ValueError, match=message):
            method(**fields)


def test_taylor_needs_a_gradient():
    with pytest.raises(ValueError, match="'retrieval' has no gradient"):
        vp.Taylor(objective="retrieval")


def test_unknown_tower(clip):
    model, data = clip
    with pytest.raises(ValueError, match="'audio', expected some of vision, text"):
        vp.MoPE(towers=("audio",)).plan(model, data)
