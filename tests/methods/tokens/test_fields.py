"""Fields of the methods of token pruning: a wrong one is named when the method is made."""

from __future__ import annotations

import pytest

import vlprune_ext as vp


@pytest.mark.parametrize("value", ["x", 1.5, True, None])
@pytest.mark.parametrize(
    ("method", "field"),
    [
        (vp.FastV, "layer"),
        (vp.DivPrune, "layer"),
        (vp.RandomTokens, "layer"),
        (vp.RandomTokens, "seed"),
        (vp.PLPHP, "skip"),
        (vp.LookM, "skip"),
    ],
)
def test_whole_numbers(method, field, value):
    with pytest.raises(ValueError, match=f"{field} is .*; expected a whole number"):
        method(**{field: value})


@pytest.mark.parametrize("layers", [3, "12", (2, 1), (1, 1), (1, 1.5), ()])
def test_stages(layers):
    with pytest.raises(ValueError, match="expected a tuple of blocks in ascending order"):
        vp.PyramidDrop(layers=layers)


@pytest.mark.parametrize("value", ["x", -0.1, 1.5, True, float("nan")])
@pytest.mark.parametrize(
    ("method", "field"), [(vp.PLPHP, "spread"), (vp.PLPHP, "high"), (vp.PLPHP, "low"), (vp.VisionZip, "contextual")]
)
def test_parts(method, field, value):
    with pytest.raises(ValueError, match=f"{field} is .*; expected a share 0 <= {field} <= 1"):
        method(**{field: value})


def test_a_share_of_plphp_alone_is_enough():
    assert vp.PLPHP(keep=0.11).spread == vp.PLPHP().spread


def test_a_flag_is_a_flag():
    with pytest.raises(ValueError, match="merge is 1; expected True or False"):
        vp.LookM(merge=1)
