"""Zeroing equals removing, in every family; and whatever is patched or refused leaves no trace."""

import copy
import json
import pickle

import pytest
import torch
import transformers
from models import tiny
from torch import nn

from vlprune_ext.anatomy import describe
from vlprune_ext.apply_plan import apply
from vlprune_ext.checkpoint import load_pruned, save_pruned
from vlprune_ext.methods import Magnitude
from vlprune_ext.methods.units.magnitude import unit_norms
from vlprune_ext.plan import Plan
from vlprune_ext.units import surgery
from vlprune_ext.units.masking import masked
from vlprune_ext.units.rounding import round_plan

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
PRE_NORM = tuple(name for name in tiny.ALL if not name.startswith("blip_") and name != "opt_post_norm")


def built(name, seed=0):
    """In float64: what random weights make of fp32's rounding differs from one machine to the next."""
    return tiny.build(name, seed).double()


def plan_for(model, **removed):
    """Plan of ``kind=[(tower, layer, units), ...]``."""
    plan = Plan(describe(model).shape())
    for kind, entries in removed.items():
        for tower, layer, units in entries:
            plan.add(tower, kind, layer, units)
    return plan


def state(model):
    """Everything that surgery or a mask could change, by identity where that matters."""
    return {
        "parameters": {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()},
        "forwards": {name: m.__dict__.get("forward") for name, m in model.named_modules()},
        "bound": {name: type(m).forward for name, m in model.named_modules()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
        "numbers": {
            name: {k: v for k, v in vars(m).items() if isinstance(v, int)} for name, m in model.named_modules()
        },
        "config": model.config.to_dict(),
        "record": getattr(model, "vlprune", None),
    }


def assert_same_state(before, after):
    for key in before:
        if key != "parameters":
            assert before[key] == after[key], key
    assert before["parameters"].keys() == after["parameters"].keys()
    for name, (identity, value) in before["parameters"].items():
        assert after["parameters"][name][0] == identity, name
        assert torch.equal(after["parameters"][name][1], value), name


# --- zeroing equals removing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", tiny.ALL)
def test_removed_equals_masked(name, seed):
    model = built(name, seed)
    values = tiny.inputs(name, model, 4, seed)
    plan = tiny.uneven_plan(model, seed, layers=seed != 1)
    round_to = 1 if seed == 0 else 8
    dense = tiny.outputs(name, model, values)
    with masked(model, round_plan(plan, round_to)):
        expected = tiny.outputs(name, model, values)
    assert (expected - dense).abs().max() > 0.1, "the removed parts matter"
    assert apply(model, plan, round_to=round_to) is model
    torch.testing.assert_close(tiny.outputs(name, model, values), expected, **CLOSE)

    rounded = round_plan(plan, round_to)
    sites = {tower: t.blocks[0].sites for tower, t in describe(model).towers.items()}
    for tower, blocks in plan.shape.items():
        stays = [layer for layer in range(len(blocks)) if layer not in plan.layers.get(tower, [])]
        wanted = [
            {
                kind: count - len(rounded.removed(tower, kind, layer)) * surgery.removable(sites[tower][kind])
                for kind, count in blocks[layer].items()
            }
            for layer in stays
        ]
        assert describe(model).shape()[tower] == wanted
        assert describe(model).towers[tower].config.num_hidden_layers >= len(stays)


@pytest.mark.parametrize("name", tiny.ALL)
def test_masked_equals_dead_units(name):
    """An independent reading of the table: a unit whose value (or neuron) is zero is what a mask makes of it."""
    reference = built(name)
    values = tiny.inputs(name, reference)
    plan = tiny.uneven_plan(reference, 5, layers=False)
    with torch.no_grad():
        for tower_name, tower in describe(reference).towers.items():
            for layer, block in enumerate(tower.blocks):
                for kind, site in block.sites.items():
                    last = site.inputs[-1]  # value, up or fc1; of a fused qkv the last third
                    rows = torch.arange(last.out_features).view(site.input_segments(last), site.units, -1)[-1]
                    dead = rows[plan.removed(tower_name, kind, layer)].flatten()
                    last.weight[dead] = 0
                    if last.bias is not None:
                        last.bias[dead] = 0
    model = built(name)
    with masked(model, plan):
        torch.testing.assert_close(tiny.outputs(name, model, values), tiny.outputs(name, reference, values), **CLOSE)


@pytest.mark.parametrize("name", tiny.ALL)
def test_mask_mode_equals_masked(name):
    model = built(name)
    values = tiny.inputs(name, model)
    plan = tiny.uneven_plan(model, 3, layers=name in PRE_NORM)
    with masked(model, plan):
        expected = tiny.outputs(name, model, values)
    shape = describe(model).shape()
    identities = {id(p) for p in model.parameters()}
    apply(model, plan, mode="mask")
    assert describe(model).shape() == shape
    assert {id(p) for p in model.parameters()} == identities
    torch.testing.assert_close(tiny.outputs(name, model, values), expected, **CLOSE)
    assert model.vlprune["plans"][0]["mode"] == "mask"
    assert model.vlprune["plans"][0]["zeroed"]


@pytest.mark.parametrize("name", tiny.ALL)
def test_all_units_of_a_block(name):
    """A site that loses everything keeps one zeroed unit, and gives its bias alone."""
    model = built(name)
    values = tiny.inputs(name, model)
    plan = Plan(describe(model).shape())
    for tower, blocks in plan.shape.items():
        for kind, count in blocks[0].items():
            plan.add(tower, kind, 0, list(range(count)))
        plan.add(tower, "neurons", 1, list(range(blocks[1]["neurons"])))
    with masked(model, plan):
        expected = tiny.outputs(name, model, values)
    apply(model, plan)
    torch.testing.assert_close(tiny.outputs(name, model, values), expected, **CLOSE)
    for name, tower in describe(model).towers.items():
        for kind, site in tower.blocks[0].sites.items():
            assert site.units == (1 if surgery.removable(site) else plan.shape[name][0][kind])
        assert tower.blocks[1].sites["neurons"].units == 1
    kinds = sum(len(blocks[0]) + 1 for blocks in plan.shape.values())
    assert len(model.vlprune["plans"][0]["zeroed"]) == kinds


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["clip", "llava", "vit", "llama"])
def test_both_attention_implementations(name, attention):
    model = built(name)
    model.set_attn_implementation(attention)
    values = tiny.inputs(name, model)
    plan = tiny.uneven_plan(model, 1)
    with masked(model, round_plan(plan, 8)):
        expected = tiny.outputs(name, model, values)
    apply(model, plan)
    torch.testing.assert_close(tiny.outputs(name, model, values), expected, **CLOSE)


