"""What masks only pretend, carried out: units that are gone from the weights, tokens that no block computes."""

from __future__ import annotations

import json
import random

import pytest
import torch
from comp.eager import HARD, KEEP, NAMES, Eager, differ, inputs, run, same, schedules
from comp.masking import masked
from models import tiny
from tokens import oracle

import vlprune_ext as vp
from vlprune_ext.anatomy import describe
from vlprune_ext.anatomy.patch import Patches
from vlprune_ext.comp.masks import Masks
from vlprune_ext.comp.modes import UnitMode
from vlprune_ext.plan import Plan
from vlprune_ext.tokens.planned import PlannedTokens


def some_units(name, seed=0):
    """(tower, layer, kind) -> [units] of 0 and 1, at least one of each site."""
    draw, found = random.Random(seed), {}
    for tower, blocks in describe(oracle.model(name)).shape().items():
        for layer, sites in enumerate(blocks):
            for kind, count in sites.items():
                mask = torch.ones(count)
                mask[draw.sample(range(count), draw.randrange(count))] = 0
                found[tower, layer, kind] = mask
    return found


def votes_of(name, units):
    groups = {"llava": 2, "paligemma": 2}.get(name, 1)
    return {
        (tower, layer): mask.repeat_interleave(groups if tower == "text" else 1)
        for (tower, layer, kind), mask in units.items()
        if kind == "head"
    }


def plan_of(name, units, limits=None):
    plan = Plan(describe(oracle.model(name)).shape())
    for (tower, layer, kind), mask in units.items():
        plan.add(tower, kind, layer, (mask == 0).nonzero().flatten().tolist())
    plan.tokens = schedules(name, limits or {})
    return plan


@pytest.mark.parametrize("name", ["clip", "blip_vqa", "llava"])
def test_units(name):
    """A mode that has settled: its masks, the plan it writes, and the model without its units all say the same."""
    values, units = inputs(name), some_units(name)
    expected = Eager(name, units=units)(values)
    model = tiny.build(name)
    masks = Masks(describe(model))
    mode = UnitMode("all", masks, units)
    for key, mask in units.items():
        mode.going[key] |= mask == 0
    with Patches() as patches:
        masks.install(patches)
        mode.soften(1.0)
        same(run(name, model, values), run(name, oracle.model(name), values))
        mode.settle()
        same(run(name, model, values), expected)
    plan = Plan(masks.anatomy.shape())
    mode.write(plan, None)
    vp.apply(model, plan, round_to=1)
    same(run(name, model, values), expected)
    for (tower, layer, kind), mask in units.items():
        assert describe(model).shape()[tower][layer][kind] == int(mask.sum())


@pytest.mark.parametrize("towers", [("vision",), ("text",), ("vision", "text")], ids="+".join)
@pytest.mark.parametrize("limits", [HARD, KEEP], ids=["threshold", "keep"])
@pytest.mark.parametrize("name", NAMES)
def test_tokens(name, limits, towers):
    """Taken out, they leave what they leave when nobody sees them."""
    values = inputs(name)
    limits = {tower: limits[tower] for tower in towers}
    expected = Eager(name, limits)(values)
    model = oracle.model(name)
    widths = {}

    def count(block, args, kwargs, key):
        widths[key] = (args[0] if args else kwargs["hidden_states"]).shape[1]

    anatomy = describe(model)
    attention = {(t, i): b.sites["head"].attention for t in towers for i, b in enumerate(anatomy.tower(t).blocks)}
    with vp.prune_tokens(model, PlannedTokens(schedules(name, limits))), Patches() as patches:
        for key, module in attention.items():
            patches.pre_hook(module, lambda m, a, k, key=key: count(m, a, k, key), with_kwargs=True)
        found = run(name, model, values)
    same(found, expected)
    differ(found, run(name, model, values))
    eager = Eager(name, limits)
    eager(values)
    for (tower, layer), alive in eager.entered.items():
        if (tower, layer) in widths:  # as many as the sample with the most
            most = max(int(row.sum()) for row in alive) if layer else widths[tower, layer]
            assert widths[tower, layer] == most, (tower, layer)


@pytest.mark.parametrize("types", ["prompt only", "none"])
def test_tokens_under_other_masks(types):
    """What leaves is the same, masked or taken out, whoever may see whom: answers within the prefix, or no prefix."""
    name, model = "paligemma", oracle.model("paligemma")
    values, limits = inputs(name), {"text": HARD["text"]}
    if types == "none":
        values.pop("token_type_ids")
    else:
        values["token_type_ids"] = torch.zeros_like(values["token_type_ids"])
    with masked(model, limits):
        expected = run(name, model, values)
    with vp.prune_tokens(model, PlannedTokens(schedules(name, limits))):
        found = run(name, model, values)
    same(found, expected)
    differ(found, run(name, model, values))


@pytest.mark.parametrize("limits", [HARD, KEEP], ids=["threshold", "keep"])
@pytest.mark.parametrize("name", ["clip", "blip_vqa", "llava"])
def test_a_plan_with_both(name, limits, tmp_path):
    """Units and tokens of one plan, applied; through JSON and a checkpoint; heads that are gone have no say."""
    values, units = inputs(name), some_units(name, 1)
    expected = Eager(name, limits, votes=votes_of(name, units), units=units)(values)
    plan = Plan.from_dict(json.loads(plan_of(name, units, limits).to_json()))
    assert plan.to_json() == plan_of(name, units, limits).to_json()
    model = tiny.build(name)
    vp.apply(model, plan, round_to=1)
    vp.save_pruned(model, tmp_path / "pruned")
    for one in (model, vp.load_pruned(tmp_path / "pruned").eval()):
        with vp.prune_tokens(one):
            same(run(name, one, values), expected)
        same(run(name, one, values), Eager(name, units=units)(values))


