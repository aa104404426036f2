"""`plan_cost`: what a scoring job costs, before it starts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..anatomy import Anatomy, describe
from ..anatomy.flops import count_flops
from ..anatomy.patch import Patches, evaluation_mode
from ..data import Data
from ..objectives import Objective, objective_named
from ..units.candidates import candidates, check_kinds, neuron_groups
from .measure import seconds_of


@torch.no_grad()
def plan_cost(
    model: nn.Module,
    data: Data,
    *,
    modules: Sequence[str] = ("head", "neurons"),
    towers: Sequence[str] | None = None,
    objective: str | Objective | None = None,
    neurons_per_group: int = 64,
    steps: int = 1,
    batch_size: int = 32,
) -> dict:
    """Estimate what a scoring job costs before it starts: an upper bound, since later steps score what is left.

    Parameters
    ----------
    model : nn.Module
        The dense model.
    data : Data
        Calibration data; one batch of it is timed.
    modules : sequence of str
        Kinds that are scored: "head", "cross_head", "neurons", "layer".
    towers : sequence of str, optional
        All that the objective sees by default.
    objective : str or Objective, optional
        By default what suits the model.
    neurons_per_group, steps, batch_size : int
        As `score` and the methods take them.

    Returns
    -------
    dict
        ``{"towers": {tower: {...}}, ...totals}`` with modules, block_runs (by replay), naive_block_runs, flops,
        stream_bytes (of the residual streams held) and seconds (from timing one batch).
    """
    anatomy = describe(model)
    objective = objective_named(objective, anatomy)
    kinds = check_kinds(modules)
    towers = tuple(towers) if towers is not None else objective.towers(anatomy)
    groups = neuron_groups(anatomy, towers, neurons_per_group) if "neurons" in kinds else {}
    result = {}
    for tower in towers:
        depth = anatomy.tower(tower).depth
        found = [c.intervention for c in candidates(anatomy, (tower,), kinds, groups)]
        batches = objective.batches(anatomy, tower, data, batch_size)
        rows = sum(len(next(iter(batch.values()))) for batch in batches)
        runs = depth + sum(max(0, depth - i.layer - (not i.runs_block)) for i in found)
        per_row, stream, seconds = _one_batch(anatomy, objective, tower, batches[0])
        result[tower] = {
            "modules": len(found),
            "block_runs": rows * runs * steps,
            "naive_block_runs": rows * depth * (1 + len(found)) * steps,
            "flops": rows * runs * steps * per_row // depth,
            "stream_bytes": rows * stream,
            "seconds": rows * runs * steps * seconds / depth,
        }
    summed = ("modules", "block_runs", "naive_block_runs", "flops", "seconds")
    totals = {key: sum(t[key] for t in result.values()) for key in summed}
    return {"towers": result, **totals, "stream_bytes": max(t["stream_bytes"] for t in result.values())}


def _one_batch(anatomy: Anatomy, objective: Objective, tower: str, batch: dict) -> tuple[int, int, float]:
    """FLOPs, residual-stream bytes and seconds of one row."""
    rows = len(next(iter(batch.values())))
    sizes: list[int] = []
    with evaluation_mode(anatomy.model), Patches() as patches:
        block = anatomy.tower(tower).blocks[0].module
        patches.hook(block, lambda _, __, out: sizes.append(out.numel() * out.element_size()))
        flops = count_flops(lambda: objective.outputs(anatomy, tower, batch))
        seconds = min(seconds_of(lambda: objective.outputs(anatomy, tower, batch), anatomy.model) for _ in range(2))
    return flops // rows, sizes[0] // rows, seconds / rows