def test_second_plan_on_a_pruned_model():
    model = built("clip")
    values = tiny.inputs("clip", model)
    dense = describe(model).shape()
    apply(model, plan_for(model, head=[("vision", 0, [1])], layer=[("text", 0, [])]))
    second = plan_for(model, head=[("vision", 0, [0, 2])], neurons=[("text", 1, list(range(20)))])
    assert second.shape["vision"][0]["head"] == 3
    with masked(model, round_plan(second, 8)):
        expected = tiny.outputs("clip", model, values)
    apply(model, second)
    torch.testing.assert_close(tiny.outputs("clip", model, values), expected, **CLOSE)
    assert describe(model).shape()["vision"][0]["head"] == 1
    assert model.vlprune["shape"] == dense
    assert [Plan.from_dict(entry["plan"]).shape for entry in model.vlprune["plans"]] == [dense, second.shape]


def test_the_record(tmp_path):
    model = built("clip")
    data = tiny.retrieval_data("clip", model)
    plan = plan_for(model, neurons=[("vision", 0, list(range(30)))])
    plan.method = {"name": "by hand"}
    shape = copy.deepcopy(plan.shape)
    apply(model, plan, data)
    (entry,) = model.vlprune["plans"]
    assert Plan.from_dict(entry["plan"]) == round_plan(plan, 8)
    assert entry["data"] == {"name": "tiny-clip", "hash": data.hash}
    assert model.vlprune["shape"] == shape
    assert len(plan.neurons["vision"][0]) == 30, "the caller's plan stays as it was"


