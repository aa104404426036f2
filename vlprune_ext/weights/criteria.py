"""Pruning criteria of one matrix: Wanda, magnitude, RIA, SparseGPT (with weight update), and DSnoT's exchanges."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import column_norm_sq_, nm_mask, prune_nm_, prune_smallest_, smallest_mask
from ..ops.weights import SCOPES

CRITERIA = ("wanda", "magnitude", "ria", "sparsegpt")


@dataclass(frozen=True)
class Pattern:
    """Sparsity pattern: unstructured, or n:m, n zeros in every m consecutive weights of a row.

    Parameters
    ----------
    n : int
        Zeros of a group; 0 for unstructured.
    m : int
        Weights of a group.
    """

    n: int = 0
    m: int = 0

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Parse "unstructured" or "n:m", n zeros in every m.

        Parameters
        ----------
        text : str
            The pattern's name.

        Returns
        -------
        Pattern

        Raises
        ------
        ValueError
            Another text, or not 0 < n < m.
        """
        if text == "unstructured":
            return cls()
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if not match or not 0 < int(match[1]) < int(match[2]):
            raise ValueError(f"pattern: {text!r}, expected 'unstructured' or 'n:m' with 0 < n < m, such as '2:4'")
        return cls(int(match[1]), int(match[2]))

    def check(self, name: str, weight: Tensor) -> None:
        """Raise ValueError, naming the matrix, if m does not divide its width.

        Parameters
        ----------
        name : str
            The matrix' name.
        weight : Tensor [out, in]
            The matrix.
        """
        if self.n and weight.shape[1] % self.m != 0:
            raise ValueError(
                f"pattern: {self.n}:{self.m}, but {name} has {weight.shape[1]} columns, which {self.m} does not divide"
            )


def check_criterion(criterion: str, scope: str | None, dsnot: int = 0) -> None:
    """Raise ValueError for an unknown criterion or scope, or DSnoT exchanges that the criterion does not allow.

    Parameters
    ----------
    criterion : str
        One of `CRITERIA`.
    scope : str or None
        One of `SCOPES`, or None.
    dsnot : int
        Exchanges of each row, at least 0; 0 for "sparsegpt".
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion: {criterion!r}, expected one of {', '.join(CRITERIA)}")
    if scope is not None and scope not in SCOPES:
        raise ValueError(f"scope: {scope!r}, expected one of {', '.join(SCOPES)}")
    if dsnot < 0:
        raise ValueError(f"dsnot: {dsnot}, expected a number of exchanges, at least 0")
    if dsnot and criterion == "sparsegpt":
        raise ValueError("dsnot: SparseGPT updates the kept weights, so that none can be exchanged for a dense one")


class Inputs:
    """Accumulate the input statistics of a linear layer over calibration data.

    Squared column norms always; the Gram matrix X^T X for SparseGPT's Hessian; the column sums for DSnoT. Rows of token
    weight 0 (padding) are excluded.

    Parameters
    ----------
    width : int
        Columns of the input, ``in``.
    device : torch.device
        Where the statistics are held, in fp32.
    gram : bool
        Accumulate X^T X [in, in].
    sums : bool
        Accumulate the column sums [in].
    """

    def __init__(self, width: int, device: torch.device, *, gram: bool = False, sums: bool = False) -> None:
        self.norm_sq = torch.zeros(width, dtype=torch.float32, device=device)
        self.sums = torch.zeros_like(self.norm_sq) if sums else None
        self.gram = torch.zeros(width, width, dtype=torch.float32, device=device) if gram else None
        self.rows = 0.0

    def add(self, x: Tensor, token_weight: Tensor | None) -> None:
        """Add one batch of inputs to the statistics.

        Parameters
        ----------
        x : Tensor [..., in], fp32/bf16/fp16
            What enters the layer.
        token_weight : Tensor [...], or None
            Weight of each row, of the leading shape of ``x``; 0 for padding. None: all 1.
        """
        flat = x.detach().flatten(0, -2)
        weight = None if token_weight is None else token_weight.flatten().to(torch.float32)
        self.rows += len(flat) if weight is None else weight.sum().item()
        column_norm_sq_(self.norm_sq, flat, weight)
        if self.sums is not None:
            self.sums += flat.sum(0, dtype=torch.float32) if weight is None else weight @ flat.float()
        if self.gram is not None:
            exact = flat.float()
            self.gram.addmm_(exact.T, exact if weight is None else exact * weight[:, None])

    @property
    def scale(self) -> Tensor:
        """Root mean square of each column, [in] fp32: Wanda's ||X_j|| up to a factor that all columns share."""
        return (self.norm_sq / max(self.rows, 1.0)).sqrt()

    @property
    def mean(self) -> Tensor:
        """Mean of each column, [in] fp32; ValueError if the sums were not kept."""
        if self.sums is None:
            raise ValueError("inputs: the sums of columns were not kept")
        return self.sums / max(self.rows, 1.0)

    @property
    def variance(self) -> Tensor:
        """Variance of each column, [in] fp32."""
        return (self.norm_sq / max(self.rows, 1.0) - self.mean.square()).clamp(min=0)


