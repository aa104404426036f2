"""First-order Taylor structured pruning: the gradient baseline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..anatomy import Block, Site
from ..interventions import DropLayer
from ..objectives import objective_named
from ..patch import Patches, evaluation_mode
from ..plan import Scores
from ..surgery import masked
from .structured import Structured, Task


@dataclass(kw_only=True)
class Taylor(Structured):
    """Rank modules by the gradient of the objective with respect to a gate on each, at one.

    The gate multiplies the module's slice of the output projection's input (Michel et al., arXiv 1905.10650, eq. 3;
    Molchanov et al., arXiv 1906.10771). It estimates the drop that MoPE measures, for one backward pass, but it needs a
    differentiable objective and the memory of the whole graph.

    per_sample  True: mean over samples of |gradient|; False: |mean over samples|
    """

    per_sample: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        objective = objective_named(self.objective)
        if not objective.differentiable:
            raise ValueError(f"objective: {objective.name!r} has no gradient; try 'contrastive' or 'margin'")

    def importance(self, task: Task) -> Scores:
        found = task.candidates()
        value = torch.zeros(len(found), dtype=torch.float64)
        with masked(task.anatomy.model, task.plan), evaluation_mode(task.anatomy.model):
            for tower in task.towers:
                gradients = self._gate_gradients(task, tower)
                for i, candidate in enumerate(found):
                    drop = candidate.intervention
                    if drop.tower != tower:
                        continue
                    if isinstance(drop, DropLayer):
                        gates = [g.sum(-1) for (layer, _), g in gradients.items() if layer == drop.layer]
                        slope = torch.stack(gates).sum(0)
                    else:
                        slope = gradients[drop.layer, drop.kind][:, list(drop.units)].sum(-1)
                    value[i] = (slope.abs().mean() if self.per_sample else slope.mean().abs()).double()
        return task.scores(value, f"taylor({task.objective.name})")

    def _gate_gradients(self, task: Task, tower: str) -> dict[tuple[int, str], Tensor]:
        """(layer, site kind) -> [rows, units]: d objective / d gate, one gate per row and unit."""
        objective, anatomy = task.objective, task.anatomy
        with torch.no_grad():
            other = objective.other(anatomy, tower, task.data, self.batch_size)
        batches = objective.batches(anatomy, tower, task.data, self.batch_size)
        gates: dict[tuple[int, str], list[Tensor]] = {}
        with torch.enable_grad(), _frozen(anatomy.model), Patches() as patches:
            for layer, block in enumerate(anatomy.tower(tower).blocks):
                if layer not in task.plan.layers.get(tower, []):
                    _gate(patches, layer, block, gates)
            outputs = torch.cat([objective.outputs(anatomy, tower, batch) for batch in batches])
            total = objective.values(anatomy, tower, outputs, other, task.data).sum()
            flat = [gate for per_batch in gates.values() for gate in per_batch]
            slopes = iter(torch.autograd.grad(total, flat, allow_unused=True))
        return {
            key: torch.cat([_or_zero(next(slopes), gate) for gate in per_batch]).cpu()
            for key, per_batch in gates.items()
        }


def _or_zero(slope: Tensor | None, gate: Tensor) -> Tensor:
    return torch.zeros_like(gate) if slope is None else slope


def _gate(patches: Patches, layer: int, block: Block, gates: dict[tuple[int, str], list[Tensor]]) -> None:
    def hook(site: Site):
        def multiply(_, args):
            x = args[0]
            gate = torch.ones(x.shape[0], site.units, dtype=x.dtype, device=x.device, requires_grad=True)
            gates.setdefault((layer, site.kind), []).append(gate)
            shape = (x.shape[0], *[1] * (x.dim() - 2), site.units, 1)
            return ((x.unflatten(-1, (site.units, site.width)) * gate.view(shape)).flatten(-2),)

        return multiply

    for site in block.sites.values():
        patches.pre_hook(site.out, hook(site))


@contextmanager
def _frozen(model) -> Iterator[None]:
    """Only the gates need gradients."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in flags:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
