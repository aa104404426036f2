"""Structured pruning: score the modules that are left, remove the least important, repeat.

A method implements `importance`; this file turns it into a plan.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy, describe
from ...anatomy.linears import check_linears
from ...data import Data
from ...objectives import Objective, objective_named
from ...plan import Plan, Scores
from ...progress import Progress
from ...units.candidates import COSTS, Candidate, Groups, candidates, neuron_groups, rewired_order, tokens_of
from ...units.racing import Pools

WIDTH = ("head", "cross_head", "neurons")
SCOPES = ("layer", "kind", "tower", "model")
STAGES: dict[str, tuple[tuple[str, ...], ...]] = {
    "finetune": (WIDTH, ("layer",)),  # width first, then depth of the narrowed model (MoPE-CLIP, section 3.3)
    "pretrain": ((*WIDTH, "layer"),),  # width and depth at once (section 3.2)
}


@dataclass(kw_only=True)
class Structured(ABC):
    """Prune heads, neuron groups and layers by an importance score, in rounds.

    The base of all structured methods.

    Parameters
    ----------
    keep_heads, keep_neurons, keep_layers : float
        Shares of heads, neurons and layers kept in each tower, in (0, 1].
    towers : sequence of str, optional
        Towers to prune. None: all that the objective sees.
    stage : {"finetune", "pretrain"}
        "finetune": width (heads, neurons), then depth of the narrowed model (MoPE-CLIP, section 3.3). "pretrain": both
        in one ranking (section 3.2).
    scope : {"layer", "kind", "tower", "model"}
        Modules that compete. "layer": the heads of a layer, and its neuron groups, so that every layer keeps the same
        share; "kind": the heads of a tower, and its neuron groups; "tower": both together, under one budget; "model":
        those of all towers. Whole layers compete with each other only, within a tower, or for "model" across towers.
    cost : {"params", "flops"}
        Unit of the budget, and what importance is divided by in the ranking.
    steps : int
        Rounds of scoring and removing, with evenly growing shares; 1 is one-shot.
    neurons_per_group : int
        Neurons that are scored and removed together.
    rewire : bool
        Sort neurons by importance before grouping them (`rewired_order`).
    objective : str or Objective, optional
        What importance is measured by, where it is measured on data. None: "contrastive" for a dual encoder, "lm_loss"
        for a model that generates.
    batch_size : int
        Calibration rows run at once.

    Attributes
    ----------
    scores : Scores or None
        Those of the first round of the last `plan`.
    """

    keep_heads: float = 0.5
    keep_neurons: float = 0.5
    keep_layers: float = 1.0
    towers: Sequence[str] | None = None
    stage: str = "finetune"
    scope: str = "tower"
    cost: str = "flops"
    steps: int = 6
    neurons_per_group: int = 64
    rewire: bool = False
    objective: str | Objective | None = None
    batch_size: int = 32
    scores: Scores | None = field(default=None, init=False, repr=False, compare=False)  # of the first round

    def __post_init__(self) -> None:
        for name in ("keep_heads", "keep_neurons", "keep_layers"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise ValueError(f"{name}: {value}, expected a share in (0, 1]")
        if self.stage not in STAGES:
            raise ValueError(f"stage: {self.stage!r}, expected one of {', '.join(STAGES)}")
        if self.scope not in SCOPES:
            raise ValueError(f"scope: {self.scope!r}, expected one of {', '.join(SCOPES)}")
        if self.cost not in COSTS:
            raise ValueError(f"cost: {self.cost!r}, expected one of {', '.join(COSTS)}")
        if self.steps < 1:
            raise ValueError(f"steps: {self.steps}, expected at least 1")
        objective_named(self.objective)

    @property
    def name(self) -> str:
        """Name on the command line and in plans."""
        return type(self).__name__.lower()

    def describe(self) -> dict:
        """Return the method's name and fields, as plain data."""
        fields = {key: value for key, value in asdict(self).items() if key != "scores"}
        if isinstance(self.objective, Objective):
            fields["objective"] = self.objective.name
        if fields["towers"] is not None:
            fields["towers"] = list(fields["towers"])
        return {"name": self.name, **fields}

    @abstractmethod
    def importance(self, task: Task) -> Scores:
        """Score every candidate of ``task.kinds`` that ``task.plan`` has not removed.

        Parameters
        ----------
        task : Task
            The round.

        Returns
        -------
        Scores
            In the order of ``task.candidates()``; higher is more important.
        """

    def plan(self, model: nn.Module, data: Data, *, progress: Progress | None = None) -> Plan:
        """Plan which modules are removed; the model is not changed.

        Parameters
        ----------
        model : nn.Module
            A transformers model of one of the supported families.
        data : Data
            Calibration data.
        progress : Progress, optional
            Called with (done, total, text).

        Returns
        -------
        Plan
            Heads, neurons and layers to remove.

        Raises
        ------
        ValueError
            Towers that the objective does not see, or data that it cannot use.
        """
        anatomy = describe(model)
        objective = objective_named(self.objective, anatomy)
        towers = tuple(self.towers) if self.towers is not None else objective.towers(anatomy)
        for tower in towers:
            if tower not in objective.towers(anatomy):
                raise ValueError(f"towers: {tower!r}, expected some of {', '.join(objective.towers(anatomy))}")
        check_linears(anatomy, towers)
        order = rewired_order(anatomy, towers, data, objective, self.batch_size) if self.rewire else None
        groups = neuron_groups(anatomy, towers, self.neurons_per_group, order)
        tokens = tokens_of(anatomy, towers, data, objective) if self.cost == "flops" else None
        plan = Plan(anatomy.shape(), method={**self.describe(), "objective": objective.name})
        self.scores = None
        blind = () if objective.sees_cross_attention else ("cross_head",)
        stages = [
            tuple(k for k in kinds if k not in blind and self._keep(k) < 1 and _has_kind(anatomy, towers, k))
            for kinds in STAGES[self.stage]
        ]
        stages = [kinds for kinds in stages if kinds]
        for stage, kinds in enumerate(stages):
            everything = candidates(anatomy, towers, kinds, groups, tokens=tokens)
            for step in range(1, self.steps + 1):

                def pools(found: list[Candidate], value: Tensor, share=step / self.steps, all_=everything) -> Pools:
                    return self._pools(found, value, all_, share)

                found = candidates(anatomy, towers, kinds, groups, plan, tokens)
                if not any(budget for _, budget in pools(found, torch.zeros(len(found), dtype=torch.float64))):
                    continue
                report = _in_round(progress, stage * self.steps + step, len(stages) * self.steps)
                task = Task(anatomy, data, objective, towers, kinds, groups, tokens, plan, pools, report)
                scores = self.importance(task)
                self.scores = self.scores or scores
                self._remove(plan, found, scores.value, pools)
        return plan

    # -- the cut ------------------------------------------------------------------------------------------------------

    def _keep(self, kind: str) -> float:
        """Return the share that is kept of a kind of module."""
        return {"neurons": self.keep_neurons, "layer": self.keep_layers}.get(kind, self.keep_heads)

    def _pool_of(self, candidate: Candidate) -> tuple:
        """Return a key: candidates of the same key compete with each other."""
        module = candidate.module
        tower = None if self.scope == "model" else module.tower
        if module.kind == "layer":
            return (tower, "layer")
        if self.scope in ("tower", "model"):
            return (tower, "width")
        return (tower, module.kind, module.layer if self.scope == "layer" else None)

    def _pools(self, found: list[Candidate], value: Tensor, everything: list[Candidate], share: float) -> Pools:
        """Return who competes, and how many of each pool are removed once ``share`` of the removal is done.

        A pool of one kind loses a share of its modules, a pool of several kinds a share of its cost.
        """
        members: dict[tuple, list[int]] = {}
        for i, candidate in enumerate(found):
            members.setdefault(self._pool_of(candidate), []).append(i)
        pools = []
        for key, positions in members.items():
            total = [c for c in everything if self._pool_of(c) == key]
            if key[1] == "width":
                goal = sum((1 - self._keep(c.module.kind)) * c.cost for c in total) * share
                gone = sum(c.cost for c in total) - sum(found[i].cost for i in positions)
                costs = torch.tensor(
                    [float(found[i].cost) for i in order_of(found, value, positions)], dtype=torch.float32
                )
                budget = int((costs.cumsum(0) - costs / 2 <= goal - gone).sum())  # the nearest whole number of modules
            else:
                goal = sum(1 - self._keep(c.module.kind) for c in total) * share
                budget = math.floor(goal + 0.5) - (len(total) - len(positions))
            # At least one member of a pool is kept: a tower without layers, or a layer without heads, is no model.
            pools.append((positions, max(0, min(budget, len(positions) - 1))))
        return pools

    def _remove(self, plan: Plan, found: list[Candidate], value: Tensor, pools: Callable[..., Pools]) -> None:
        """Add the least important candidates of each pool to ``plan``."""
        for positions, budget in pools(found, value):
            for i in order_of(found, value, positions)[:budget]:
                module = found[i].module
                units = list(found[i].intervention.units)
                # Rewired groups begin with their most important neuron; a plan lists the least important first.
                plan.add(module.tower, module.kind, module.layer, units[::-1] if self.rewire else units)