@torch.no_grad()
def prune_matrix(
    weight: Tensor,
    inputs: Inputs | None,
    sparsity: float,
    *,
    criterion: str,
    pattern: Pattern,
    scope: str,
    damping: float = 0.01,
    dsnot: int = 0,
    ria_power: float = 0.5,
) -> None:
    """Prune one matrix to a sparsity by a criterion, in place.

    Parameters
    ----------
    weight : Tensor [out, in], fp32/bf16/fp16
        The matrix; its pruned entries become zero. SparseGPT updates the others.
    inputs : Inputs or None
        Statistics of what enters the matrix; not needed for "magnitude" without DSnoT.
    sparsity : float
        Share of the entries that become zero: of each row (``scope="row"``) or of the matrix, to the nearest whole
        number; of each block of 128 columns for "sparsegpt". A pattern n:m takes n of every m, whatever this says.
    criterion : {"wanda", "magnitude", "ria", "sparsegpt"}
        Which entries are pruned.
    pattern : Pattern
        Unstructured or n:m.
    scope : {"row", "matrix"}
        Entries that compete.
    damping : float
        SparseGPT's, as a share of the Hessian's mean diagonal.
    dsnot : int
        DSnoT exchanges of each row that follow (`exchange`).
    ria_power : float
        Exponent of the input norm in RIA.

    Raises
    ------
    ValueError
        ``inputs`` is None where it is needed.
    """
    if criterion == "magnitude" and not dsnot:
        _zero(weight, None, sparsity, pattern, scope)
        return
    if inputs is None:
        raise ValueError(
            f"inputs: None, but criterion {criterion!r} with dsnot={dsnot} needs the statistics of the matrix' inputs"
        )
    dense = weight.clone() if dsnot else weight
    if criterion == "sparsegpt":
        _sparsegpt(weight, inputs, sparsity, pattern, damping)
    elif criterion == "ria":
        scores = relative_importance(weight, inputs, ria_power)
        if pattern.n:
            weight.masked_fill_(nm_mask(scores, None, pattern.n, pattern.m), 0)
        else:
            weight.masked_fill_(smallest_mask(scores, None, _count(weight, sparsity, scope), scope=scope), 0)
    else:
        _zero(weight, inputs.scale if criterion == "wanda" else None, sparsity, pattern, scope)
    if dsnot:
        exchange(weight, dense, inputs, dsnot, pattern)


def _zero(weight: Tensor, scale: Tensor | None, sparsity: float, pattern: Pattern, scope: str) -> None:
    """Zero the weights of smallest score |w| * scale, in place."""
    if pattern.n:
        prune_nm_(weight, scale, pattern.n, pattern.m)
    else:
        prune_smallest_(weight, scale, _count(weight, sparsity, scope), scope=scope)


def _count(weight: Tensor, sparsity: float, scope: str) -> int:
    """Return how many entries of a row, or of the matrix, a sparsity is."""
    return round(sparsity * (weight.shape[1] if scope == "row" else weight.numel()))


