"""Projections that are not what they look like are refused by name, before anything is scored or changed."""

from __future__ import annotations

import accelerate
import pytest
import torch
from models import tiny
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

import vlprune_ext as vp
from vlprune_ext.anatomy.linears import check_linears

WIDTH = {"keep_heads": 0.5, "keep_neurons": 0.5, "steps": 1, "neurons_per_group": 8}


class Adapted(nn.Module):
    """A linear layer with an adapter, as peft wraps it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class Int8(nn.Linear):
    """As bitsandbytes keeps one: an int8 weight of the plain shape, scales beside it."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.float() * self.scale, self.bias)


def int8(linear: nn.Linear) -> nn.Linear:
    found = Int8(linear.in_features, linear.out_features)
    found.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
    found.weight = nn.Parameter((linear.weight / found.scale).round().to(torch.int8), requires_grad=False)
    found.bias = linear.bias
    return found


def plain_int8(linear: nn.Linear) -> nn.Linear:
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)
    return linear


def on_meta(linear: nn.Linear) -> nn.Linear:
    return linear.to("meta")


def in_place(change):
    def apply(linear):
        change(linear)
        return linear

    return apply


# What becomes of one projection, and what the error has to name.
CHANGES = {
    "parametrized": (in_place(parametrizations.weight_norm), r"its weight is parametrized.*remove_parametrizations"),
    "pruned by torch": (in_place(lambda m: prune.l1_unstructured(m, "weight", 0.1)), r"masked by torch.*prune\.remove"),
    "weight_norm": (in_place(weight_norm), r"its weight is computed by WeightNorm"),
    "adapter": (Adapted, r"Adapted with an adapter \(base_layer\); merge"),
    "int8": (int8, r"Int8 with a forward of its own"),
    "an integer weight": (plain_int8, r"its weight is a torch\.int8, expected a dense floating-point"),
    "not in memory": (on_meta, r"its weights are not in memory \(meta device\)"),
}


def changed(change):
    """A CLIP with one projection of its text tower changed, and its data."""
    model = tiny.build("clip")
    data = tiny.retrieval_data("clip", model, 6)
    attention = model.text_model.encoder.layers[1].self_attn
    attention.k_proj = change(attention.k_proj)
    return model, data


WAYS = {
    "score": lambda model, data: vp.score(model, data, modules=("head",)),
    "MoPE": lambda model, data: vp.prune(model, data, vp.MoPE(**WIDTH)),
    "Magnitude": lambda model, data: vp.Magnitude(**WIDTH).plan(model, data),
    "Wanda": lambda model, data: vp.prune(model, data, vp.Wanda(sparsity=0.5)),
    "ECoFLaP": lambda model, data: vp.ECoFLaP(sparsity=0.5).score(model, data),
    "CoMP": lambda model, data: vp.CoMP(train=False, flops=0.9).plan(model, data),
    "apply": lambda model, data: vp.apply(model, plan_of(model)),
    "mask": lambda model, data: vp.apply(model, plan_of(model), mode="mask"),
}


def plan_of(model):
    plan = vp.Plan(vp.describe(model).shape())
    plan.add("text", "head", 0, [1])
    return plan


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of weight_norm, whom people use all the same
@pytest.mark.parametrize("what", CHANGES)
def test_a_projection_that_is_not_plain_is_named(what):
    change, expected = CHANGES[what]
    model, _ = changed(change)
    anatomy = vp.describe(model)
    check_linears(anatomy, ["vision"])  # the other tower can be pruned
    with pytest.raises(ValueError, match=r"text_model\.encoder\.layers\.1\.self_attn\.k_proj.*" + expected):
        check_linears(anatomy, ["vision", "text"])


@pytest.mark.parametrize("way", WAYS)
def test_every_way_refuses_it_and_changes_nothing(way):
    model, data = changed(Adapted)
    before = tiny.digest(model)
    with pytest.raises(ValueError, match="k_proj: a Adapted with an adapter"):
        WAYS[way](model, data)
    assert tiny.digest(model) == before
    assert getattr(model, "vlprune", None) is None


def test_a_tower_beside_it_can_be_pruned():
    model, data = changed(Adapted)
    vp.prune(model, data, vp.Magnitude(**WIDTH, towers=("vision",)))
    vp.prune(model, data, vp.Wanda(sparsity=0.5, towers=("vision",)))


@pytest.mark.parametrize("way", ["MoPE", "Wanda", "Magnitude"])
def test_offloaded_weights_are_named_before_anything_runs(way):
    model = tiny.build("clip")
    data = tiny.retrieval_data("clip", model, 6)
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match="not in memory"):
        WAYS[way](model, data)


@pytest.mark.parametrize("way", ["Wanda", "apply"])
def test_one_block_at_two_places_is_refused(way):
    model = tiny.build("clip")
    data = tiny.retrieval_data("clip", model, 6)
    layers = model.text_model.encoder.layers
    layers[1] = layers[0]
    with pytest.raises(ValueError, match=r"layers\.1 and text_model\.encoder\.layers\.0 are one module; give each"):
        WAYS[way](model, data)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of quantised tensors, whom people use all the same
def test_a_quantised_projection_is_refused():
    model = tiny.build("clip")
    dynamic = torch.ao.nn.quantized.dynamic.Linear(4, 4)
    model.vision_model.encoder.layers[0].mlp.fc2 = dynamic
    with pytest.raises(ValueError, match=r"projection of neurons in vision_model\.encoder\.layers\.0 is a torch\.ao"):
        check_linears(vp.describe(model), ["vision"])


@pytest.mark.parametrize("name", tiny.EVERY)
def test_every_family_is_plain(name):
    anatomy = vp.describe(tiny.build(name))
    check_linears(anatomy, list(anatomy.towers))
