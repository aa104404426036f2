"""How exact is exact enough: at most twice the error of plain torch in the same dtype, against float64."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_exact_as(actual: Tensor, naive: Tensor, exact: Tensor, floor: float) -> None:
    """max |actual - exact| <= 2 max |naive - exact| + floor; also same shape and dtype as naive.

    floor: what one different order of the same sums may cost when plain torch is lucky.
    """
    assert actual.shape == exact.shape
    assert actual.dtype == naive.dtype
    if actual.numel() == 0:
        return
    error = (actual.double() - exact).abs().max().item()
    yardstick = (naive.double() - exact).abs().max().item()
    assert error <= 2 * yardstick + floor, f"error {error:.3g}, plain torch {yardstick:.3g}, floor {floor:.3g}"


def sum_floor(terms: int, scale: float = 1.0) -> float:
    """A bound on the usual rounding of a sum of so many fp32 products of numbers of size ``scale``."""
    return torch.finfo(torch.float32).eps * scale * max(terms, 1)
