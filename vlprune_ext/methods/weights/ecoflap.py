"""ECoFLaP: layer-wise sparsities from global importance scores, then local pruning (ICLR 2024, arXiv 2310.02998)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from ...anatomy import MATRIX, Anatomy, describe
from ...data import Data
from ...objectives import OBJECTIVES, Objective, objective_named
from ...ops import share_smallest
from ...plan import Module, Plan, Scores
from ...progress import Progress
from ...weights.allocation import allocate, keep_count, round_shares
from ...weights.criteria import Pattern
from ...weights.layerwise import Selection, check_finite, check_weights, used_matrices, walk_inputs
from ...weights.matrices import Matrix
from ...weights.sensitivity import check_eps, first_order, zeroth_order

ESTIMATORS = ("zeroth-order", "first-order", "outliers", "magnitude", "uniform")
GRANULARITIES = ("layer", "block", "model")
IMPORTANCES = ("norm", "weighted", "squared")


@dataclass(kw_only=True)
class ECoFLaP:
    """Prune weights coarse to fine: a sparsity for each matrix from its global importance, then a local criterion.

    The coarse stage measures how much the objective depends on each matrix and allocates sparsities by water-filling;
    the fine stage (`apply`) prunes block after block by Wanda or another criterion.

    Source: ECoFLaP (ICLR 2024, arXiv 2310.02998). As released: ``granularity="block"``, and for first order
    ``importance="weighted"``.

    Parameters
    ----------
    sparsity : float
        Share of all prunable weights that become zero, in [0, 1).
    estimator : str
        Where sparsities come from. "zeroth-order": loss differences along random directions, no gradients;
        "first-order": one backward pass; "outliers": OWL (arXiv 2310.05175); "magnitude": how many of the smallest
        weights of the whole model lie in a matrix; "uniform": the same for every matrix.
    importance : {"norm", "weighted", "squared"}
        Importance of a matrix with slope s. "norm": s; "weighted": sum |W| s, with s of each weight under first order,
        and there the released choice; "squared": sum W^2 s^2.
    granularity : {"layer", "block", "model"}, optional
        What shares one sparsity: "layer" (a matrix), "block" (the released choice), "model" (a tower). None: "block"
        for "outliers", "layer" for the others.
    aggregate : {"sum", "avg"}
        Importance of a group: the sum over its matrices, or that divided by its number of weights.
    max_sparsity : float, optional
        Upper bound of any group's sparsity. None: ``sparsity + 0.1``, the released choice.
    per_tower : bool
        True: every tower has the sparsity ``sparsity``. False: one budget over all towers.
    draws : int
        Random directions for each matrix (zeroth order).
    eps : float, optional
        Step along a direction (zeroth order). None: by dtype (`sensitivity.EPS`).
    seed : int
        Seed of the directions (zeroth order).
    realised : bool
        Divide by the distance along the direction between the rounded weights, not by 2 eps (zeroth order).
    samples_per_loss : int, optional
        Samples over which a loss difference is averaged before its absolute value is taken (zeroth order). None: all.
    outlier_factor, outlier_range : float
        OWL's M and lambda.
    criterion, pattern, scope, damping, dsnot
        The fine stage, as in `weights.layerwise.Selection`. A pattern n:m fixes every sparsity.
    towers : sequence of str, optional
        Towers to prune. None: all that the objective sees.
    objective : str or Objective, optional
        The loss. None: what suits the model.
    batch_size : int
        Calibration rows run at once.

    Attributes
    ----------
    scores : Scores or None
        Importance of each matrix, as the last `plan` measured or was given it.
    """

    sparsity: float = 0.5
    estimator: str = "zeroth-order"
    importance: str = "norm"
    granularity: str | None = None
    aggregate: str = "sum"
    max_sparsity: float | None = None
    per_tower: bool = False
    draws: int = 1
    eps: float | None = None
    seed: int = 0
    realised: bool = True
    samples_per_loss: int | None = 1
    outlier_factor: float = 5.0
    outlier_range: float = 0.08
    criterion: str = "wanda"
    pattern: str = "unstructured"
    scope: str | None = None
    damping: float = 0.01
    dsnot: int = 0
    towers: Sequence[str] | None = None
    objective: str | Objective | None = None
    batch_size: int = 32
    scores: Scores | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity: {self.sparsity}, expected a share in [0, 1)")
        if self.max_sparsity is not None and not self.sparsity <= self.max_sparsity <= 1:
            raise ValueError(f"max_sparsity: {self.max_sparsity}, expected a share in [{self.sparsity}, 1]")
        for name, value, known in (
            ("estimator", self.estimator, ESTIMATORS),
            ("importance", self.importance, IMPORTANCES),
            ("granularity", self.granularity, (None, *GRANULARITIES)),
            ("aggregate", self.aggregate, ("sum", "avg")),
        ):
            if value not in known:
                raise ValueError(f"{name}: {value!r}, expected one of {', '.join(map(str, known))}")
        for name in ("draws", "samples_per_loss"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value}, expected at least 1")
        for name in ("outlier_factor", "outlier_range"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: {value}, expected a number of at least 0")
        check_eps(self.eps)
        self._selection("")
        objective_named(self.objective)

    @property
    def name(self) -> str:
        """Name on the command line and in plans."""
        return type(self).__name__.lower()

    def describe(self) -> dict:
        """Return the method's name and fields, as plain data."""
        fields = {k: v for k, v in asdict(self).items() if k != "scores"}
        if isinstance(self.objective, Objective):
            fields["objective"] = self.objective.name
        if fields["towers"] is not None:
            fields["towers"] = list(fields["towers"])
        return {"name": self.name, **fields}

    def _selection(self, objective: str) -> Selection:
        """Return the settings of the fine stage."""
        # One that has no name of its own, such as recall at other ranks, leaves the data to the model's.
        named = objective if objective in OBJECTIVES else None
        return Selection(self.criterion, self.pattern, self.scope, self.damping, self.dsnot, self.batch_size, named)

    def plan(
        self, model: nn.Module, data: Data, *, scores: Scores | None = None, progress: Progress | None = None
    ) -> Plan:
        """Plan a sparsity for every matrix; no weight is written.

        Parameters
        ----------
        model : nn.Module
            A transformers model of one of the supported families.
        data : Data
            Calibration data.
        scores : Scores, optional
            What `score` returned, for instance for another sparsity. None: measure.
        progress : Progress, optional
            Called with (done, total, text).

        Returns
        -------
        Plan
            Parameter name -> sparsity, and the settings of the fine stage.

        Raises
        ------
        ValueError
            Towers that the objective does not see or that have no prunable weights, weights or losses that are not
            finite, widths that the pattern does not divide, or scores of other matrices.
        """
        anatomy, objective, chosen = self._task(model, data)
        self.scores = None
        pattern = Pattern.parse(self.pattern)
        if pattern.n:
            sparsity = [pattern.n / pattern.m] * len(chosen)
        elif self.estimator == "uniform":
            sparsity = [self.sparsity] * len(chosen)
        elif self.estimator == "magnitude":
            sparsity = self._of_the_smallest(chosen)
        else:
            self.scores = self._score(anatomy, objective, chosen, data, progress) if scores is None else scores
            if self.scores.parameters != [matrix.name for matrix in chosen]:
                raise ValueError(
                    f"scores: of {len(self.scores.parameters)} matrices, expected those of the {len(chosen)} that "
                    f"objective {objective.name!r} uses"
                )
            sparsity = self._shares(chosen, self.scores.value.tolist())
        return Plan(
            anatomy.shape(),
            sparsity={matrix.name: share for matrix, share in zip(chosen, sparsity, strict=True)},
            selection=asdict(self._selection(objective.name)),
            method={**self.describe(), "objective": objective.name},
        )

    def score(self, model: nn.Module, data: Data, *, progress: Progress | None = None) -> Scores:
        """Measure the importance of every matrix; it does not depend on the sparsity, and no weight is written.

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
        Scores
            One value for each matrix, in the unit of the estimator.

        Raises
        ------
        ValueError
            As `plan`, and an estimator that measures nothing.
        """
        if self.estimator in ("uniform", "magnitude"):
            raise ValueError(f"estimator: {self.estimator!r} has no scores")
        return self._score(*self._task(model, data), data, progress)

    def _task(self, model: nn.Module, data: Data) -> tuple[Anatomy, Objective, list[Matrix]]:
        """Return the model's anatomy, the objective and the matrices to prune, all checked."""
        anatomy = describe(model)
        objective = objective_named(self.objective, anatomy)
        for tower in self.towers or ():
            if tower not in objective.towers(anatomy):
                raise ValueError(f"towers: {tower!r}, expected some of {', '.join(objective.towers(anatomy))}")
        chosen = used_matrices(anatomy, objective, data, self.towers)
        check_weights(chosen, self.pattern)
        return anatomy, objective, chosen

    # -- coarse -------------------------------------------------------------------------------------------------------

    def _groups(self, chosen: Sequence[Matrix]) -> list[list[int]]:
        """Return the groups of positions in ``chosen`` that share one sparsity."""
        granularity = self.granularity or ("block" if self.estimator == "outliers" else "layer")
        groups: dict[tuple, list[int]] = {}
        for i, matrix in enumerate(chosen):
            key = {"layer": (matrix.name,), "block": (matrix.tower, matrix.layer), "model": (matrix.tower,)}
            groups.setdefault(key[granularity], []).append(i)
        return list(groups.values())

    def _score(
        self, anatomy: Anatomy, objective: Objective, chosen: Sequence[Matrix], data: Data, progress: Progress | None
    ) -> Scores:
        """Measure the importance of every matrix with the estimator."""
        unknown = torch.full((len(chosen),), math.nan, dtype=torch.float64)
        block_runs = 0
        if self.estimator == "outliers":
            value, spread = self._outliers(anatomy, objective, data, chosen, progress), unknown
        else:
            if self.estimator == "first-order":
                found = first_order(anatomy, objective, data, chosen, batch_size=self.batch_size, progress=progress)
            else:
                found = zeroth_order(
                    anatomy,
                    objective,
                    data,
                    chosen,
                    draws=self.draws,
                    eps=self.eps,
                    seed=self.seed,
                    realised=self.realised,
                    samples_per_loss=self.samples_per_loss,
                    batch_size=self.batch_size,
                    progress=progress,
                )
            value, spread, block_runs = found.slope, found.spread, found.block_runs
            if self.importance == "weighted":
                value = found.weighted
            elif self.importance == "squared":
                squares = [m.weight.detach().float().square().sum(dtype=torch.float64).item() for m in chosen]
                value, spread = torch.tensor(squares, dtype=torch.float64) * found.slope**2, 2 * found.spread
        first: dict[tuple[str, int], int] = {}
        modules = []
        for matrix in chosen:
            start = first.setdefault((matrix.tower, matrix.layer), matrix.number)
            modules.append(Module(matrix.tower, MATRIX, matrix.layer, matrix.number - start))
        return Scores(
            modules=modules,
            value=value,
            error=value.abs() * spread,
            count=torch.full((len(chosen),), data.n_images, dtype=torch.int64),
            cost=torch.tensor([float(matrix.weight.numel()) for matrix in chosen], dtype=torch.float64),
            objective=objective.name,
            parameters=[matrix.name for matrix in chosen],
            block_runs=block_runs,
            data=data.origin,
        )

    def _of_the_smallest(self, chosen: Sequence[Matrix]) -> list[float]:
        """Return each matrix' share of entries among the smallest |w| of the whole model, or of its tower."""
        sparsity = [0.0] * len(chosen)
        for budget in self._budgets(chosen, [[i] for i in range(len(chosen))]):
            weights = [chosen[i].weight.detach() for i in budget]
            total = sum(weight.numel() for weight in weights)
            counts = share_smallest(weights, [None] * len(weights), total - keep_count(total, self.sparsity))
            for i, weight, count in zip(budget, weights, counts, strict=True):
                sparsity[i] = count / weight.numel()
        return sparsity

    def _shares(self, chosen: Sequence[Matrix], measured: Sequence[float]) -> list[float]:
        """Return the sparsity of each matrix, from its importance."""
        groups = self._groups(chosen)
        sizes = [sum(chosen[i].weight.numel() for i in members) for members in groups]
        sparsity = [0.0] * len(chosen)
        for members, size, keep in zip(groups, sizes, self._keeps(chosen, groups, sizes, measured), strict=True):
            for i in members:
                sparsity[i] = 1 - keep / size
        return sparsity

    def _keeps(
        self, chosen: Sequence[Matrix], groups: list[list[int]], sizes: list[int], measured: Sequence[float]
    ) -> list[int]:
        """Return the kept weights of each group, from the importance of each matrix."""
        of_group = [sum(measured[i] for i in members) for members in groups]
        if self.aggregate == "avg" or self.estimator == "outliers":
            of_group = [value / size for value, size in zip(of_group, sizes, strict=True)]
        most = min(1.0, self.sparsity + 0.1) if self.max_sparsity is None else self.max_sparsity
        share_out = self._owl if self.estimator == "outliers" else allocate
        keeps = [0] * len(groups)
        for budget in self._budgets(chosen, groups):
            own = [sizes[g] for g in budget]
            # Rounded down, so that floors never ask for more than the budget holds.
            floors = [keep_count(size, most) for size in own]
            kept = share_out([of_group[g] for g in budget], own, keep_count(sum(own), self.sparsity), floors)
            for g, keep in zip(budget, kept, strict=True):
                keeps[g] = keep
        return keeps

    def _budgets(self, chosen: Sequence[Matrix], groups: list[list[int]]) -> list[list[int]]:
        """Return the groups that compete for one budget."""
        if not self.per_tower:
            return [list(range(len(groups)))]
        towers: dict[str, list[int]] = {}
        for g, members in enumerate(groups):
            towers.setdefault(chosen[members[0]].tower, []).append(g)
        return list(towers.values())

    def _outliers(
        self, anatomy: Anatomy, objective: Objective, data: Data, chosen: Sequence[Matrix], progress: Progress | None
    ) -> Tensor:
        """Count the dense Wanda scores of each matrix above M times their mean (OWL)."""
        check_finite(anatomy, objective, data, self.batch_size)
        counts: dict[str, int] = {}
        walk = walk_inputs(anatomy, objective, data, chosen, batch_size=self.batch_size, progress=progress)
        for of_block, inputs in walk:
            for matrix in of_block:
                scores = matrix.weight.detach().float().abs() * inputs(matrix).scale
                counts[matrix.name] = int((scores > self.outlier_factor * scores.mean()).sum())
        return torch.tensor([counts[matrix.name] for matrix in chosen], dtype=torch.float64)

    def _owl(self, ratio: Sequence[float], sizes: Sequence[int], keep: int, floors: Sequence[int]) -> list[int]:
        """Return the kept weights of each group: outlier ratios stretched to 2 lambda, shifted to sum to ``keep``.

        Where no group is at a bound, the share kept is (1 - sparsity) plus the stretched ratio minus its mean.
        """
        least, most = min(ratio), max(ratio)
        above = [2 * self.outlier_range * (r - least) / (most - least) if most > least else 0.0 for r in ratio]

        def shares(level: float) -> list[float]:
            triples = zip(above, sizes, floors, strict=True)
            return [min(max(size * (level + a), floor), size) for a, size, floor in triples]

        low, high = -max(above), 1.0  # all at their floors, all whole
        for _ in range(60):
            level = (low + high) / 2
            low, high = (level, high) if math.fsum(shares(level)) <= keep else (low, level)
        return round_shares(shares(low), sizes, keep)
