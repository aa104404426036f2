"""FLOPs from shapes beside those that torch counts."""

from __future__ import annotations

import pytest
import torch
from models import tiny

from vlprune_ext.anatomy import describe
from vlprune_ext.anatomy.flops import count_flops
from vlprune_ext.anatomy.patch import Patches
from vlprune_ext.apply_plan import apply
from vlprune_ext.comp import block_flops
from vlprune_ext.plan import Plan

NAMES = ("clip", "siglip", "blip_itr", "blip_vqa", "llava", "vit", "llama", "paligemma", "internvl", "t5")


class Stop(Exception):
    """Enough was seen."""


def calls_of(name, model, tower):
    """How each block of a tower is called, and with how many tokens: its own, and those of its memory."""
    seen = []
    with Patches() as patches, torch.no_grad():
        for block in tower.container:
            patches.pre_hook(block, lambda m, args, kwargs: seen.append((m, args, kwargs)), with_kwargs=True)
        model(**tiny.inputs(name, model, 1))
    for module, args, kwargs in seen:
        hidden = args[0] if args else kwargs["hidden_states"]
        memory = kwargs.get("encoder_hidden_states")
        if memory is None and name.startswith("blip_") and len(args) > 1:
            memory = args[1]
        if memory is None and type(module).__name__ == "T5Block" and len(args) > 3:
            memory = args[3]
        yield module, args, kwargs, hidden.shape[1], 0 if memory is None else memory.shape[1]


def check(name, model):
    for tower in describe(model).towers.values():
        calls = list(calls_of(name, model, tower))
        assert len(calls) == len(tower)
        for block, (module, args, kwargs, tokens, memory) in zip(tower.blocks, calls, strict=True):
            kwargs = {key: value for key, value in kwargs.items() if key != "past_key_values"}  # a cache would grow
            with torch.no_grad():
                counted = count_flops(lambda m=module, a=args, k=kwargs: m(*a, **k))
            assert block_flops(block, tokens, memory=memory) == pytest.approx(counted, rel=0.01), (tower.name, tokens)


@pytest.mark.parametrize("name", NAMES)
def test_dense(name):
    check(name, tiny.build(name))


@pytest.mark.parametrize("name", ["clip", "llava", "vit"])
def test_what_is_left(name):
    """Of a model that lost units for good, and by telling of the dense one what stays."""
    model = tiny.build(name)
    dense = describe(tiny.build(name))
    plan = Plan(dense.shape())
    for tower, blocks in plan.shape.items():
        for layer in range(len(blocks)):
            plan.add(tower, "head", layer, [1])
            plan.add(tower, "neurons", layer, list(range(8 * (layer + 1))))
    apply(model, plan, round_to=1)
    check(name, model)
    for tower in dense.towers.values():
        pruned = describe(model).tower(tower.name)
        for layer, block in enumerate(tower.blocks):
            kept = {kind: site.units for kind, site in pruned.blocks[layer].sites.items()}
            assert block_flops(block, 7, kept=kept) == block_flops(pruned.blocks[layer], 7)


def test_bad_input():
    block = describe(tiny.build("clip")).tower("text").blocks[0]
    with pytest.raises(ValueError, match="kept has cross_head; expected some of head, neurons"):
        block_flops(block, 5, kept={"cross_head": 1})
    with pytest.raises(ValueError, match="kept is 9 of head; expected 0 to 4"):
        block_flops(block, 5, kept={"head": 9})