def order_of(found: list[Candidate], value: Tensor, positions: list[int]) -> list[int]:
    """Rank candidates from least to most important per cost; ties keep their order.

    Parameters
    ----------
    found : list of Candidate
        All M candidates.
    value : Tensor [M]
        Their importance.
    positions : list of int
        Those to rank.

    Returns
    -------
    list of int
        ``positions``, ranked.
    """
    costs = torch.tensor([float(found[i].cost) for i in positions], dtype=torch.float64)
    order = torch.sort(value[positions].double() / costs, stable=True).indices
    return [positions[i] for i in order.tolist()]


@dataclass(frozen=True)
class Task:
    """One round of a structured method: what is to be scored, and on what data.

    Parameters
    ----------
    anatomy : Anatomy
        The model.
    data : Data
        Calibration data.
    objective : Objective
        What importance is measured by.
    towers, kinds : tuple of str
        Whose modules are scored, and which kinds of them.
    groups : Groups
        Tower -> layer -> group -> neurons.
    tokens : dict of str to int, or None
        Tokens of a row of each tower, where costs are FLOPs.
    plan : Plan
        Units already removed.
    pools : callable
        ``(candidates, importance [M]) -> Pools``: the cut of this round.
    progress : Progress or None
        Called with (done, total, text).
    """

    anatomy: Anatomy
    data: Data
    objective: Objective
    towers: tuple[str, ...]
    kinds: tuple[str, ...]
    groups: Groups
    tokens: dict[str, int] | None  # of a row of each tower, where costs are FLOPs
    plan: Plan  # units already removed
    pools: Callable[[list[Candidate], Tensor], Pools]
    progress: Progress | None

    def candidates(self) -> list[Candidate]:
        """List the modules that are left."""
        return candidates(self.anatomy, self.towers, self.kinds, self.groups, self.plan, self.tokens)

    def scores(self, value: Tensor, name: str) -> Scores:
        """Wrap importances without a measured error as `Scores`, for methods that look at no samples.

        Parameters
        ----------
        value : Tensor [M]
            Importance of each of `candidates`.
        name : str
            What it was measured by.

        Returns
        -------
        Scores
            Of error and count zero.
        """
        found = self.candidates()
        return Scores(
            modules=[c.module for c in found],
            value=value.double().cpu(),
            error=torch.zeros(len(found), dtype=torch.float64),
            count=torch.zeros(len(found), dtype=torch.int64),
            cost=torch.tensor([float(c.cost) for c in found], dtype=torch.float64),
            objective=name,
            neurons=self.groups,
            data=self.data.origin,
        )


def _has_kind(anatomy: Anatomy, towers: Sequence[str], kind: str) -> bool:
    """Return whether any block of these towers has a site of this kind."""
    return kind == "layer" or any(kind in block.sites for tower in towers for block in anatomy.tower(tower).blocks)


def _in_round(progress: Progress | None, number: int, rounds: int) -> Progress | None:
    """Return ``progress`` with the round in front of its text, if there is more than one round."""
    if progress is None or rounds == 1:
        return progress
    return lambda done, total, what: progress(done, total, f"round {number} of {rounds}, {what}")
