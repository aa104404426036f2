"""`score`: how much an objective drops without each module of a model, by replay."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .anatomy import KINDS, Anatomy, describe
from .data import Data
from .interventions import DropHead, DropLayer, DropNeurons, Intervention
from .objectives import Objective, objective_named
from .patch import Patches, evaluation_mode
from .plan import Module, Plan, Scores
from .replay import Progress, Replay
from .surgery import masked

Groups = dict[str, dict[int, list[list[int]]]]  # tower -> layer -> group -> neurons
# The cut a removal makes: (modules, values, costs) -> [(positions that compete, how many of them go), ...]
Pools = list[tuple[list[int], int]]


@dataclass(frozen=True)
class Candidate:
    """A module that could go: its name, the intervention that takes it out, its parameters."""

    module: Module
    intervention: Intervention
    cost: int


def check_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    """Raises ValueError for an unknown kind of module."""
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"modules: {kind!r}, expected some of {', '.join(KINDS)}")
    if not kinds:
        raise ValueError(f"modules: none given, expected some of {', '.join(KINDS)}")
    return tuple(kinds)


def neuron_groups(
    anatomy: Anatomy, towers: Sequence[str], neurons_per_group: int, order: dict[str, list[Tensor]] | None = None
) -> Groups:
    """Consecutive groups of neurons in every MLP; the last of a layer may be smaller.

    order  tower -> layer -> [I] neurons in the order to group them by (`rewired_order`); None for their own order
    """
    if neurons_per_group < 1:
        raise ValueError(f"neurons_per_group: {neurons_per_group}, expected at least 1")
    groups: Groups = {}
    for tower in towers:
        groups[tower] = {}
        for layer, block in enumerate(anatomy.tower(tower).blocks):
            count = block.sites["neurons"].units
            neurons = torch.arange(count) if order is None else order[tower][layer]
            groups[tower][layer] = [part.tolist() for part in neurons.split(neurons_per_group)]
    return groups


@torch.no_grad()
def rewired_order(
    anatomy: Anatomy, towers: Sequence[str], data: Data, objective: Objective, batch_size: int
) -> dict[str, list[Tensor]]:
    """Neurons of every MLP from most to least important, so that groups hold neurons of like importance.

    The rewiring of DynaBERT (arXiv 2004.04037), by a proxy that needs no gradient: ||w_out|| * rms(activation).
    """
    order: dict[str, list[Tensor]] = {}
    for tower in towers:
        sites = [block.sites["neurons"] for block in anatomy.tower(tower).blocks]
        energy = [torch.zeros(site.units, dtype=torch.float64, device=site.out.weight.device) for site in sites]

        def add_to(total: Tensor) -> Callable:
            def hook(_, args):
                total.add_(args[0].double().square().flatten(0, -2).sum(0))

            return hook

        with Patches() as patches, evaluation_mode(anatomy.model):
            for site, total in zip(sites, energy, strict=True):
                patches.pre_hook(site.out, add_to(total))
            for inputs in objective.batches(anatomy, tower, data, batch_size):
                objective.outputs(anatomy, tower, inputs)
        norms = [site.out.weight.double().norm(dim=0) for site in sites]
        importance = [norm * total.sqrt() for norm, total in zip(norms, energy, strict=True)]
        order[tower] = [torch.sort(i, descending=True, stable=True).indices.cpu() for i in importance]
    return order


def candidates(
    anatomy: Anatomy, towers: Sequence[str], kinds: Sequence[str], groups: Groups, plan: Plan | None = None
) -> list[Candidate]:
    """Every module of the given towers and kinds that ``plan`` has not removed yet."""
    found = []
    for name in towers:
        for layer, block in enumerate(anatomy.tower(name).blocks):
            if plan and layer in plan.layers.get(name, []):
                continue
            for kind in kinds:
                if kind == "layer":
                    cost = block.params - sum(
                        len(plan.removed(name, k, layer)) * site.unit_params for k, site in block.sites.items() if plan
                    )
                    found.append(Candidate(Module(name, kind, layer), DropLayer(name, layer), cost))
                    continue
                site = block.sites.get(kind)
                if site is None:
                    continue
                gone = set(plan.removed(name, kind, layer)) if plan else set()
                units = groups[name][layer] if kind == "neurons" else [[head] for head in range(site.units)]
                for index, members in enumerate(units):
                    left = tuple(u for u in members if u not in gone)
                    if left:
                        drop: Intervention = (
                            DropNeurons(name, layer, left)
                            if kind == "neurons"
                            else DropHead(name, layer, left, cross=kind == "cross_head")
                        )
                        found.append(Candidate(Module(name, kind, layer, index), drop, len(left) * site.unit_params))
    return found


def score(
    model: nn.Module,
    data: Data,
    *,
    modules: Sequence[str] = ("head", "neurons"),
    towers: Sequence[str] | None = None,
    objective: str | Objective | None = None,
    neurons_per_group: int = 64,
    rewire: bool = False,
    groups: Groups | None = None,
    plan: Plan | None = None,
    exact: bool = True,
    pools: Callable[[list[Candidate], Tensor], Pools] | None = None,
    confidence: float = 2.0,
    batch_size: int = 32,
    stacked_rows: int | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Score modules by ablation: ``MoPE(t) = Z(f) - Z(f without t)`` (MoPE-CLIP, arXiv 2403.07839, eq. 1).

    modules            kinds to score: "head", "cross_head", "neurons" (groups), "layer"
    towers             names, None for all that the objective sees
    objective          a name of `objectives.OBJECTIVES` or an Objective; Z, higher is better. None: "contrastive" for a
                       model with two embeddings, "lm_loss" for one that predicts tokens
    neurons_per_group  neurons that are removed together
    rewire             sort neurons by importance before grouping them
    groups             the groups themselves, instead of the two fields above
    plan               what is already removed; scores are those of the model without it, which is not changed
    exact              False stops early on modules whose side of the cut is decided; ``pools`` says where the cut is
                       (a module counts as decided ``confidence`` paired standard errors away from it)
    stacked_rows       rows that run through the model's suffix at once; None measures what is fastest

    In fp32 every score equals the naive one (change the model, run all of it) up to rounding. The model is not changed.
    Raises ValueError for unknown kinds, towers and objectives, and for data that the objective cannot use.
    """
    kinds = check_kinds(modules)
    anatomy = describe(model)
    objective = objective_named(objective, anatomy)
    towers = tuple(towers) if towers is not None else objective.towers(anatomy)
    for tower in towers:
        if tower not in objective.towers(anatomy):
            raise ValueError(f"towers: {tower!r}, expected some of {', '.join(objective.towers(anatomy))}")
    if plan is not None:
        plan.check(anatomy)
    if not exact and pools is None:
        raise ValueError("pools: needed with exact=False, which stops early on what is clearly above or below a cut")
    if groups is None:
        groups = {}
        if "neurons" in kinds:
            order = rewired_order(anatomy, towers, data, objective, batch_size) if rewire else None
            groups = neuron_groups(anatomy, towers, neurons_per_group, order)
    found = candidates(anatomy, towers, kinds, groups, plan)
    if not found:
        raise ValueError(f"modules: no {', '.join(kinds)} left to score in {', '.join(towers)}")

    judge = _Judge(anatomy, objective, plan, batch_size, stacked_rows, progress)
    with masked(model, plan or Plan(anatomy.shape())), evaluation_mode(model):
        if exact or pools is None:
            drops, dense = judge.all_samples(found, data)
        else:
            drops, dense = judge.race(found, data, pools, confidence)
    count = (~drops.isnan()).sum(1)
    value = drops.double().nanmean(1)
    spread = (drops.double() - value[:, None]).square().nansum(1) / (count - 1).clamp(min=1)
    error = torch.where(count > 1, (spread / count).sqrt(), torch.full_like(value, math.inf))
    return Scores(
        modules=[c.module for c in found],
        value=value,
        error=error,
        count=count,
        cost=torch.tensor([float(c.cost) for c in found], dtype=torch.float64),
        objective=objective.name,
        dense=dense,
        neurons=groups,
        samples=drops,
        block_runs=judge.block_runs,
        data={"name": data.name, "split": data.split, "hash": data.hash, "samples": drops.shape[1]},
    )


