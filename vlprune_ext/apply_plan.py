"""Apply a plan to a model: the only place where a model is changed.

Whatever is removed, the outputs are those of the dense model with the same heads and neurons masked to zero and the
same layers bypassed.
"""

from __future__ import annotations

import json

from torch import nn

from .anatomy import Anatomy, describe
from .data import Data
from .objectives import objective_named
from .plan import Plan
from .units.rounding import round_plan
from .units.sites import check_changeable
from .units.surgery import remove_units, zero_units
from .weights.layerwise import Selection, prune_layerwise

MODES = ("remove", "mask")


def apply(
    model: nn.Module, plan: Plan, data: object | None = None, *, mode: str = "remove", round_to: int = 8
) -> nn.Module:
    """Prune ``model`` in place as ``plan`` says, and return it.

    A site that loses all its units keeps one of them, zeroed: attention kernels and KV caches do not run without heads.

    Parameters
    ----------
    model : nn.Module
        A transformers model of one of the supported families.
    plan : Plan
        Made for a model of this shape (`Plan.check`).
    data : Data, optional
        The calibration data the plan was made with; its name and hash are recorded. Required by a plan with sparsities,
        whose weights are selected on it.
    mode : {"remove", "mask"}
        "remove": heads, neurons and layers are removed physically: projections become narrower, blocks leave their
        list. Modules stay the same objects, so hooks and references survive; their parameters are new, so build an
        optimizer afterwards. "mask": the same outputs by zeroed weights; the model keeps its shape, loads anywhere and
        is no faster.
    round_to : int
        With mode="remove", MLP widths are rounded up to a multiple of this (`round_plan`); 1 disables rounding.

    Returns
    -------
    nn.Module
        ``model``. Its attribute ``vlprune`` records what was done: ``{"shape": the dense model's, "plans": [{"plan",
        "mode", "zeroed", "data"}, ...]}``, one entry for each plan applied.

    Raises
    ------
    ValueError
        The plan does not fit the model or cannot be carried out; the model is then unchanged.
    """
    if mode not in MODES:
        raise ValueError(f"mode: {mode!r}, expected one of {', '.join(MODES)}")
    anatomy = describe(model)
    plan.check(anatomy)
    rounded = round_plan(plan, round_to)
    plan = rounded if mode == "remove" else plan
    check_changeable(anatomy, plan, mode)
    shape = anatomy.shape()
    if plan.sparsity:
        _prune_weights(anatomy, plan, data)
    zeroed = remove_units(anatomy, plan) if mode == "remove" else zero_units(anatomy, plan)
    record = getattr(model, "vlprune", None) or {"shape": shape, "plans": []}
    origin = None if data is None else {"name": getattr(data, "name", ""), "hash": getattr(data, "hash", "")}
    entry = {"plan": json.loads(plan.to_json()), "mode": mode, "zeroed": zeroed, "data": origin}
    model.vlprune = {**record, "plans": [*record["plans"], entry]}  # type: ignore[assignment]
    return model


def _prune_weights(anatomy: Anatomy, plan: Plan, data: object | None) -> None:
    """Zero single weights, layer by layer, before units are removed: names and sparsities are the whole model's."""
    if not isinstance(data, Data):
        raise ValueError("data: needed to carry out a plan with sparsities, which depends on the inputs of each matrix")
    try:
        selection = Selection(**plan.selection)
    except TypeError as error:
        raise ValueError(f"plan: selection {plan.selection}: {error}") from None
    prune_layerwise(anatomy, objective_named(selection.objective, anatomy), data, plan.sparsity, selection)