def test_places_of_what_left():
    """Behind a tower's last block tokens stand where they stood; who left is zero, fillers too."""
    model, values = oracle.model("clip"), inputs("clip")
    with vp.prune_tokens(model, PlannedTokens({"vision": {"threshold": 0.1}})) as pruning, torch.no_grad():
        states = model.vision_model(values["pixel_values"]).last_hidden_state
    left = pruning.kept[max(pruning.kept)]
    assert len(set(left.sum(1).tolist())) > 1  # so that there are fillers
    assert torch.equal(states.ne(0).any(-1), left)


@pytest.mark.parametrize("limits", [HARD, KEEP], ids=["threshold", "keep"])
@pytest.mark.parametrize("seed", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_zeroed_heads_do_not_vote(name, seed, limits):
    """mode="mask": they are there, and eq. (7) leaves them out."""
    values, units = inputs(name), some_units(name, seed)
    expected = Eager(name, limits, votes=votes_of(name, units), units=units)(values)
    model = tiny.build(name)
    vp.apply(model, plan_of(name, units, limits), mode="mask")
    with vp.prune_tokens(model):
        found = run(name, model, values)
    same(found, expected)
    differ(found, Eager(name, limits, units=units)(values), by=1e-4)


def test_a_block_without_heads():
    """One head stays in a block that loses all, zeroed: nobody votes, and nothing leaves behind that block."""
    units = {("vision", 1, "head"): torch.zeros(4)}
    values = inputs("clip")
    model = tiny.build("clip")
    vp.apply(model, plan_of("clip", units, {"vision": HARD["vision"]}))
    with vp.prune_tokens(model) as pruning:
        found = run("clip", model, values)
    votes = {("vision", 1): torch.zeros(4)}
    eager = Eager("clip", {"vision": HARD["vision"]}, votes=votes, units=units)
    same(found, eager(values))
    assert torch.equal(pruning.kept[1], pruning.kept[2])


@pytest.mark.parametrize("limits", [HARD, KEEP], ids=["threshold", "keep"])
def test_a_plan_that_takes_blocks_too(limits):
    """Shares belong to the blocks that are left."""
    plan = plan_of("clip", {}, {"vision": limits["vision"]})
    plan.add("vision", "layer", 1, [])
    model, values = tiny.build("clip"), inputs("clip")
    vp.apply(model, plan)
    with vp.prune_tokens(model):
        found = run("clip", model, values)
    schedule = schedules("clip", {"vision": limits["vision"]})["vision"]
    if "keep" in schedule:
        schedule["keep"] = [share for layer, share in enumerate(schedule["keep"]) if layer != 1]
    with vp.prune_tokens(model, PlannedTokens({"vision": schedule})):
        same(found, run("clip", model, values))


def test_the_last_word_counts():
    """Of two plans with tokens of one tower, the later one."""
    model = tiny.build("clip")
    for limits in (KEEP, {"vision": HARD["vision"]}):
        vp.apply(model, plan_of("clip", {}, limits))
    values = inputs("clip")
    with vp.prune_tokens(model):
        found = run("clip", model, values)
    same(found, Eager("clip", {"vision": HARD["vision"], "text": KEEP["text"]})(values))


def test_of_its_own_batch():
    """What another sample keeps changes nothing, taken out or not."""
    for name in ("clip", "llava"):
        values, model = inputs(name, 4, labels=False), oracle.model(name)
        with vp.prune_tokens(model, PlannedTokens(schedules(name, HARD))), torch.no_grad():
            together = model(**values)
            for sample, valid in enumerate(values["attention_mask"].bool()):
                one = {key: value[sample : sample + 1] for key, value in values.items()}
                one |= {key: one[key][:, valid] for key in ("input_ids", "attention_mask")}
                alone = model(**one)
                if name == "clip":
                    oracle.close(alone.image_embeds[0], together.image_embeds[sample])
                    oracle.close(alone.text_embeds[0], together.text_embeds[sample])
                else:
                    oracle.close(alone.logits[0, -1], together.logits[sample, valid][-1])


# --- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"audio": {"threshold": 0.1}}, "tokens of tower 'audio'; the model's towers are vision, text"),
        ({"vision": {}}, r"tokens of vision: \{\}, expected"),
        ({"vision": {"threshold": 1.5}}, "tokens of vision: "),
        ({"vision": {"threshold": float("nan")}}, "tokens of vision: "),
        ({"vision": {"threshold": True}}, "tokens of vision: "),
        ({"vision": {"threshold": 0.1, "keep": [1.0] * 4}}, "tokens of vision: "),
        ({"vision": {"keep": [1.0] * 3}}, "shares of 4 blocks"),
        ({"vision": {"keep": [1.0, 0.5, -0.1, 0.2]}}, "shares of 4 blocks"),
        ({"vision": {"keep": [1.0, 0.5, "0.1", 0.2]}}, "shares of 4 blocks"),
        ({"vision": {"share": [1.0] * 4}}, "tokens of vision: "),
    ],
)
def test_malformed(tokens, message):
    model = tiny.build("clip")
    before = tiny.digest(model)
    plan = Plan(describe(model).shape(), tokens=tokens)
    with pytest.raises(ValueError, match=message):
        vp.apply(model, plan)
    assert tiny.digest(model) == before
    assert getattr(model, "vlprune", None) is None


def test_towers_that_cannot():
    model = tiny.build("siglip")
    vp.apply(model, Plan(describe(model).shape(), tokens={"vision": {"threshold": 0.1}}))
    with (
        pytest.raises(ValueError, match="plan: tokens of vision; SiglipModel cannot prune them"),
        vp.prune_tokens(model),
    ):
        pass