@dataclass
class _Judge:
    """Turns interventions into per-sample drops of the objective."""

    anatomy: Anatomy
    objective: Objective
    plan: Plan | None
    batch_size: int
    stacked_rows: int | None
    progress: Progress | None
    block_runs: int = 0

    def _walk(self, tower: str, interventions: list[Intervention], data: Data):
        replay = Replay(
            self.anatomy,
            tower,
            self.objective.batches(self.anatomy, tower, data, self.batch_size),
            lambda _, inputs: self.objective.outputs(self.anatomy, tower, inputs),
            stacked_rows=self.stacked_rows,
            skip_layers=self.plan.layers.get(tower, ()) if self.plan else (),
            progress=self.progress,
        )
        yield from replay.walk(interventions)
        self.stacked_rows = self.stacked_rows or replay.stacked_rows
        self.block_runs += replay.block_runs

    @torch.no_grad()
    def all_samples(self, found: list[Candidate], data: Data) -> tuple[Tensor, float]:
        """([M, S] drops of every sample, the dense objective)."""
        drops: dict[int, Tensor] = {}
        dense_value = math.nan
        for tower, positions in _by_tower(found).items():
            left: dict[int, Tensor] = {}  # the objective without each module
            other = self.objective.other(self.anatomy, tower, data, self.batch_size)

            def value(outputs: Tensor, tower=tower, other=other) -> Tensor:
                return self.objective.values(self.anatomy, tower, outputs, other, data).float().cpu()

            for ids, outputs in self._walk(tower, [found[i].intervention for i in positions], data):
                if ids is not None:
                    left |= {positions[i]: value(rows) for i, rows in zip(ids, outputs, strict=True)}
                else:
                    dense = value(outputs)
                    _check_finite(dense, data)
                    dense_value = dense.double().mean().item()
                    drops |= {i: dense - left[i] for i in positions}
        return torch.stack([drops[i] for i in range(len(found))]), dense_value

    @torch.no_grad()
    def race(
        self, found: list[Candidate], data: Data, pools: Callable[[list[Candidate], Tensor], Pools], confidence: float
    ) -> tuple[Tensor, float]:
        """As `all_samples`, with more and more samples for fewer and fewer modules; NaN where a sample was not used.

        After each round a module whose score is further than ``confidence`` standard errors from the cut of its pool is
        decided. The cut lies between the last module that goes and the first that stays, among the undecided.
        """
        drops = torch.empty(len(found), 0)  # [M, S], once S is known
        undecided = set(range(len(found)))
        gone: set[int] = set()
        kept_outputs: dict[int, Tensor] = {}
        dense_outputs: dict[str, Tensor] = {}
        dense_value = math.nan
        start = 0
        for stop in _rounds(data.n_images):
            part = data.subset(torch.arange(start, stop))
            seen = data.subset(stop)
            for tower, positions in _by_tower(found).items():
                racing = [i for i in positions if i in undecided]
                if not racing:
                    continue
                other = self.objective.other(self.anatomy, tower, seen, self.batch_size)
                for ids, outputs in self._walk(tower, [found[i].intervention for i in racing], part):
                    if ids is None:
                        before = dense_outputs.get(tower)
                        dense_outputs[tower] = outputs if before is None else torch.cat([before, outputs])
                    else:
                        for i, rows in zip(ids, outputs, strict=True):
                            before = kept_outputs.get(racing[i])
                            kept_outputs[racing[i]] = rows if before is None else torch.cat([before, rows])
                dense = self.objective.values(self.anatomy, tower, dense_outputs[tower], other, seen).float().cpu()
                _check_finite(dense, seen)
                dense_value = dense.double().mean().item()
                for i in racing:
                    value = self.objective.values(self.anatomy, tower, kept_outputs[i], other, seen).float().cpu()
                    if not drops.numel():
                        samples = len(dense) if stop == data.n_images else None
                        drops = torch.full((len(found), samples or _sample_count(self, tower, data)), math.nan)
                    drops[i, : len(value)] = dense - value
            start = stop
            mean = drops.double().nanmean(1)
            count = (~drops.isnan()).sum(1)
            error = (drops.double() - mean[:, None]).square().nansum(1).div((count - 1).clamp(min=1)).div(count).sqrt()
            for members, budget in pools(found, mean):
                open_ = [i for i in members if i in undecided]
                left = budget - sum(i in gone for i in members)
                if left <= 0 or left >= len(open_):
                    undecided -= set(open_)
                    gone |= set(open_) if left > 0 else set()
                    continue
                cost = torch.tensor([float(found[i].cost) for i in open_], dtype=torch.float64)
                importance = mean[open_] / cost
                order = torch.sort(importance, stable=True).indices
                cut = (importance[order[left - 1]] + importance[order[left]]) / 2
                clear = (importance - cut).abs() > confidence * error[open_] / cost
                for i, is_clear, below in zip(open_, clear.tolist(), (importance < cut).tolist(), strict=True):
                    if is_clear:
                        undecided.discard(i)
                        kept_outputs.pop(i, None)
                        if below:
                            gone.add(i)
            if not undecided:
                break
        return drops, dense_value


def _sample_count(judge: _Judge, tower: str, data: Data) -> int:
    return len(data) if judge.objective.name == "lm_loss" else data.n_images


def _rounds(total: int) -> list[int]:
    """Sample counts after each round of a race: from a sixteenth (at least 16) of the data, doubling."""
    stop = max(16, math.ceil(total / 16))
    stops = []
    while stop < total:
        stops.append(stop)
        stop *= 2
    return [*stops, total]


def _by_tower(found: list[Candidate]) -> dict[str, list[int]]:
    towers: dict[str, list[int]] = {}
    for i, candidate in enumerate(found):
        towers.setdefault(candidate.module.tower, []).append(i)
    return towers


def _check_finite(values: Tensor, data: Data) -> None:
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        raise ValueError(f"objective: not finite for sample {int(bad[0])} of {data.name} ({values[bad[0]].item()})")
