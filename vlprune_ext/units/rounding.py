"""Round the widths that a plan leaves."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

from ..plan import Plan


def round_plan(plan: Plan, round_to: int, order: Mapping[str, Mapping[int, Sequence[int]]] | None = None) -> Plan:
    """A plan that leaves every MLP a width divisible by ``round_to``, by removing fewer neurons.

    order  tower -> layer -> neurons from least to most important: the most important of those that should go come
           back. Without it, those with the highest index.

    A width never exceeds that of the model the plan is for. ``round_to=1`` changes nothing.
    """
    if not isinstance(round_to, int) or round_to < 1:
        raise ValueError(f"round_to: {round_to!r}, expected an int >= 1")
    rounded = copy.deepcopy(plan)
    for tower, layers in plan.neurons.items():
        for layer, units in layers.items():
            width = plan.shape[tower][layer]["neurons"]
            goal = min(width, math.ceil((width - len(units)) / round_to) * round_to)
            if order is None:
                ranked = sorted(units)
            else:
                place = {unit: i for i, unit in enumerate(order[tower][layer])}
                ranked = sorted(units, key=lambda unit: place[unit])
            rounded.neurons[tower][layer] = sorted(ranked[: width - goal])
    return rounded
