"""Round the widths that a plan leaves."""

from __future__ import annotations

import copy
import math

from ..plan import Plan


def round_plan(plan: Plan, round_to: int) -> Plan:
    """Return a plan that leaves every MLP a width divisible by ``round_to``, by removing fewer neurons.

    Neurons that the plan removed last, the most important of those removed, are kept. A width never exceeds that of
    the model the plan is for.

    Parameters
    ----------
    plan : Plan
        Not changed.
    round_to : int
        1 changes nothing.

    Raises
    ------
    ValueError
        ``round_to`` is no int of at least 1.
    """
    if not isinstance(round_to, int) or round_to < 1:
        raise ValueError(f"round_to: {round_to!r}, expected an int >= 1")
    rounded = copy.deepcopy(plan)
    for tower, layers in plan.neurons.items():
        for layer, units in layers.items():
            width = plan.shape[tower][layer]["neurons"]
            goal = min(width, math.ceil((width - len(units)) / round_to) * round_to)
            rounded.neurons[tower][layer] = units[: width - goal]
    return rounded