def exchange(weight: Tensor, dense: Tensor, inputs: Inputs, cycles: int, pattern: Pattern | None = None) -> None:
    """Apply DSnoT's prune-and-grow, in place: rows exchange kept weights for pruned ones where their mean output gains.

    The expected error of a row is what its pruned weights would add on average, the sum of W_ij E[X_j]. In every cycle
    a row grows the pruned weight whose share of that error is largest for its variance, and prunes, of the kept weights
    whose loss lowers the error too, the one of least |W| ||X_j|| (arXiv 2310.08915, section 3). Unlike there, a row
    stops when an exchange would not bring its error nearer to zero, so that it never grows; n:m patterns are preserved.

    Parameters
    ----------
    weight : Tensor [out, in]
        The pruned matrix.
    dense : Tensor [out, in]
        The matrix before pruning.
    inputs : Inputs
        Statistics of what enters the matrix, with column sums.
    cycles : int
        Exchanges of a row, at most.
    pattern : Pattern, optional
        Of n:m, a row exchanges weights within one group of m only.
    """
    group = pattern.m if pattern and pattern.n else weight.shape[1]
    scale, variance = inputs.scale, inputs.variance.clamp(min=torch.finfo(torch.float32).tiny)
    rows = torch.arange(len(weight), device=weight.device)  # those that still change
    gone = weight == 0
    share = dense.float() * inputs.mean
    cost = dense.float().abs() * scale
    error = (share * gone).sum(1)
    columns = torch.arange(weight.shape[1], device=weight.device)
    for _ in range(cycles):
        gains = share[rows] * error[rows].sign()[:, None]  # > 0: pruning the weight is part of the error
        grown = torch.where(gone[rows] & (gains > 0), gains / variance, -1.0).max(1)
        beside = columns // group == (grown.indices // group)[:, None]
        given = torch.where(~gone[rows] & (gains < 0) & beside, cost[rows], math.inf).min(1)
        change = share[rows].gather(1, torch.stack([given.indices, grown.indices], 1)).diff(dim=1).squeeze(1)
        left = error[rows] - change
        better = (grown.values > 0) & given.values.isfinite() & (left.abs() < error[rows].abs())
        rows, grow, give = rows[better], grown.indices[better], given.indices[better]
        if not len(rows):
            return
        error[rows] = left[better]
        gone[rows, grow], gone[rows, give] = False, True
        weight[rows, grow] = dense[rows, grow]
        weight[rows, give] = 0


def relative_importance(weight: Tensor, inputs: Inputs, power: float = 0.5) -> Tensor:
    """Return RIA's relative importance: |W_ij| (1 / sum_i |W_ij| + 1 / sum_j |W_ij|) ||X_j||^power.

    RIA (ICLR 2024), eq. 5.

    Parameters
    ----------
    weight : Tensor [out, in], fp32/bf16/fp16
        The matrix.
    inputs : Inputs
        Statistics of what enters it.
    power : float
        Exponent of the input norm.

    Returns
    -------
    Tensor [out, in], fp32
    """
    magnitude = weight.float().abs()
    tiny = torch.finfo(torch.float32).tiny
    share = magnitude / magnitude.sum(0).clamp(min=tiny) + magnitude / magnitude.sum(1, keepdim=True).clamp(min=tiny)
    return share * inputs.scale.pow(power)


def _sparsegpt(
    weight: Tensor, inputs: Inputs, sparsity: float, pattern: Pattern, damping: float, block: int = 128
) -> None:
    """Prune by SparseGPT (arXiv 2301.00774, algorithm 1), in place: later columns make up for pruned weights.

    The Hessian is H = X^T X / rows + damping * mean(diag). Masks are chosen for ``block`` columns at a time by
    w^2 / [H^-1]_jj^2, over all rows together; of an n:m pattern, for every m columns of each row.
    """
    assert inputs.gram is not None
    hessian = inputs.gram / max(inputs.rows, 1.0)
    w = weight.float().clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    w[:, dead] = 0
    inverse = _inverse_factor(hessian, damping)  # [in, in] upper triangular, H^-1 = U^T U
    width = w.shape[1]
    if pattern.n:
        block = max(pattern.m, block // pattern.m * pattern.m)
    for start in range(0, width, block):
        end = min(start + block, width)
        part, factor = w[:, start:end].clone(), inverse[start:end, start:end]
        error = torch.zeros_like(part)
        score = part.square() / factor.diagonal().square()
        gone = torch.zeros_like(part, dtype=torch.bool)
        if not pattern.n:
            gone = smallest_mask(score, None, round(sparsity * part.numel()), scope="matrix")
        for j in range(end - start):
            if pattern.n and j % pattern.m == 0:
                group = slice(j, j + pattern.m)
                now = part[:, group].square() / factor.diagonal()[group].square()
                gone[:, group] = smallest_mask(now, None, pattern.n)
            kept = part[:, j].masked_fill(gone[:, j], 0)
            error[:, j] = (part[:, j] - kept) / factor[j, j]
            part[:, j + 1 :] -= error[:, j : j + 1] * factor[j, j + 1 :]
            part[:, j] = kept
        w[:, start:end] = part
        w[:, end:] -= error @ inverse[start:end, end:]
    weight.copy_(w)


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the damped Hessian's inverse, with tenfold damping while it is indefinite."""
    mean = hessian.diagonal().mean()
    for power in range(6):
        damped = hessian.clone()
        damped.diagonal().add_(damping * 10**power * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
    raise ValueError(f"sparsegpt: X^T X stays indefinite with damping {damping * 10**power}")
