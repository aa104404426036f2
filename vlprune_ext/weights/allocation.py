"""Water-filling: how many weights each group keeps, under an exact total."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction


def keep_count(total: int, sparsity: float) -> int:
    """Return floor(total * (1 - sparsity)), the sparsity taken as its decimal digits: 0.9 of 10 keeps 1, not 0."""
    return math.floor(total * (1 - Fraction(repr(float(sparsity)))))


def allocate(
    importance: Sequence[float], sizes: Sequence[int], keep: int, floors: Sequence[int] | None = None
) -> list[int]:
    """Allocate ``keep`` weights to groups by water-filling: its floor to each, the rest in proportion to importance.

    A group that is full drops out and leaves its share to the others (ECoFLaP, arXiv 2310.02998, section 3.2), down to
    the last weight: the result sums to ``keep`` exactly. Shares are exact fractions, rounded by largest remainder, ties
    to the lower index. Groups of importance zero get what the others cannot hold, in proportion to their room.

    Parameters
    ----------
    importance : sequence of float [G]
        Finite, at least 0.
    sizes : sequence of int [G]
        Weights of each group.
    keep : int
        Weights that all groups keep together, between the sums of floors and sizes.
    floors : sequence of int [G], optional
        Weights that each group keeps at least, at most its size. None: 0.

    Returns
    -------
    list of int [G]
        Kept weights of each group.

    Raises
    ------
    ValueError
        An argument out of bounds; the message names the group and what was expected.
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
    """Return the exact shares min(room, level * importance) whose level makes them sum to ``amount``."""
    shares = [Fraction(0)] * len(room)
    weight = [Fraction(value) for value in importance]
    left, total = Fraction(amount), sum(w for w, limit in zip(weight, room, strict=True) if limit > 0)
    # In the order in which groups fill up as the water rises.
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
    """Round shares down or up to integers that sum to ``amount``, by largest remainder."""
    whole = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(whole)), key=lambda i: whole[i] - shares[i])
    for i in by_remainder[: amount - sum(whole)]:
        whole[i] += 1
    return whole


def round_shares(shares: Sequence[float], sizes: Sequence[int], keep: int) -> list[int]:
    """Round shares whose sum is near ``keep`` to integers that sum to it exactly, each between 0 and its size.

    Parameters
    ----------
    shares : sequence of float [G]
        Kept weights of each group before rounding.
    sizes : sequence of int [G]
        Weights of each group.
    keep : int
        The sum of the result.

    Returns
    -------
    list of int [G]
        Kept weights of each group.
    """
    held = [min(max(share, 0.0), size) for share, size in zip(shares, sizes, strict=True)]
    floors = [math.floor(share) for share in held]
    if sum(floors) > keep:
        return allocate(floors, sizes, keep)
    return allocate([share - floor + 1e-9 for share, floor in zip(held, floors, strict=True)], sizes, keep, floors)
