"""Sensitivity of an objective to each weight matrix: ECoFLaP's coarse stage (arXiv 2310.02998, section 3.2).

Zeroth order takes two forward passes for each random direction and no gradient; first order takes a backward pass.
Neither writes a weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..anatomy import Anatomy
from ..anatomy.patch import evaluation_mode, gradients_only_of
from ..data import Data
from ..objectives import Objective
from ..ops import perturb
from ..progress import Progress
from ..replay import Intervention, PerturbWeight, Replay
from .matrices import Matrix

# Steps along a direction of unit variance. Large enough to survive the rounding of weights of size 0.02 in the dtype.
EPS = {torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 5e-3}


@dataclass(frozen=True)
class Sensitivity:
    """Sensitivity of the objective to each of M matrices.

    Parameters
    ----------
    slope : Tensor [M], float64
        Zeroth order: mean |L(W + eps z) - L(W - eps z)| / (2 eps), about 0.8 of the gradient's norm. First order: mean
        |dL/dW| over the entries.
    weighted : Tensor [M], float64
        First order: sum |W| |dL/dW|. Zeroth order: sum |W| times the slope.
    spread : Tensor [M], float64
        Relative standard error of the slope over directions; NaN where it is not known.
    block_runs : int
        Block runs of the replay; 0 for first order.
    """

    slope: Tensor
    weighted: Tensor
    spread: Tensor
    block_runs: int = 0


@torch.no_grad()
def zeroth_order(
    anatomy: Anatomy,
    objective: Objective,
    data: Data,
    chosen: Sequence[Matrix],
    *,
    draws: int = 4,
    eps: float | None = None,
    seed: int = 0,
    realised: bool = True,
    samples_per_loss: int | None = 1,
    batch_size: int = 32,
    stacked_rows: int | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Estimate the sensitivity to each matrix from loss differences along random directions, by replay.

    One matrix at a time is perturbed, along ``draws`` directions z ~ N(0, 1).

    Parameters
    ----------
    anatomy : Anatomy
        The model.
    objective : Objective
        The loss; need not be differentiable.
    data : Data
        Calibration data.
    chosen : sequence of Matrix
        The M matrices.
    draws : int
        Random directions for each matrix.
    eps : float, optional
        Step along z. None: that of the weight's dtype in `EPS`.
    seed : int
        Seed of the directions.
    realised : bool
        Divide by the distance along z between the two rounded weights, instead of 2 eps.
    samples_per_loss : int, optional
        Samples over which the loss difference is averaged before its absolute value is taken. None: all.
    batch_size : int
        Rows run at once.
    stacked_rows : int, optional
        Rows stacked on the batch axis in the model's suffix. None: the fastest height, measured.
    progress : Progress, optional
        Called with (done, total, text).

    Returns
    -------
    Sensitivity

    Raises
    ------
    ValueError
        A loss that is not finite, naming the sample.
    """
    slope = torch.zeros(len(chosen), draws, dtype=torch.float64)
    block_runs = 0
    for tower in dict.fromkeys(matrix.tower for matrix in chosen):
        pairs = [(i, d) for i, matrix in enumerate(chosen) if matrix.tower == tower for d in range(draws)]
        changes: list[Intervention] = [
            perturbation(chosen[i], draw, sign, draws=draws, eps=eps, seed=seed)
            for i, draw in pairs
            for sign in (1, -1)
        ]
        replay = Replay(
            anatomy,
            tower,
            objective.batches(anatomy, tower, data, batch_size),
            objective.runner(anatomy, tower),
            stacked_rows=stacked_rows,
            progress=progress,
        )
        other = objective.other(anatomy, tower, data, batch_size)
        read = partial(_values, anatomy, objective, tower, other, data)
        for positions, outputs in replay.walk(changes):
            if positions is None:
                read(outputs)  # of the unperturbed model, to name a sample that is not finite
                continue
            values = {position: read(rows) for position, rows in zip(positions, outputs, strict=True)}
            for position in positions[::2]:
                i, draw = pairs[position // 2]
                difference = _means(values[position] - values[position + 1], samples_per_loss).abs().mean()
                change = changes[position]
                assert isinstance(change, PerturbWeight)
                distance = _distance(chosen[i].weight, change) if realised else 2 * change.eps
                slope[i, draw] = difference.item() / distance
        block_runs += replay.block_runs
    size = torch.tensor([matrix.weight.abs().sum(dtype=torch.float64).item() for matrix in chosen], dtype=torch.float64)
    mean = slope.mean(1)
    spread = slope.std(1) / math.sqrt(draws) / mean if draws > 1 else torch.full_like(mean, math.nan)
    return Sensitivity(mean, size * mean, spread, block_runs)


def perturbation(
    matrix: Matrix, draw: int, sign: int, *, draws: int, eps: float | None = None, seed: int = 0
) -> PerturbWeight:
    """Return the intervention W + sign * eps * z for one matrix and one draw of z.

    Its random numbers do not depend on which other matrices are perturbed.

    Parameters
    ----------
    matrix : Matrix
        The matrix.
    draw : int
        Index of the direction, below ``draws``.
    sign : {1, -1}
        Which end of the difference.
    draws : int
        Directions for each matrix.
    eps : float, optional
        Step along z. None: that of the weight's dtype in `EPS`.
    seed : int
        Seed of the directions.

    Returns
    -------
    PerturbWeight
    """
    step = EPS[matrix.weight.dtype] if eps is None else eps
    return PerturbWeight(matrix.tower, matrix.layer, matrix.path, seed, matrix.number * draws + draw, step, sign)


def _distance(weight: Tensor, change: PerturbWeight) -> float:
    """Return <plus - minus, z> / <z, z>: the distance along z between the two rounded weights."""
    z = perturb(torch.zeros_like(weight, dtype=torch.float32), change.seed, change.tensor_id, 1.0)[0]
    plus, minus = perturb(weight, change.seed, change.tensor_id, change.eps)
    apart = plus.float() - minus.float()
    return ((apart * z).sum(dtype=torch.float64) / (z * z).sum(dtype=torch.float64)).item()


def _values(
    anatomy: Anatomy, objective: Objective, tower: str, other: Tensor | None, data: Data, outputs: Tensor
) -> Tensor:
    """Return the objective of each sample, [S] float64, on the CPU; raise ValueError where one is not finite."""
    values = objective.values(anatomy, tower, outputs, other, data).double().cpu()
    bad = (~values.isfinite()).nonzero().flatten()
    if len(bad):
        raise ValueError(f"objective: not finite for sample {int(bad[0])} of {data.name} ({values[bad[0]].item()})")
    return values


def _means(values: Tensor, together: int | None) -> Tensor:
    """Average every ``together`` consecutive values of [S]; None: all of them."""
    return torch.stack([part.mean() for part in values.split(len(values) if together is None else together)])


def first_order(
    anatomy: Anatomy,
    objective: Objective,
    data: Data,
    chosen: Sequence[Matrix],
    *,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Sensitivity:
    """Compute the sensitivity to each matrix from gradients: mean |dL/dW| and sum |W| |dL/dW|, averaged over batches.

    An objective that couples all rows is differentiated with respect to the rows' outputs first; the model's graph is
    then held for one batch at a time.

    Parameters
    ----------
    anatomy : Anatomy
        The model.
    objective : Objective
        The loss; a differentiable one.
    data : Data
        Calibration data.
    chosen : sequence of Matrix
        The M matrices.
    batch_size : int
        Rows run at once.
    progress : Progress, optional
        Called after each batch.

    Returns
    -------
    Sensitivity

    Raises
    ------
    ValueError
        An objective without gradients, or a loss that is not finite, naming the sample.
    """
    if not objective.differentiable:
        raise ValueError(f"objective: {objective.name!r} has no gradient; use estimator='zeroth-order'")
    slope = torch.zeros(len(chosen), dtype=torch.float64)
    weighted = torch.zeros_like(slope)
    model = anatomy.model
    with evaluation_mode(model):
        for tower in dict.fromkeys(matrix.tower for matrix in chosen):
            positions = [i for i, matrix in enumerate(chosen) if matrix.tower == tower]
            weights = [chosen[i].weight for i in positions]
            total = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
            batches = objective.batches(anatomy, tower, data, batch_size)
            with torch.no_grad():
                outputs = [objective.outputs(anatomy, tower, batch) for batch in batches]
                other = objective.other(anatomy, tower, data, batch_size)
                _values(anatomy, objective, tower, other, data, torch.cat(outputs))
            leaf = torch.cat(outputs).requires_grad_()
            with torch.enable_grad():
                values = objective.values(anatomy, tower, leaf, other, data)
                (of_outputs,) = torch.autograd.grad(values.sum() * len(batches) / len(values), leaf)
            for done, (batch, part) in enumerate(
                zip(batches, of_outputs.split([len(o) for o in outputs]), strict=True)
            ):
                with torch.enable_grad(), gradients_only_of(model, weights):
                    output = objective.outputs(anatomy, tower, batch)
                    slopes = torch.autograd.grad(output, weights, part, allow_unused=True)
                for sum_, gradient in zip(total, slopes, strict=True):
                    if gradient is not None:
                        sum_ += gradient.float().abs() / len(batches)
                if progress:
                    progress(done + 1, len(batches), f"gradients of {tower}")
            for i, weight, gradient in zip(positions, weights, total, strict=True):
                slope[i] = gradient.mean(dtype=torch.float64).item()
                weighted[i] = (weight.detach().float().abs() * gradient).sum(dtype=torch.float64).item()
    return Sensitivity(slope, weighted, torch.full_like(slope, math.nan))


def check_eps(eps: float | None) -> None:
    """Raise ValueError unless ``eps`` is None or a positive finite number."""
    if eps is not None and not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"eps: {eps}, expected a number above 0")
