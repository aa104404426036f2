from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlprune_ext.weights.allocation import allocate, keep_count, round_shares


@settings(max_examples=1_000, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**64), sparsity=st.floats(0, 0.999), above=st.floats(0, 0.3))
def test_the_budget_is_met_exactly(seed, sparsity, above):
    """10,000 allocations, ten for each sparsity."""
    draw = random.Random(seed)
    for _ in range(10):
        groups = range(draw.randint(1, 8))
        most = [10 ** draw.choice([1, 6, 11]) for _ in groups]
        sizes = [draw.choice([0, 1, draw.randint(2, m)]) for m in most]
        importance = [draw.choice([0.0, 5e-324, draw.random(), 10 ** draw.uniform(-320, 300)]) for _ in groups]
        keep = keep_count(sum(sizes), sparsity)
        assert keep == math.floor(sum(sizes) * (1 - Fraction(repr(sparsity))))
        floors = [keep_count(size, min(1.0, sparsity + above)) for size in sizes]
        kept = allocate(importance, sizes, keep, floors)
        assert sum(kept) == keep
        assert all(floor <= k <= size for floor, k, size in zip(floors, kept, sizes, strict=True))


def test_shares_follow_importance():
    assert allocate([1, 2, 3], [100, 100, 100], 60) == [10, 20, 30]
    assert allocate([1, 2, 3], [100, 100, 100], 90, [10, 10, 10]) == [20, 30, 40]
    # The third fills up and leaves 50 to the others, one to two.
    assert allocate([1, 2, 9], [100, 100, 30], 75) == [15, 30, 30]
    # No importance takes only what nobody else can, by size.
    assert allocate([1, 0, 0], [10, 20, 40], 25) == [10, 5, 10]
    assert allocate([0, 0], [10, 30], 20) == [5, 15]
    # Largest remainder, ties to the lower index.
    assert allocate([1, 1, 1], [10, 10, 10], 8) == [3, 3, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], [2], 3), r"keep is 3; expected between 0 \(the floors\) and 2"),
        (([1.0], [2], 0, [1]), r"keep is 0; expected between 1"),
        (([math.nan], [2], 1), r"importance\[0\] is nan; expected a finite number"),
        (([1.0, -1.0], [2, 2], 1), r"importance\[1\] is -1.0"),
        (([1.0], [2], 1, [3]), r"floors\[0\] is 3; expected 0 <= floor <= 2"),
        (([1.0], [2, 3], 1), r"got 1 importances, 2 sizes"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        allocate(*arguments)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.floats(-2, 12), st.integers(0, 10)), min_size=1, max_size=8), st.floats(0, 1))
def test_rounded_shares_sum_to_the_budget(groups, part):
    shares, sizes = zip(*groups, strict=True)
    keep = math.floor(part * sum(sizes))
    kept = round_shares(shares, sizes, keep)
    assert sum(kept) == keep
    assert all(0 <= k <= size for k, size in zip(kept, sizes, strict=True))
