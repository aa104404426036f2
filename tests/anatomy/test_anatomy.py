"""Every family taken apart: units, widths and projections agree with each other and with the model."""

import pytest
import torch
import transformers
from models import tiny
from torch import nn

from vlprune_ext import anatomy
from vlprune_ext.anatomy import Family, describe
from vlprune_ext.apply_plan import apply
from vlprune_ext.plan import Plan
from vlprune_ext.units.surgery import removable

TOWERS = {
    "clip": {"vision": 4, "text": 3},
    "siglip": {"vision": 4, "text": 3},
    "blip_itr": {"vision": 4, "text": 3},
    "blip_vqa": {"vision": 4, "text": 3, "decoder": 3},
    "llava": {"vision": 4, "text": 4},
    "vit": {"vision": 4},
    "llama": {"text": 4},
    "t5": {"encoder": 3, "decoder": 3},
    "opt": {"text": 3},
    "opt_post_norm": {"text": 3},
    "blip2_opt": {"vision": 4, "text": 3},
    "blip2_t5": {"vision": 4, "encoder": 3, "decoder": 3},
    "instruct_t5": {"vision": 4, "encoder": 3, "decoder": 3},
    "instruct_llama": {"vision": 4, "text": 4},
    "llava_next": {"vision": 4, "text": 4},
    "qwen2_5_vl": {"vision": 4, "text": 4},
    "paligemma": {"vision": 4, "text": 4},
    "internvl": {"vision": 4, "text": 4},
    "idefics3": {"vision": 4, "text": 4},
    "smolvlm": {"vision": 4, "text": 4},
}
HIDDEN = {"vision": 64, "text": 48, "encoder": 48, "decoder": 48}
GROUPED = ("llava", "llama", "instruct_llama", *tiny.DECODERS)  # two query heads a key/value head


