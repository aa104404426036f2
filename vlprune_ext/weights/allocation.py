"""How many weights each group keeps, when all together keep an exact number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction


def keep_count(total: int, sparsity: float) -> int:
    """floor(total * (1 - sparsity)), with the sparsity that its decimal digits say: 0.9 of 10 leaves 1, not 0."""
    return math.floor(total * (1 - Fraction(repr(float(sparsity)))))


def allocate(
    importance: Sequence[float], sizes: Sequence[int], keep: int, floors: Sequence[int] | None = None
) -> list[int]:
    """How many weights each group keeps: its floor, and of the rest a share in proportion to its importance.

    A group that is full drops out and leaves its share to the others (ECoFLaP, arXiv 2310.02998, section 3.2), down to
    the last weight: the result sums to ``keep`` exactly. Shares are exact fractions, rounded by largest remainder, ties
    to the lower index. What groups of no importance must take, they take by size.

    importance  [G]  finite, >= 0
    sizes       [G]  weights of each group
    keep        0 <= keep <= sum(sizes)
    floors      [G]  0 <= floor <= size, together at most ``keep``; 0 by default

    Raises ValueError naming the group and what was expected.
    """
    floors = [0] * len(sizes) if floors is None else list(floors)
    if not len(importance) == len(sizes) == len(floors):
        raise ValueError(f"got {len(importance)} importances, {len(sizes)} sizes and {len(floors)} floors")
    for i, (value, size, floor) in enumerate(zip(importance, sizes, floors, strict=True)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"importance[{i}] is {value}; expected a finite number of at least 0")
        if not 0 <= floor <= size:
            raise ValueError(f"floors[{i}] is {floor}; expected 0 <= floor <= {size}, the group's size")
    if not sum(floors) <= keep <= sum(sizes):
        raise ValueError(f"keep is {keep}; expected between {sum(floors)} (the floors) and {sum(sizes)} (all)")
    room = [size - floor for size, floor in zip(sizes, floors, strict=True)]
    amount = keep - sum(floors)
    extra = _round(_fill(importance, room, amount), amount)
    return [floor + share for floor, share in zip(floors, extra, strict=True)]


def _fill(importance: Sequence[float], room: Sequence[int], amount: int) -> list[Fraction]:
    """Shares min(room, level * importance) that sum to ``amount``, as exact fractions."""
    shares = [Fraction(0)] * len(room)
    weight = [Fraction(value) for value in importance]
    left, total = Fraction(amount), sum(w for w, limit in zip(weight, room, strict=True) if limit > 0)
    # In the order in which groups fill up while the level rises.
    waiting = sorted((i for i in range(len(room)) if weight[i] > 0 and room[i] > 0), key=lambda i: room[i] / weight[i])
    for place, i in enumerate(waiting):
        if left * weight[i] < room[i] * total:  # from here on none fills up
            for j in waiting[place:]:
                shares[j] = left * weight[j] / total
            return shares
        shares[i] = Fraction(room[i])
        left -= room[i]
        total -= weight[i]
    rest = [i for i in range(len(room)) if weight[i] == 0]
    of_rest = sum(room[i] for i in rest)
    for i in rest:
        shares[i] = left * room[i] / of_rest if of_rest else Fraction(0)
    return shares


def _round(shares: Sequence[Fraction], amount: int) -> list[int]:
    """Whole numbers that sum to ``amount``, each the floor of its share or one more."""
    whole = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(whole)), key=lambda i: whole[i] - shares[i])
    for i in by_remainder[: amount - sum(whole)]:
        whole[i] += 1
    return whole


def round_shares(shares: Sequence[float], sizes: Sequence[int], keep: int) -> list[int]:
    """Whole numbers of at least 0 and at most the sizes that sum to ``keep``, near shares that nearly do."""
    held = [min(max(share, 0.0), size) for share, size in zip(shares, sizes, strict=True)]
    floors = [math.floor(share) for share in held]
    if sum(floors) > keep:
        return allocate(floors, sizes, keep)
    return allocate([share - floor + 1e-9 for share, floor in zip(held, floors, strict=True)], sizes, keep, floors)
