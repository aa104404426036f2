"""`score`: the importance of each unit by ablation, the drop of an objective without it, computed by replay."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy, describe
from ..anatomy.linears import check_linears
from ..anatomy.patch import evaluation_mode
from ..data import Data
from ..objectives import Objective, Part, objective_named
from ..plan import Plan, Scores
from ..progress import Progress
from ..replay import Intervention, Replay
from .candidates import COSTS, Candidate, Groups, candidates, check_kinds, neuron_groups, rewired_order, tokens_of
from .gates import gate_slopes, slope_of
from .masking import masked
from .racing import Pools, Race, chances, draw, rounds, sizes


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
    cost: str = "params",
    pools: Callable[[list[Candidate], Tensor], Pools] | None = None,
    confidence: float = 1.5,
    batch_size: int = 32,
    stacked_rows: int | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Score modules by ablation: ``MoPE(t) = Z(f) - Z(f without t)``.

    The module-wise pruning error of MoPE-CLIP (arXiv 2403.07839, eq. 1). In fp32 every score equals the naive one
    (change the model, run all of it) up to rounding. The model is not changed.

    Parameters
    ----------
    model : nn.Module
        A transformers model of one of the supported families.
    data : Data
        Calibration data.
    modules : sequence of str
        Kinds to score: "head", "cross_head", "neurons" (groups), "layer".
    towers : sequence of str, optional
        Towers to score. None: all that the objective sees.
    objective : str or Objective, optional
        Z, higher is better: a name of `objectives.OBJECTIVES` or an Objective. None: "contrastive" for a dual encoder,
        "lm_loss" for a model that predicts tokens.
    neurons_per_group : int
        Neurons that are ablated together.
    rewire : bool
        Sort neurons by importance before grouping them (`rewired_order`).
    groups : Groups, optional
        The neuron groups themselves (tower -> layer -> group -> neurons), in place of the two parameters above.
    plan : Plan, optional
        Units already removed: masked while scoring, so that scores are those of the pruned model.
    exact : bool
        True: score every module on all samples. False: early stopping; a module is dropped from the race once its side
        of the cut is decided (`racing`).
    cost : {"params", "flops"}
        Unit of `Scores.cost`.
    pools : callable, optional
        ``(candidates, drops [M] float64) -> Pools``: the cut. Required with ``exact=False``.
    confidence : float
        Standard errors between a score and the cut at which the module counts as decided.
    batch_size : int
        Calibration rows run at once.
    stacked_rows : int, optional
        Rows stacked on the batch axis in the model's suffix. None: the fastest height, measured.
    progress : Progress, optional
        Called with (done, total, text).

    Returns
    -------
    Scores
        Mean drop, standard error, sample count and cost of each module.

    Raises
    ------
    ValueError
        Unknown kinds, towers, costs or objectives, a plan for another model, ``exact=False`` without ``pools``, nothing
        left to score, or data that the objective cannot use or on which it is not finite.
    """
    kinds = check_kinds(modules)
    anatomy = describe(model)
    objective = objective_named(objective, anatomy)
    towers = tuple(towers) if towers is not None else objective.towers(anatomy)
    for tower in towers:
        if tower not in objective.towers(anatomy):
            raise ValueError(f"towers: {tower!r}, expected some of {', '.join(objective.towers(anatomy))}")
    check_linears(anatomy, towers)
    if plan is not None:
        plan.check(anatomy)
    if cost not in COSTS:
        raise ValueError(f"cost: {cost!r}, expected one of {', '.join(COSTS)}")
    if not exact and pools is None:
        raise ValueError("pools: needed with exact=False, which stops early on what is clearly above or below a cut")
    if groups is None:
        groups = {}
        if "neurons" in kinds:
            order = rewired_order(anatomy, towers, data, objective, batch_size) if rewire else None
            groups = neuron_groups(anatomy, towers, neurons_per_group, order)
    tokens = tokens_of(anatomy, towers, data, objective) if cost == "flops" else None
    found = candidates(anatomy, towers, kinds, groups, plan, tokens)
    if not found:
        raise ValueError(f"modules: no {', '.join(kinds)} left to score in {', '.join(towers)}")

    judge = _Judge(anatomy, objective, plan, batch_size, stacked_rows, progress)
    with masked(model, plan or Plan(anatomy.shape())), evaluation_mode(model):
        if exact or pools is None:
            drops, dense = judge.all_samples(found, data)
            value, error = drops.double().mean(1), _standard_error(drops.double())
        else:
            race, dense = judge.race(found, data, pools, confidence)
            drops, value, error = race.drops.float(), race.mean, race.error()
    return Scores(
        modules=[c.module for c in found],
        value=value,
        error=error,
        count=(~drops.isnan()).sum(1),
        cost=torch.tensor([float(c.cost) for c in found], dtype=torch.float64),
        objective=objective.name,
        dense=dense,
        neurons=groups,
        samples=drops,
        block_runs=judge.block_runs,
        data={**data.origin, "samples": drops.shape[1]},
    )