def params(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", tiny.EVERY)
def test_towers_and_units(name):
    model = tiny.build(name)
    towers = describe(model).towers
    assert {tower: len(t) for tower, t in towers.items()} == TOWERS[name]
    assert list(towers) == list(TOWERS[name]), "in the order in which they run"
    for tower in towers.values():
        grouped = name in GROUPED and tower.name == "text"
        cross = tower.name == "decoder" or (name.startswith("blip_") and tower.name != "vision")
        for block in tower.blocks:
            expected = {"head": 2 if grouped else 4}
            if cross:
                expected["cross_head"] = 4
            expected["neurons"] = HIDDEN[tower.name]
            assert {kind: site.units for kind, site in block.sites.items()} == expected
            assert list(block.sites) == list(expected), "in the order in which they run"


@pytest.mark.parametrize("name", tiny.EVERY)
def test_widths_and_projections_agree(name):
    model = tiny.build(name)
    of_model = set(model.modules())
    for tower in describe(model).towers.values():
        for block in tower.blocks:
            for kind, site in block.sites.items():
                assert {site.out, site.module, *site.inputs, *site.skip} <= of_model
                assert site.units * site.width == site.out.in_features
                assert site.width == (1 if kind == "neurons" else 16 if site.units == 2 else 8)
                for linear in site.inputs:
                    assert isinstance(linear, nn.Linear)
                    assert linear.out_features % (site.input_segments(linear) * site.units) == 0
            post_norm = name == "opt_post_norm" or (name.startswith("blip_") and tower.name != "vision")
            assert (block.norm is None) == post_norm


@pytest.mark.parametrize("name", tiny.EVERY)
def test_sites_run_as_described(name):
    """The output projection's input has units * width columns, and `module` returns what `out` returns."""
    model = tiny.build(name)
    values = tiny.inputs(name, model)
    for tower in describe(model).towers.values():
        for site in tower.blocks[0].sites.values():
            seen = {}
            handles = [
                site.out.register_forward_hook(lambda _, args, out, s=seen: s.update(x=args[0], out=out)),
                site.module.register_forward_hook(lambda _, __, out, s=seen: s.update(returned=out)),
            ]
            with torch.no_grad():
                model(**values)
            for handle in handles:
                handle.remove()
            returned = seen["returned"] if isinstance(seen["returned"], torch.Tensor) else seen["returned"][0]
            assert seen["x"].shape[-1] == site.units * site.width
            torch.testing.assert_close(returned, seen["out"], rtol=0, atol=0)


@pytest.mark.parametrize("name", tiny.EVERY)
def test_parameters_of_a_unit_and_a_block(name):
    """What `unit_params` and `params` promise is what a removal frees."""
    for tower, blocks in describe(tiny.build(name)).shape().items():
        for kind in (*blocks[1], "layer"):
            model = tiny.build(name)
            taken_apart = describe(model)
            block = taken_apart.towers[tower].blocks[1]
            expected = block.params if kind == "layer" else 2 * block.sites[kind].unit_params
            if kind == "head" and block.sites[kind].units == 2:
                expected //= 2  # of two key/value heads only one may go
            plan = Plan(taken_apart.shape())
            if kind != "layer" and not removable(block.sites[kind]):
                expected = 0  # zeroed instead
            plan.add(tower, kind, 1, [0] if blocks[1].get(kind) == 2 else [0, 2])
            before = params(model)
            if kind == "layer" and block.fixed:
                with pytest.raises(ValueError, match=rf"layer {tower}.1 cannot be removed: .*; mode='mask'"):
                    apply(model, plan, round_to=1)
                assert params(model) == before
                continue
            apply(model, plan, round_to=1)
            assert before - params(model) == expected


@pytest.mark.parametrize("name", tiny.LAYERWISE)
def test_matrices_outside_the_blocks(name):
    """All that layer-wise pruning touches is in a block; what is not: bridges between towers and the token heads."""
    model = tiny.build(name)
    inside = {m for tower in describe(model).towers.values() for m in tower.container.modules()}
    linears = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    bridges = (
        "qformer.",
        "language_projection",
        "model.multi_modal_projector.",
        "model.visual.merger.",
        "model.connector.",
    )
    bridges += ("lm_head", "language_model.lm_head", "model.decoder.project_")
    assert {path.startswith(bridges) for path, m in linears.items() if m not in inside} == {True}
    assert not any(path.startswith(bridges) for path, m in linears.items() if m in inside)


@pytest.mark.parametrize(
    ("kind", "config", "towers"),
    [
        ("CLIPVisionModel", transformers.CLIPVisionConfig, ["vision"]),
        ("SiglipVisionModel", transformers.SiglipVisionConfig, ["vision"]),
        ("ViTForImageClassification", transformers.ViTConfig, ["vision"]),
    ],
)
def test_single_vision_towers(kind, config, towers):
    model = getattr(transformers, kind)(config(**tiny._VISION)).eval()
    assert list(describe(model).towers) == towers
    assert len(describe(model).tower("vision")) == 4
    assert describe(model).shape()["vision"][0] == {"head": 4, "neurons": 64}


def test_llama_without_head():
    model = transformers.LlamaModel(tiny.build("llama").config)
    assert describe(model).head is None
    assert len(describe(model).tower("text")) == 4


def test_embeddings_of_dual_encoders():
    for name in tiny.DUAL:
        model = tiny.build(name)
        data = tiny.retrieval_data(name, model, 3)
        embed = describe(model).family.embed
        with torch.no_grad():
            image, text = embed["vision"](model, data.images), embed["text"](model, data.texts)
        assert image.shape == text.shape
        assert image.shape[0] == 3


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_only_the_pooled_row_counts(name):
    """`rows_read` and `trim` name exactly what the text embedding is made of."""
    model = tiny.build(name)
    tower = describe(model).tower("text")
    values = {key: tiny.inputs(name, model, 5)[key] for key in ("input_ids", "attention_mask")}
    last = {}
    handle = tower.blocks[-1].module.register_forward_hook(lambda _, __, out: last.update(out=out))
    with torch.no_grad():
        whole = model.get_text_features(**values)
        rows = tower.rows_read(values)
        picked = last["out"][torch.arange(5), rows if isinstance(rows, int) else rows.flatten()]
        model_rows = model.text_model.final_layer_norm(picked)
        project = model.text_projection if name == "clip" else model.text_model.head
        handle.remove()
        torch.testing.assert_close(project(model_rows), whole.pooler_output)
        trimmed = model.get_text_features(**tower.trim({k: v[:1] for k, v in values.items()}))
    torch.testing.assert_close(trimmed.pooler_output, whole.pooler_output[:1])


def test_historical_clip_pools_at_the_highest_token():
    model = tiny.build("clip")
    model.config.text_config.eos_token_id = 2
    ids = torch.tensor([[60, 5, 61, 0], [60, 61, 0, 0]])
    assert describe(model).tower("text").rows_read({"input_ids": ids}).tolist() == [[2], [1]]


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "llama"])
def test_only_rows_that_predict_a_label_count(name):
    """The loss has gradients with respect to the rows of the last block that `rows_read` names, and no others."""
    model = tiny.build(name)
    inputs = tiny.retrieval_data(name, model, 4).batch(torch.arange(4))
    inputs["labels"][0, :-2] = -100  # fewer than the others
    last = {}
    block = describe(model).tower("text").blocks[-1].module
    handle = block.register_forward_hook(lambda _, __, out: last.update(out=out))
    loss = model(**inputs).loss
    handle.remove()
    (slope,) = torch.autograd.grad(loss, last["out"])
    rows = describe(model).tower("text").rows_read(inputs)
    assert rows.shape[1] < slope.shape[1]
    for of_sample, read, labels in zip(slope, rows, inputs["labels"], strict=True):
        assert set(of_sample.abs().sum(1).nonzero().flatten().tolist()) <= set(read.tolist())
        assert len(set(read.tolist())) == len(read)
        assert (labels[1:] != -100).sum() <= len(read)
    del inputs["labels"]
    assert describe(model).tower("text").rows_read(inputs) is None


def test_unknown_model_lists_what_is_known():
    model = transformers.BertModel(
        transformers.BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=8
        )
    )
    with pytest.raises(ValueError, match=r"BertModel is not known; known are .*CLIPModel.*LlavaFor.*register"):
        describe(model)


def test_unknown_tower_and_block():
    with pytest.raises(ValueError, match=r"CLIPModel has no tower 'audio'; its towers are vision, text"):
        describe(tiny.build("clip")).tower("audio")
    with pytest.raises(ValueError, match=r"unknown block Linear; known: .*CLIPEncoderLayer"):
        anatomy.bind_block(nn.Linear(2, 2))


def test_register(monkeypatch):
    class MyViT(transformers.ViTModel):
        pass

    model = MyViT(transformers.ViTConfig(**tiny._VISION))
    with pytest.raises(ValueError, match="MyViT is not known"):
        describe(model)
    monkeypatch.setitem(anatomy.FAMILIES, "MyViT", None)  # gone again after the test
    anatomy.register("MyViT", Family(anatomy.FAMILIES["ViTModel"].towers))
    assert len(describe(model).tower("vision")) == 4
