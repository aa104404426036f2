"""2:4 weights on sparse tensor cores: what is converted, that it computes the same, and that it says how fast it is."""

from __future__ import annotations

import copy

import pytest
import torch
from models import tiny

import vlprune_ext as vp
from vlprune_ext.anatomy import describe
from vlprune_ext.weights import semi_structured
from vlprune_ext.weights.matrices import matrices
from vlprune_ext.weights.semi_structured import Conversion, is_two_four, to_semi_structured


def pruned(pattern: str = "2:4", **fields):
    model = tiny.build("llava")
    data = tiny.retrieval_data("llava", model, 3)
    return vp.prune_weights(model, data, criterion="magnitude", pattern=pattern, **fields), data


def test_what_is_two_four():
    model, _ = pruned(towers=["vision"])
    for matrix in matrices(describe(model)):
        assert is_two_four(matrix.weight) == (matrix.tower == "vision")
    assert is_two_four(torch.zeros(3, 8))
    assert is_two_four(torch.tensor([[0.0, 1, 0, -1, 2, 0, 0, 0]]))
    assert not is_two_four(torch.tensor([[0.0, 1, 1, -1, 0, 0, 0, 0]]))
    assert not is_two_four(torch.zeros(3, 6))
    assert not is_two_four(pruned("4:8")[0].model.vision_tower.encoder.layers[0].self_attn.q_proj.weight)


def test_it_needs_a_gpu():
    model, _ = pruned()
    name = matrices(describe(model))[0].name
    with pytest.raises(ValueError, match=f"{name} is on cpu; expected a GPU of compute capability 8.0"):
        to_semi_structured(model)
    with pytest.raises(ValueError, match="rows: 0, expected at least 1"):
        to_semi_structured(model, rows=0)


def test_what_is_said():
    """Also where it is slower, and where torch cannot."""
    faster, slower = Conversion("a", (8, 16), 4, 3.0, 1.5), Conversion("b", (8, 8), 4, 1.0, 4.0)
    left = Conversion("c", (3, 8), 4, 1.0, None)
    assert [of.ratio for of in (faster, slower, left)] == [2.0, 0.25, None]
    assert semi_structured._line(faster) == "a [8, 16]: dense 3.000 ms, 2:4 1.500 ms, 2.00x"
    assert semi_structured._line(left).endswith("torch has no sparse product for this shape, stays dense")
    assert semi_structured._summary([faster, slower, left]) == (
        "2 of 3 2:4 matrices converted; all products with 4 rows: dense 4.00 ms, 2:4 5.50 ms, 0.73x; "
        "1 slower than dense"
    )
    assert semi_structured._summary([left]) == "0 of 1 2:4 matrices converted"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_model_computes_the_same(dtype):
    model, data = pruned()
    model = model.to("cuda", dtype)
    inputs = {name: value.to("cuda") for name, value in data.batch(torch.arange(3)).items() if name != "labels"}
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    dense = copy.deepcopy(model)
    said: list[str] = []
    done = to_semi_structured(model, rows=256, say=said.append)
    assert len(said) == len(done) + 1
    assert {of.name for of in done} == {matrix.name for matrix in matrices(describe(dense))}
    converted = [of for of in done if of.sparse_ms is not None]
    assert converted
    assert all(of.dense_ms > 0 and of.sparse_ms > 0 for of in converted)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, dense(**inputs).logits, rtol=2e-2, atol=2e-2)
    with pytest.raises(ValueError, match="save the model before"):
        vp.save_pruned(model, "never")


@pytest.mark.gpu
def test_it_needs_half_precision_and_two_four():
    model, _ = pruned()
    with pytest.raises(ValueError, match=r"is torch.float32; expected torch.float16 or torch.bfloat16"):
        to_semi_structured(model.cuda())
    with pytest.raises(ValueError, match="no dense matrix is 2:4"):
        to_semi_structured(tiny.build("llava").to("cuda", torch.float16))
