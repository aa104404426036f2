"""A sample of the tests, where there is no time for all."""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def evenly(groups: Sequence[Hashable], count: int) -> list[int]:
    """Choose ``count`` places of ``groups``: as many of each group, evenly over it; others get what it leaves."""
    places: dict[Hashable, list[int]] = {}
    for place, group in enumerate(groups):
        places.setdefault(group, []).append(place)
    chosen: list[int] = []
    for turn, of_group in enumerate(sorted(places.values(), key=len)):
        share = min(len(of_group), (count - len(chosen)) // (len(places) - turn))
        chosen += [of_group[i * len(of_group) // share] for i in range(share)]
    return sorted(chosen)
