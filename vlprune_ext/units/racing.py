"""Early stopping: which modules still need more samples to know on which side of a cut they are.

A race estimates the mean drop over all S samples from n of them, in three steps known from survey sampling (Särndal,
Swensson and Wretman, "Model Assisted Survey Sampling", 1992, sections 3.6 and 6.3). t is a first-order estimate of
every sample's drop v, where there is one:

1. Samples that matter are drawn first: with probability p in proportion to the size of t. They come in the order of
   u / size for uniform u (sequential Poisson sampling; Ohlsson 1998), so that more samples contain fewer.
2. Each stands for 1 / p of its kind.
3. What t already says need not be sampled: mean(v) ~ sum over n of (v - b t) / (p S) + b mean(t), where b is the slope
   of v on t.

Drawn without replacement, the error is zero when n reaches S.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# The cut a removal makes: [(positions that compete, how many of them go), ...]
Pools = list[tuple[list[int], int]]


def rounds(total: int) -> list[int]:
    """Sample counts after each round: from a sixteenth (at least 16) of ``total``, growing by a factor of sqrt(2)."""
    stop = max(16.0, total / 16)
    stops = []
    while math.ceil(stop) < total:
        stops.append(math.ceil(stop))
        stop *= math.sqrt(2)
    return [*stops, total]


def sizes(control: Tensor) -> Tensor:
    """[M, S] first-order drops -> [S]: how much a sample matters, their root mean square over modules of equal weight.

    A twentieth of the mean is added: samples that seem not to matter are to be drawn too.
    """
    scale = control.square().mean(1, keepdim=True).sqrt()
    size = torch.where(scale > 0, control / scale, torch.zeros_like(control)).square().mean(0).sqrt()
    mean = size.mean()
    return size + 0.05 * mean if mean > 0 else torch.ones_like(size)


def draw(size: Tensor, seed: int = 0) -> Tensor:
    """[S] -> [S] int64: an order whose first n are a sample without replacement, with `chances` (size, n)."""
    uniform = torch.rand(len(size), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.argsort(uniform / size, stable=True)


def chances(size: Tensor, n: int) -> Tensor:
    """[S] float64: the probability of being among the first n, in proportion to size, at most 1; they add up to n."""
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
    """The state of a race among M modules over S samples.

    drops    [M, S] float64           drop of each sample without each module; NaN where not judged
    chance   [M, S] float64           the probability with which a judged sample was drawn
    control  [M, S] float64 or None   first-order estimates of the drops
    strata   M labels                 modules of one label share a slope
    cost     [M] float64              modules compete by drop per cost
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
        """Bring `mean` and `noise` of the undecided up to date with `drops`."""
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
        seen = ~self.drops[i].isnan()
        return self.drops[i, seen], self.chance[i, seen], seen

    def _slope(self, members: list[int]) -> float:
        """The median over modules of the slope of drops on controls."""
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
        """Take out of `undecided` what is further than ``confidence`` standard errors from the cut of its pool.

        The cut lies halfway between the last module that goes and the first that stays.
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
        """[M] standard error of `mean` as an estimate for samples beyond these S: its noise, and that of S samples."""
        errors = torch.full_like(self.mean, math.inf)
        for i in range(len(errors)):
            drop, chance, seen = self._seen(i)
            if len(drop) > 1:
                weight = 1 / chance / (1 / chance).sum()
                variance = (weight * (drop - (weight * drop).sum()).square()).sum() * len(drop) / (len(drop) - 1)
                errors[i] = (self.noise[i].square() + variance / len(seen)).sqrt()
        return errors