# --- LLaVA's stream of image features --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("feature", "gone", "expected"),
    [
        (-2, [3], -1),  # the last block was never used
        (-2, [0], -2),
        (-2, [2], -2),
        (-2, [0, 3], -1),
        (-2, [0, 1, 2], -2),  # only the unused block stays: the stream that enters it
        (-1, [3], -1),
        (3, [1], 2),
        (3, [3], 3),
        (2, [2, 3], 2),
        ([-2, 1], [0], [-2, 0]),
        ([-2, -4], [1, 3], [-1, -2]),
    ],
)
def test_llava_keeps_reading_the_same_stream(feature, gone, expected):
    model = tiny.build("llava")
    if isinstance(feature, list):
        wide = nn.Linear(64, 32)
        tiny.randomise(wide)
        model.model.multi_modal_projector.linear_1 = wide
    model.config.vision_feature_layer = feature
    values = tiny.inputs("llava", model)
    plan = plan_for(model, layer=[("vision", layer, []) for layer in gone])
    dense = tiny.outputs("llava", model, values)
    with masked(model, plan):
        masked_outputs = tiny.outputs("llava", model, values)
    if gone == [3] and feature in (-2, 3):
        torch.testing.assert_close(masked_outputs, dense)
    apply(model, plan)
    assert model.config.vision_feature_layer == expected
    torch.testing.assert_close(tiny.outputs("llava", model, values), masked_outputs, **CLOSE)
    assert model.config.vision_config.num_hidden_layers == 4 - len(gone)


# --- generation with a KV cache --------------------------------------------------------------------------------------


def generate(name, model, **kwargs):
    """Six new tokens for prompts of different lengths, padded on the left."""
    values = tiny.inputs(name, model, 3)
    prompt = {key: value for key, value in values.items() if key in ("input_ids", "attention_mask", "pixel_values")}
    if name != "blip_vqa":
        for key in ("input_ids", "attention_mask"):
            lengths = values["attention_mask"].sum(1).tolist()
            rows = [row.roll(len(row) - length) for row, length in zip(values[key], lengths, strict=True)]
            prompt[key] = torch.stack(rows)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **kwargs}
    return model.generate(**prompt, **settings)


@pytest.mark.parametrize("name", ["llama", "llava"])
@pytest.mark.parametrize("layers", [[0], [1, 2], [3], []])
def test_generate_with_cache(name, layers):
    model = tiny.build(name)
    plan = plan_for(
        model,
        layer=[("text", layer, []) for layer in layers],
        head=[("text", 1, [0]), ("text", 0, [0, 1])],
        neurons=[("text", 3, list(range(16)))],
    )
    with masked(model, plan):
        expected = generate(name, model, use_cache=False)
        assert torch.equal(generate(name, model), expected)
    assert not torch.equal(generate(name, model), expected)
    apply(model, plan)
    assert torch.equal(generate(name, model, use_cache=False), expected)
    assert torch.equal(generate(name, model), expected)
    assert torch.equal(generate(name, model, num_beams=2)[:, :-6], expected[:, :-6]), (
        "beam search reorders the cache of the layers that are left"
    )


def test_blip_generates_after_surgery():
    model = tiny.build("blip_vqa")
    plan = tiny.uneven_plan(model, 2)
    with masked(model, round_plan(plan, 8)):
        expected = generate("blip_vqa", model)
    apply(model, plan)
    assert torch.equal(generate("blip_vqa", model), expected)


# --- what survives ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.ALL)
def test_modules_hooks_and_flags_survive(name):
    model = tiny.build(name).to(torch.float64)
    tower = next(iter(describe(model).towers))
    sites = describe(model).towers[tower].blocks[1].sites
    kind = "head" if surgery.removable(sites["head"]) else "neurons"
    site = sites[kind]
    site.out.weight.requires_grad_(False)
    seen = []
    site.out.register_forward_hook(lambda m, args, out: seen.append((m, args[0].shape[-1])))
    gone = [] if tiny.whole(model, tower) else [(tower, 0, [])]
    apply(model, plan_for(model, **{kind: [(tower, 1, [0])]}, layer=gone), round_to=1)
    after = describe(model).towers[tower].blocks[1 - len(gone)].sites[kind]
    assert after.out is site.out
    assert after.inputs == site.inputs
    assert not after.out.weight.requires_grad
    assert after.inputs[0].weight.requires_grad
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    values = tiny.inputs(name, model)
    tiny.outputs(name, model, {k: v.double() if v.is_floating_point() else v for k, v in values.items()})
    assert seen
    assert all(pair == (site.out, site.width * (site.units - 1)) for pair in seen)


