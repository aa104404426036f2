"""Early stopping of ablation scores: a race in which modules far from the cut need no more samples.

A race estimates the mean drop over all S samples from n of them, by three techniques of survey sampling (Särndal,
Swensson and Wretman, "Model Assisted Survey Sampling", 1992, sections 3.6 and 6.3). v is a sample's drop, t its
first-order estimate, where there is one:

1. Sampling with probability p proportional to size, the size of t: samples come in the order of u / size for uniform u
   (sequential Poisson sampling; Ohlsson 1998), so that a larger sample contains the smaller ones.
2. Inverse-probability weights: each sample counts 1 / p times.
3. t as a control variate: mean(v) ~ sum over n of (v - b t) / (p S) + b mean(t), where b is the slope of v on t.

Sampling is without replacement: the error is zero when n reaches S.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# The cut of a removal: [(positions that compete, how many of them are removed), ...]
Pools = list[tuple[list[int], int]]


def rounds(total: int) -> list[int]:
    """Return the sample count after each round: from ``total`` / 16 (at least 16), growing by a factor of sqrt(2)."""
    stop = max(16.0, total / 16)
    stops = []
    while math.ceil(stop) < total:
        stops.append(math.ceil(stop))
        stop *= math.sqrt(2)
    return [*stops, total]


def sizes(control: Tensor) -> Tensor:
    """Return the size measure of each sample: the root mean square over modules of its normalised first-order drops.

    Every module has the same weight. A twentieth of the mean is added, so that samples of small estimates are drawn
    too.

    Parameters
    ----------
    control : Tensor [M, S], float64
        First-order estimates of the drops.

    Returns
    -------
    Tensor [S], float64
        All ones if every estimate is zero.
    """
    scale = control.square().mean(1, keepdim=True).sqrt()
    size = torch.where(scale > 0, control / scale, torch.zeros_like(control)).square().mean(0).sqrt()
    mean = size.mean()
    return size + 0.05 * mean if mean > 0 else torch.ones_like(size)


def draw(size: Tensor, seed: int = 0) -> Tensor:
    """Draw an order of the samples whose first n are a sample without replacement, of probabilities `chances`.

    Parameters
    ----------
    size : Tensor [S]
        Size measure of each sample, above 0.
    seed : int
        Seed of the draw.

    Returns
    -------
    Tensor [S], int64
        Sample indices in the order of the draw.
    """
    uniform = torch.rand(len(size), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.argsort(uniform / size, stable=True)


def chances(size: Tensor, n: int) -> Tensor:
    """Return each sample's inclusion probability: proportional to size, at most 1, summing to n.

    Parameters
    ----------
    size : Tensor [S]
        Size measure of each sample, above 0.
    n : int
        Sample size.

    Returns
    -------
    Tensor [S], float64
        The probability of being among the first n of `draw`.
    """
    size = size.double()
    if n >= len(size):
        return torch.ones_like(size)
    certain = torch.zeros(len(size), dtype=torch.bool)
    while True:
        chance = (n - int(certain.sum())) * size / size[~certain].sum()
        over = (chance >= 1) & ~certain
        if not over.any():
            return chance.masked_fill(certain, 1.0)
        certain |= over


@dataclass
class Race:
    """State of a race among M modules over S samples.

    Parameters
    ----------
    drops : Tensor [M, S], float64
        Drop of each sample without each module; NaN where not evaluated yet.
    chance : Tensor [M, S], float64
        Inclusion probability of each evaluated sample.
    control : Tensor [M, S], float64, or None
        First-order estimates of the drops, the control variate.
    strata : sequence of M labels
        Modules of one label share the slope of the control variate.
    cost : Tensor [M], float64
        Modules compete by drop per cost.
    confidence : float
        Standard errors from the cut at which a module is decided.

    Attributes
    ----------
    undecided : set of int
        Modules that need more samples.
    mean : Tensor [M], float64
        Estimated mean drop over all S samples.
    noise : Tensor [M], float64
        Standard error of `mean` as an estimate of the mean over all S samples.
    """

    drops: Tensor
    chance: Tensor
    control: Tensor | None
    strata: Sequence[Hashable]
    cost: Tensor
    confidence: float

    def __post_init__(self) -> None:
        self.undecided = set(range(len(self.drops)))
        self.mean = torch.zeros(len(self.drops), dtype=torch.float64)
        self.noise = torch.full_like(self.mean, math.inf)  # of `mean`, as an estimate of the mean over all S samples

    def estimate(self) -> None:
        """Update `mean` and `noise` of the undecided modules from `drops`."""
        by_stratum: dict[Hashable, list[int]] = {}
        for i in self.undecided:
            by_stratum.setdefault(self.strata[i], []).append(i)
        for members in by_stratum.values():
            slope = self._slope(members)
            for i in members:
                drop, chance, seen = self._seen(i)
                n, total = len(drop), len(seen)
                known = 0.0
                if self.control is not None:
                    drop = drop - slope * self.control[i, seen]
                    known = slope * self.control[i].mean().item()
                self.mean[i] = (drop / chance).sum() / total + known
                if n > 1:
                    left = 1 - chance
                    centre = (left * drop / chance).sum() / left.sum() if left.any() else 0.0
                    spread = (left * (drop / chance - centre).square()).sum() * n / (n - 1)
                    self.noise[i] = spread.sqrt() / total

    def _seen(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return a module's evaluated drops, their inclusion probabilities, and which samples they are, [S] bool."""
        seen = ~self.drops[i].isnan()
        return self.drops[i, seen], self.chance[i, seen], seen

    def _slope(self, members: list[int]) -> float:
        """Return the median over modules of the regression slope of drops on controls."""
        if self.control is None:
            return 0.0
        slopes = []
        for i in members:
            drop, chance, seen = self._seen(i)
            control = self.control[i, seen]
            weight = 1 / chance / (1 / chance).sum()
            control = control - (weight * control).sum()
            energy = (weight * control.square()).sum()
            slopes.append(((weight * control * drop).sum() / energy).item() if energy > 0 else 0.0)
        return float(torch.tensor(slopes, dtype=torch.float64).median())

    def decide(self, pools: Pools) -> None:
        """Remove from `undecided` the modules more than ``confidence`` standard errors away from the cut of their pool.

        The cut lies halfway between the last module that is removed and the first that is kept.

        Parameters
        ----------
        pools : list of (list of int, int)
            Positions that compete, and how many of them are removed.
        """
        importance = self.mean / self.cost
        for members, budget in pools:
            if not 0 < budget < len(members):
                self.undecided -= set(members)
                continue
            ordered = importance[members].sort().values
            cut = (ordered[budget - 1] + ordered[budget]) / 2
            for i in members:
                if (importance[i] - cut).abs() > self.confidence * self.noise[i] / self.cost[i]:
                    self.undecided.discard(i)

    def error(self) -> Tensor:
        """Return the standard error of `mean` as an estimate beyond these S samples.

        Returns
        -------
        Tensor [M], float64
            `noise` and the sampling error of the S samples together; infinite with fewer than two evaluated samples.
        """
        errors = torch.full_like(self.mean, math.inf)
        for i in range(len(errors)):
            drop, chance, seen = self._seen(i)
            if len(drop) > 1:
                weight = 1 / chance / (1 / chance).sum()
                variance = (weight * (drop - (weight * drop).sum()).square()).sum() * len(drop) / (len(drop) - 1)
                errors[i] = (self.noise[i].square() + variance / len(seen)).sqrt()
        return errors
