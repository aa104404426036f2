"""Patches of modules are undone, and a copy that is taken in between is an ordinary module."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from models import tiny
from torch import nn

import vlprune_ext as vp
from vlprune_ext.anatomy.patch import Patches


class Doubled(nn.Module):
    """A linear layer with a property that writes under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.number = 1
        self._kind = "plain"

    @property
    def kind(self) -> str:
        return self._kind

    @kind.setter
    def kind(self, value: str) -> None:
        self._kind = value

    def forward(self, x):
        return 2 * self.inner(x)


class Note:
    """A hook that can be pickled."""

    def __call__(self, *_):
        return None


def patched(patches: Patches, module: Doubled) -> None:
    patches.forward(module, lambda x: x)
    patches.hook(module.inner, lambda *_: torch.zeros(1))
    patches.pre_hook(module.inner, lambda *_: (torch.zeros(1, 3),))
    patches.hook(module, lambda _, args, kwargs, out: out + 5, with_kwargs=True)
    patches.attribute(module, "number", 2)
    patches.attribute(module, "kind", "patched")


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_torch(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch])
def test_a_copy_of_a_patched_module_is_a_plain_one(duplicate):
    module, x = Doubled(), torch.randn(2, 3)
    wanted = module(x)
    module.inner.register_forward_hook(Note())  # the user's, which stays
    with Patches() as outer, Patches() as inner:
        patched(outer, module)
        patched(inner, module)
        assert not torch.equal(module(x), wanted)
        found = duplicate(module)
    for one in (found, module, duplicate(module)):
        assert torch.equal(one(x), wanted)
        assert (one.number, one.kind) == (1, "plain")
        assert not {"forward", "__deepcopy__", "__reduce_ex__"} & one.__dict__.keys()
        assert len(one.inner._forward_hooks) == 1
        assert not one._forward_hooks
    assert found.inner.weight.data_ptr() != module.inner.weight.data_ptr()


def test_patches_are_undone_one_by_one():
    module = Doubled()
    outer, inner = Patches(), Patches()
    patched(outer, module)
    patched(inner, module)
    inner.undo()
    assert module.number == 2
    assert copy.deepcopy(module).number == 1
    outer.undo()
    assert module.number == 1


def silence(model):
    """Zero the language model's blocks, which hooks that belong to another model would not notice."""
    for parameter in model.model.language_model.layers.parameters():
        parameter.data.zero_()
    return model


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_torch])
@pytest.mark.parametrize(
    "method",
    [vp.FastV(layer=2, keep=0.5), vp.PLPHP(skip=1), vp.ToMe(keep=0.5), vp.VisionZip(keep=0.5), vp.LookM(keep=0.5)],
    ids=lambda method: method.name,
)
@torch.no_grad()
def test_a_copy_within_prune_tokens_is_a_model_of_its_own(method, duplicate):
    model = tiny.build("llava")
    values = tiny.inputs("llava", model, 2)
    wanted = silence(copy.deepcopy(model))(**values).logits
    with vp.prune_tokens(model, method):
        if duplicate is copy.deepcopy:  # a LLaVA that has run holds a hook of transformers' that cannot be pickled
            model(**values)
        found = duplicate(model)
    assert torch.equal(silence(found)(**values).logits, wanted)
    with vp.prune_tokens(found, method):  # and it is not taken for one that is pruned already
        found(**values)


@torch.no_grad()
def test_a_copy_within_masked_is_dense():
    model = tiny.build("clip")
    values = tiny.inputs("clip", model, 3)
    wanted = tiny.outputs("clip", model, values)
    plan = tiny.uneven_plan(model)
    with vp.masked(model, plan):
        found = copy.deepcopy(model)
    assert torch.equal(tiny.outputs("clip", found, values), wanted)


def test_a_copy_that_is_taken_while_scoring_is_dense():
    model = tiny.build("clip")
    data = tiny.retrieval_data("clip", model, 6)
    values = tiny.inputs("clip", model, 3)
    wanted = tiny.outputs("clip", model, values)
    copies = []
    plan = vp.Plan(vp.describe(model).shape())
    plan.add("vision", "head", 0, [1])
    vp.score(model, data, plan=plan, progress=lambda *_: copies.append(copy.deepcopy(model)) if not copies else None)
    assert torch.equal(tiny.outputs("clip", copies[0], values), wanted)
