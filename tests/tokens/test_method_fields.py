"""Fields of the methods of token pruning: a wrong one is named when the method is made."""

from __future__ import annotations

import pytest

import vlprune_ext as vp


@pytest.mark.parametrize("value", ["x", 1.5, True, None])
@pytest.mark.parametrize(
    ("method", "field"),
    [(vp.FastV, "layer"), (vp.DivPrune, "layer"), (vp.RandomTokens, "layer"), (vp.RandomTokens, "seed")],
)
def test_whole_numbers(method, field, value):
    with pytest.raises(ValueError, match=f"{field} is .*; expected a whole number"):
        method(**{field: value})