@dataclass
class _Judge:
    """Evaluate the objective under interventions, sample by sample."""

    anatomy: Anatomy
    objective: Objective
    plan: Plan | None
    batch_size: int
    stacked_rows: int | None
    progress: Progress | None
    block_runs: int = 0

    def _gone(self, tower: str) -> Sequence[int]:
        """Return the layers of a tower that the plan removes."""
        return self.plan.layers.get(tower, ()) if self.plan else ()

    def _other(self, tower: str, data: Data) -> Tensor | None:
        """Return what `Objective.values` needs of the towers that do not change."""
        return self.objective.other(self.anatomy, tower, data, self.batch_size)

    def _values(
        self, tower: str, outputs: Tensor, other: Tensor | None, data: Data, part: Part | None = None
    ) -> Tensor:
        """Return the objective of each sample, [S] float32, on the CPU."""
        return self.objective.values(self.anatomy, tower, outputs, other, data, part).float().cpu()

    def _walk(self, tower: str, interventions: list[Intervention], data: Data):
        """Yield (positions, outputs) of a tower's replay under the interventions, then (None, dense outputs)."""
        replay = Replay(
            self.anatomy,
            tower,
            self.objective.batches(self.anatomy, tower, data, self.batch_size),
            self.objective.runner(self.anatomy, tower),
            stacked_rows=self.stacked_rows,
            skip_layers=self._gone(tower),
            progress=self.progress,
        )
        yield from replay.walk(interventions)
        self.stacked_rows = self.stacked_rows or replay.stacked_rows
        self.block_runs += replay.block_runs

    @torch.no_grad()
    def all_samples(self, found: list[Candidate], data: Data) -> tuple[Tensor, float]:
        """Return the drop of every sample without each module, [M, S] float32, and the dense objective."""
        drops: dict[int, Tensor] = {}
        dense_value = math.nan
        for tower, positions in _by_tower(found).items():
            left: dict[int, Tensor] = {}  # the objective under each ablation
            other = self._other(tower, data)
            for ids, outputs in self._walk(tower, [found[i].intervention for i in positions], data):
                if ids is not None:
                    values = [self._values(tower, rows, other, data) for rows in outputs]
                    left |= {positions[i]: value for i, value in zip(ids, values, strict=True)}
                else:
                    dense = self._values(tower, outputs, other, data)
                    _check_finite(dense, data)
                    dense_value = dense.double().mean().item()
                    drops |= {i: dense - left[i] for i in positions}
        return torch.stack([drops[i] for i in range(len(found))]), dense_value

    @torch.no_grad()
    def race(
        self, found: list[Candidate], data: Data, pools: Callable[[list[Candidate], Tensor], Pools], confidence: float
    ) -> tuple[Race, float]:
        """Score fewer and fewer modules on more and more samples; return the finished race and the dense objective.

        Where the objective is differentiable, first-order estimates of all drops give the sampling probabilities and
        serve as control variate of the means (`racing`).
        """
        objective, towers = self.objective, _by_tower(found)
        others = {tower: self._other(tower, data) for tower in towers}
        sample, image = objective.samples(data, torch.arange(data.n_images))
        control, dense_value = self._first_order(found, data, others, len(sample))
        unknown = torch.full((len(found), len(sample)), math.nan, dtype=torch.float64)
        race = Race(
            drops=unknown,
            chance=unknown.clone(),
            control=control,
            strata=[(c.module.tower, c.module.kind) for c in found],
            cost=torch.tensor([float(c.cost) for c in found], dtype=torch.float64),
            confidence=confidence,
        )
        size = {tower: torch.ones(data.n_images, dtype=torch.float64) for tower in towers}
        if control is not None:
            for tower, positions in towers.items():
                size[tower] = torch.zeros_like(size[tower]).index_add(0, image, sizes(control[positions])[sample])
        order = {tower: draw(size[tower], seed) for seed, tower in enumerate(towers)}
        kept: dict[int, Tensor] = {}  # outputs so far under each intervention
        dense: dict[str, Tensor] = {}  # and of the dense model
        start = 0
        for stop in rounds(data.n_images):
            for tower, positions in towers.items():
                racing = [i for i in positions if i in race.undecided]
                # Rows that serve all samples, such as class prompts, cannot be sampled: their modules are scored once.
                sampled = objective.sample_of_row(tower, data) is not None
                if not racing or (start and not sampled):
                    continue
                new = data.subset(order[tower][start:stop]) if sampled else data
                for ids, outputs in self._walk(tower, [found[i].intervention for i in racing], new):
                    if ids is None:
                        dense[tower] = _extended(dense.get(tower), outputs)
                    else:
                        both = zip((racing[i] for i in ids), outputs, strict=True)
                        kept |= {i: _extended(kept.get(i), rows) for i, rows in both}
                drawn = order[tower][:stop] if sampled else torch.arange(data.n_images)
                chance = (
                    chances(size[tower], stop)[drawn] if sampled else torch.ones(data.n_images, dtype=torch.float64)
                )
                part = Part(drawn, 1 / chance) if sampled else None
                judged, at = objective.samples(data, drawn)
                value = self._values(tower, dense[tower], others[tower], data, part)
                _check_finite(value, data, judged)
                if control is None:
                    dense_value = value.mean().item()
                for i in racing:
                    left = self._values(tower, kept[i], others[tower], data, part)
                    race.drops[i, judged] = (value - left).double()
                    race.chance[i, judged] = chance[at].double()
            start = stop
            race.estimate()
            race.decide(pools(found, race.mean))
            kept = {i: rows for i, rows in kept.items() if i in race.undecided}
            if not race.undecided:
                break
        return race, dense_value

    def _first_order(
        self, found: list[Candidate], data: Data, others: dict[str, Tensor | None], samples: int
    ) -> tuple[Tensor | None, float]:
        """Return first-order estimates of the drops [M, S] and the dense objective; (None, NaN) without gradients."""
        if not self.objective.differentiable:
            return None, math.nan
        estimate, dense_value = torch.zeros(len(found), samples, dtype=torch.float32), math.nan
        for tower, positions in _by_tower(found).items():
            owner = self.objective.sample_of_row(tower, data)
            if owner is None:
                return None, math.nan
            gone = self._gone(tower)
            slopes, dense = gate_slopes(self.anatomy, self.objective, tower, data, others[tower], self.batch_size, gone)
            _check_finite(dense, data)
            dense_value = dense.double().mean().item()
            for i in positions:
                estimate[i].index_add_(0, owner, slope_of(slopes, found[i].intervention).float())
            # Two forward passes, and a backward pass without gradients of weights.
            self.block_runs += 3 * len(owner) * (len(self.anatomy.tower(tower)) - len(gone))
        return estimate.double(), dense_value


def _standard_error(drops: Tensor) -> Tensor:
    """Return the standard error of each module's mean drop, [M], from drops [M, S]; infinite for a single sample."""
    samples = drops.shape[1]
    return drops.std(1) / math.sqrt(samples) if samples > 1 else torch.full((len(drops),), math.inf, dtype=drops.dtype)


def _extended(before: Tensor | None, rows: Tensor) -> Tensor:
    """Append rows to those of earlier rounds."""
    return rows if before is None else torch.cat([before, rows])


def _by_tower(found: list[Candidate]) -> dict[str, list[int]]:
    """Group the positions of candidates by tower."""
    towers: dict[str, list[int]] = {}
    for i, candidate in enumerate(found):
        towers.setdefault(candidate.module.tower, []).append(i)
    return towers


def _check_finite(values: Tensor, data: Data, samples: Tensor | None = None) -> None:
    """Raise ValueError naming the first sample whose value is not finite, of all samples or those at ``samples``."""
    bad = (~values.isfinite()).nonzero().flatten()
    if len(bad):
        sample = int(bad[0] if samples is None else samples[bad[0]])
        raise ValueError(f"objective: not finite for sample {sample} of {data.name} ({values[bad[0]].item()})")