@pytest.mark.parametrize("name", ["clip", "blip_vqa", "llama"])
def test_a_pruned_model_trains_and_copies(name):
    model = tiny.build(name)
    values = tiny.inputs(name, model)
    apply(model, tiny.uneven_plan(model, 1))
    expected = tiny.outputs(name, model, values)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(tiny.outputs(name, twin, values), expected, rtol=0, atol=0)
        assert twin.vlprune == model.vlprune
        result = twin(**values)
        loss = result.loss if getattr(result, "loss", None) is not None else result.logits_per_image.sum()
        loss.backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in twin.parameters())
        torch.testing.assert_close(tiny.outputs(name, model, values), expected, rtol=0, atol=0)


def test_hidden_states_and_attentions_of_a_pruned_model():
    for name in ("vit", "blip_itr"):
        model = tiny.build(name)
        model.set_attn_implementation("eager")
        apply(model, plan_for(model, head=[("vision", 0, [0, 2])], layer=[("vision", 3, [])]))
        tower = model if name == "vit" else model.vision_model
        with torch.no_grad():
            result = tower(tiny.inputs(name, model)["pixel_values"], output_hidden_states=True, output_attentions=True)
        assert len(result.hidden_states) == 4
        assert [a.shape[1] for a in result.attentions] == [2, 4, 4]


# --- rounding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("removed", "round_to", "left"),
    [(1, 8, 64), (8, 8, 56), (9, 8, 56), (63, 8, 8), (64, 8, 0), (5, 1, 59), (5, 48, 64), (20, 48, 48), (3, 100, 64)],
)
def test_rounding_goes_up(removed, round_to, left):
    plan = Plan({"vision": [{"head": 4, "neurons": 64}]})
    plan.add("vision", "neurons", 0, list(range(removed)))
    rounded = round_plan(plan, round_to)
    kept_out = rounded.removed("vision", "neurons", 0)
    assert 64 - len(kept_out) == left
    assert kept_out == list(range(64 - left)), "the last ones come back"
    assert len(plan.removed("vision", "neurons", 0)) == removed


def test_rounding_brings_back_what_was_removed_last():
    plan = Plan({"vision": [{"neurons": 8}]})
    plan.add("vision", "neurons", 0, [6, 5])
    plan.add("vision", "neurons", 0, [0, 5, 2, 1])
    assert plan.removed("vision", "neurons", 0) == [0, 1, 2, 5, 6]
    assert round_plan(plan, 4).removed("vision", "neurons", 0) == [0, 2, 5, 6]
    assert round_plan(plan, 6).removed("vision", "neurons", 0) == [5, 6]
    again = Plan.from_dict(json.loads(plan.to_json()))
    assert round_plan(again, 6).removed("vision", "neurons", 0) == [5, 6]


