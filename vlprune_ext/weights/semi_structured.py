"""2:4 sparse weights as torch's semi-structured tensors, for the sparse tensor cores of a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

from ..anatomy import describe
from .matrices import Matrix, matrices

DTYPES = (torch.float16, torch.bfloat16)
CAPABILITY = (8, 0)  # the first GPUs with sparse tensor cores


@dataclass(frozen=True)
class Conversion:
    """One converted matrix, and the speed of its product before and after.

    Parameters
    ----------
    name : str
        The parameter's name.
    shape : tuple of int
        (out, in).
    rows : int
        Rows of the input that was multiplied.
    dense_ms, sparse_ms : float
        Median milliseconds of the dense and of the 2:4 product; ``sparse_ms`` is None where torch has no sparse product
        of this shape and the matrix stays dense.
    """

    name: str
    shape: tuple[int, int]
    rows: int
    dense_ms: float
    sparse_ms: float | None

    @property
    def ratio(self) -> float | None:
        """Speed-up over dense; below 1, slower; None where the matrix stays dense."""
        return None if self.sparse_ms is None else self.dense_ms / self.sparse_ms


def is_two_four(weight: Tensor) -> bool:
    """Return whether at most two of every four consecutive weights of each row are nonzero.

    Parameters
    ----------
    weight : Tensor [out, in]
        The matrix.

    Returns
    -------
    bool
    """
    return weight.shape[1] % 4 == 0 and bool(((weight != 0).reshape(-1, 4).sum(1) <= 2).all())


@torch.no_grad()
def to_semi_structured(model: nn.Module, *, rows: int = 4096, say: Callable[[str], object] = print) -> list[Conversion]:
    """Convert every 2:4 matrix of a model's blocks to a semi-structured tensor, in place, for inference.

    Save the model before: safetensors holds dense weights. Whether the products are faster depends on the GPU, the
    matrix and the rows; every matrix is timed both ways, and all are converted, also where that is slower.

    Parameters
    ----------
    model : nn.Module
        A transformers model with matrices pruned to 2:4.
    rows : int
        Rows of the product that is timed: batch times tokens.
    say : callable
        Called with a line of text for each matrix, and a summary.

    Returns
    -------
    list of Conversion
        One for each 2:4 matrix.

    Raises
    ------
    ValueError
        Weights that are not on a GPU of compute capability 8.0 or newer, or not fp16 or bf16, or no 2:4 matrix; the
        model is then unchanged.
    """
    if rows < 1:
        raise ValueError(f"rows: {rows}, expected at least 1")
    found = [matrix for matrix in matrices(describe(model)) if not is_converted(matrix.weight)]
    for matrix in found:
        _check(matrix)
    found = [matrix for matrix in found if is_two_four(matrix.weight)]
    if not found:
        raise ValueError("model: no dense matrix is 2:4; expected one pruned with pattern='2:4'")
    done = []
    for matrix in found:
        x = torch.randn(rows, matrix.weight.shape[1], device=matrix.weight.device, dtype=matrix.weight.dtype)
        dense_ms = _milliseconds(partial(F.linear, x, matrix.weight, matrix.module.bias))
        sparse_ms = None
        try:
            sparse = nn.Parameter(to_sparse_semi_structured(matrix.weight.detach().contiguous()), requires_grad=False)
        except RuntimeError:  # a shape that the sparse kernels do not take
            pass
        else:
            matrix.module.weight = sparse
            sparse_ms = _milliseconds(partial(F.linear, x, sparse, matrix.module.bias))
        shape = (matrix.module.out_features, matrix.module.in_features)
        done.append(Conversion(matrix.name, shape, rows, dense_ms, sparse_ms))
        say(_line(done[-1]))
    say(_summary(done))
    return done


def is_converted(weight: Tensor) -> bool:
    """Return whether a weight is a semi-structured tensor already.

    Parameters
    ----------
    weight : Tensor
        A linear layer's weight.

    Returns
    -------
    bool
    """
    return isinstance(weight, SparseSemiStructuredTensor)


def _check(matrix: Matrix) -> None:
    """Raise ValueError unless a matrix is fp16 or bf16 on a GPU with sparse tensor cores."""
    weight = matrix.weight
    if not weight.is_cuda:
        raise ValueError(f"{matrix.name} is on {weight.device}; expected a GPU of compute capability 8.0 or newer")
    if (capability := torch.cuda.get_device_capability(weight.device)) < CAPABILITY:
        raise ValueError(
            f"{matrix.name} is on a GPU of compute capability {'.'.join(map(str, capability))}; expected 8.0 or newer"
        )
    if weight.dtype not in DTYPES:
        raise ValueError(f"{matrix.name} is {weight.dtype}; expected torch.float16 or torch.bfloat16")


def _milliseconds(run: Callable[[], object], repeats: int = 20) -> float:
    """Return the median milliseconds of a call on the current GPU, after three to warm up."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def _line(of: Conversion) -> str:
    """Return the line that reports one conversion."""
    what = f"{of.name} [{of.shape[0]}, {of.shape[1]}]: dense {of.dense_ms:.3f} ms"
    if of.ratio is None:
        return f"{what}; torch has no sparse product for this shape, stays dense"
    return f"{what}, 2:4 {of.sparse_ms:.3f} ms, {of.ratio:.2f}x"


def _summary(done: list[Conversion]) -> str:
    """Return the line that sums up all conversions."""
    converted = [of for of in done if of.sparse_ms is not None]
    dense, sparse = sum(of.dense_ms for of in converted), sum(of.sparse_ms or 0.0 for of in converted)
    slower = sum(of.ratio is not None and of.ratio < 1 for of in converted)
    text = f"{len(converted)} of {len(done)} 2:4 matrices converted"
    if converted:
        text += f"; all products with {done[0].rows} rows: dense {dense:.2f} ms, 2:4 {sparse:.2f} ms, "
        text += f"{dense / sparse:.2f}x; {slower} slower than dense"
    return text
