"""What holds around a call changes nothing of what it gives: the default dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from models import tiny

import vlprune_ext as vp
from vlprune_ext.methods import TOKENS

FIELDS = {"fastv": {"layer": 2}, "plphp": {"skip": 1}}
WIDTH = {"keep_heads": 0.5, "keep_neurons": 0.5, "steps": 2, "neurons_per_group": 8}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def other_default(request):
    return default_dtype(request.param)


@pytest.mark.parametrize("name", TOKENS)
@torch.no_grad()
def test_token_methods_do_not_look_at_the_default_dtype(name, other_default):
    model = tiny.build("llava")
    values = tiny.inputs("llava", model, 2)
    method = TOKENS[name](**FIELDS.get(name, {}))

    def run():
        with vp.prune_tokens(model, method):
            return model(**values).logits

    wanted = run()
    with other_default:
        found = run()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


METHODS = {
    "mope": lambda: vp.MoPE(**WIDTH),
    "race": lambda: vp.MoPE(**WIDTH, exact=False),
    "taylor": lambda: vp.Taylor(**WIDTH),
    "magnitude": lambda: vp.Magnitude(**WIDTH),
    "random": lambda: vp.Random(**WIDTH),
    "ecoflap": lambda: vp.ECoFLaP(sparsity=0.5),
    "owl": lambda: vp.ECoFLaP(sparsity=0.5, estimator="outliers"),
    "comp": lambda: vp.CoMP(train=False, flops=0.8, objective="contrastive"),
}


@pytest.mark.parametrize("name", METHODS)
def test_plans_do_not_depend_on_the_default_dtype(name, other_default):
    model = tiny.build("clip")
    data = tiny.retrieval_data("clip", model, 8)
    wanted = METHODS[name]().plan(model, data)
    with other_default:
        found = METHODS[name]().plan(model, data)
    assert found.to_json() == wanted.to_json()