@pytest.mark.parametrize("rewire", [False, True])
def test_rounding_keeps_the_neurons_that_are_worth_most(rewire):
    """By |w| of a layer with 64 neurons of which 29 should go: after rounding the 24 of least |w|."""
    model = tiny.build("clip")
    data = tiny.retrieval_data("clip", model, 8)
    method = Magnitude(keep_heads=1.0, keep_neurons=0.55, scope="layer", neurons_per_group=1, rewire=rewire)
    plan = method.plan(model, data)
    site = describe(model).tower("vision").blocks[0].sites["neurons"]
    asked, width = len(plan.removed("vision", "neurons", 0)), site.units
    rounded = round_plan(plan, 8).removed("vision", "neurons", 0)
    assert len(rounded) == width - -(-(width - asked) // 8) * 8 < asked
    assert rounded == sorted(unit_norms(site).argsort(stable=True)[: len(rounded)].tolist())


@pytest.mark.parametrize("round_to", [0, -8, 2.5, "8"])
def test_rounding_to_nonsense(round_to):
    model = tiny.build("vit")
    with pytest.raises(ValueError, match=r"round_to: .*expected an int >= 1"):
        apply(model, Plan(describe(model).shape()), round_to=round_to)


# --- refusals leave the model untouched ------------------------------------------------------------------------------


def refuse(model, plan, message, **kwargs):
    before = state(model)
    with pytest.raises(ValueError, match=message):
        apply(model, plan, **kwargs)
    assert_same_state(before, state(model))


def test_refusals_leave_the_model_untouched():
    model = tiny.build("clip")
    good = tiny.uneven_plan(model, 0)
    refuse(model, good, "mode: 'soft', expected one of remove, mask", mode="soft")
    refuse(model, good, "round_to", round_to=0)
    refuse(model, tiny.uneven_plan(tiny.build("vit"), 0), "made for another model")
    bad = tiny.uneven_plan(model, 0)
    bad.add("text", "neurons", 2, [48])
    refuse(model, bad, r"neurons of text\.2: .*below 48")
    everything = tiny.uneven_plan(model, 0)
    everything.layers["vision"] = [0, 1, 2, 3]
    refuse(model, everything, "removes all 4 layers of tower 'vision'")


def test_post_norm_layers_cannot_be_masked_by_weights():
    model = tiny.build("blip_itr")
    plan = plan_for(model, head=[("vision", 0, [0])], layer=[("text", 1, [])])
    refuse(model, plan, r"'mask' cannot remove layer text\.1: a BlipTextLayer normalises after adding", mode="mask")
    apply(model, plan)
    assert len(describe(model).tower("text")) == 2


@pytest.mark.parametrize("mode", ["remove", "mask"])
def test_weights_that_cannot_be_cut(mode):
    class Packed(nn.Linear):
        """As quantisation libraries keep it: two values a byte."""

        def __init__(self):
            super().__init__(64, 32)
            self.weight = nn.Parameter(torch.zeros(1024, 1, dtype=torch.uint8), requires_grad=False)

    model = tiny.build("vit")
    plan = plan_for(model, head=[("vision", 0, [0])], neurons=[("vision", 2, list(range(8)))])
    model.layers[2].mlp.fc2 = Packed()
    refuse(
        model,
        plan,
        r"layers\.2\.mlp\.fc2: its weight is a torch\.uint8, expected a dense floating-point tensor",
        mode=mode,
    )
    model.layers[2].mlp.fc2 = nn.Linear(64, 32, device="meta")
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.fc2: its weights are not in memory"):
        apply(model, plan, mode=mode)
    assert describe(model).shape() == plan.shape


def test_attention_that_cannot_shrink_is_zeroed(monkeypatch):
    """Fused attentions whose own forward fixes the number of heads keep their width where no other forward is known."""
    monkeypatch.setattr(surgery, "_FORWARDS", {})
    model = tiny.build("blip_itr")
    values = tiny.inputs("blip_itr", model)
    plan = plan_for(model, head=[("vision", 0, [0, 3]), ("text", 0, [1])])
    with masked(model, plan):
        expected = tiny.outputs("blip_itr", model, values)
    apply(model, plan)
    torch.testing.assert_close(tiny.outputs("blip_itr", model, values), expected, **CLOSE)
    assert [describe(model).shape()[tower][0]["head"] for tower in ("vision", "text")] == [4, 3]
    assert model.vlprune["plans"][0]["zeroed"] == [{"tower": "vision", "kind": "head", "layer": 0, "units": [0, 3]}]


# --- masks come off --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.ALL)
def test_a_mask_leaves_no_trace(name):
    model = tiny.build(name)
    values = tiny.inputs(name, model)
    dense = tiny.outputs(name, model, values)
    plan = tiny.uneven_plan(model, 0)
    before = state(model)
    with masked(model, plan):
        changed = tiny.outputs(name, model, values)
        assert state(model)["hooks"] != before["hooks"]
    assert_same_state(before, state(model))
    assert not torch.equal(changed, dense)
    assert torch.equal(tiny.outputs(name, model, values), dense)


@pytest.mark.parametrize("name", tiny.ALL)
def test_a_mask_comes_off_when_the_forward_raises(name):
    model = tiny.build(name)
    values = tiny.inputs(name, model)
    tower = list(describe(model).towers.values())[-1]
    plan = tiny.uneven_plan(model, 0, layers=False)
    if not tiny.whole(model, tower.name):
        plan.add(tower.name, "layer", 0, [])

    def fail(*_):
        raise RuntimeError("inside the forward")

    last = tower.blocks[-1].sites["neurons"].out
    model(**values)  # transformers installs its own hooks once
    handle = last.register_forward_hook(fail)
    before = state(model)
    with pytest.raises(RuntimeError, match="inside the forward"), masked(model, plan):
        model(**values)
    assert_same_state(before, state(model))
    handle.remove()


def test_a_mask_that_does_not_fit():
    model = tiny.build("clip")
    before = state(model)
    with pytest.raises(ValueError, match="another model"), masked(model, tiny.uneven_plan(tiny.build("vit"), 0)):
        pass
    assert_same_state(before, state(model))


def test_masks_nest():
    model = tiny.build("vit")
    values = tiny.inputs("vit", model)
    one = plan_for(model, head=[("vision", 0, [1])], layer=[("vision", 2, [])])
    two = plan_for(model, head=[("vision", 0, [3])], layer=[("vision", 1, [])])
    both = plan_for(model, head=[("vision", 0, [1, 3])], layer=[("vision", 1, []), ("vision", 2, [])])
    with masked(model, both):
        expected = tiny.outputs("vit", model, values)
    with masked(model, one), masked(model, two):
        torch.testing.assert_close(tiny.outputs("vit", model, values), expected, **CLOSE)


# ---- what belongs to a block by its number --------------------------------------------------------------------------


def sliding_llava() -> nn.Module:
    """A LLaVA on Qwen2 whose last two blocks of four attend to a window of four tokens."""
    text = {**tiny._LLAMA, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4}
    config = transformers.LlavaConfig(
        vision_config={**tiny._VISION, "model_type": "clip_vision_model"},
        text_config={**text, "num_hidden_layers": 4, "max_window_layers": 2},
        image_token_index=tiny.IMAGE,
        image_seq_length=tiny.PATCHES,
        vision_feature_layer=-2,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    tiny.randomise(model)
    return model


@pytest.mark.parametrize("gone", [[0], [1, 2], [3]])
def test_layer_types_move_with_the_blocks_that_stay(gone, tmp_path):
    """In memory, saved, and loaded."""
    model = sliding_llava()
    values = tiny.inputs("llava", model, 3)
    plan = Plan(describe(model).shape())
    for layer in gone:
        plan.add("text", "layer", layer, [])
    kinds = model.config.text_config.layer_types
    with torch.no_grad():
        with masked(model, plan):
            wanted = model(**values, use_cache=False).logits
        apply(model, plan)
        found = model(**values, use_cache=False).logits
        again = load_pruned(save_pruned(model, tmp_path / "out"))(**values, use_cache=False).logits
    left = [kind for layer, kind in enumerate(kinds) if layer not in gone]
    assert model.config.text_config.layer_types == model.model.language_model.config.layer_types == left
    text = values["attention_mask"].bool()
    torch.testing.assert_close(found[text], wanted[text], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again[text], found[text], rtol=0, atol=0)


def test_lists_of_numbers_move_and_a_tapped_block_is_refused():
    model = tiny.build("llama")
    stack = describe(model).tower("text").container
    config = model.config
    config.mlp_only_layers, config.deepstack_visual_indexes = [0, 2, 3], [1]
    config.no_rope_layers, config.pinpoints = list(range(10, 10 + len(stack))), [[1, 2]] * len(stack)
    plan = Plan(describe(model).shape())
    plan.add("text", "layer", 1, [])
    with pytest.raises(ValueError, match=r"layer text\.1 cannot be removed: deepstack_visual_indexes reads"):
        apply(model, plan)
    config.deepstack_visual_indexes = [2]
    apply(model, plan)
    assert config.mlp_only_layers == [0, 1, 2][: len(config.mlp_only_layers)]
    assert config.deepstack_visual_indexes == [1]
    assert config.no_rope_layers == [10, *range(12, 10 + len(stack) + 1)]
    assert config.pinpoints == [[1, 2]] * (len(stack) + 1), "another list of this length has nothing to do with blocks"
