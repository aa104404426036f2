"""Ops for layer-wise pruning: Wanda statistics, selection of the least scores, zeroth-order perturbation.

For each op: the schema, one function that checks the arguments and allocates the output (also the fake kernel), the
implementation, and the public function. A *score* is fp32 ``|w| * scale``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native
from .checks import check_tensors, expect_int, expect_tensors, may_read, rows, shape

__all__ = [
    "column_norm_sq_",
    "nm_mask",
    "perturb",
    "prune_nm_",
    "prune_smallest_",
    "share_smallest",
    "smallest_mask",
]

_library = torch.library.Library("vlprune", "FRAGMENT")
_library.define("column_norm_sq_(Tensor(a!) acc, Tensor x, Tensor? token_weight=None) -> ()")
_library.define("prune_smallest_(Tensor(a!) weight, Tensor? column_scale, SymInt k, str scope) -> ()")
_library.define("smallest_mask(Tensor weight, Tensor? column_scale, SymInt k, str scope) -> Tensor")
_library.define("prune_nm_(Tensor(a!) weight, Tensor? column_scale, int n, int m) -> ()")
_library.define("nm_mask(Tensor weight, Tensor? column_scale, int n, int m) -> Tensor")
_library.define("perturb(Tensor weight, int seed, int tensor_id, float eps) -> (Tensor, Tensor)")

SCOPES = ("row", "matrix")
_WIDEST_GROUP = 4096  # m of n:m
_EPS = (1e-30, 1e30)  # well within the range of fp32
_DIGITS = (11, 10, 10)  # radix select: bits of a score's sort key per histogram, from the top, without the sign


# ---- column_norm_sq_ ------------------------------------------------------------------------------------------------


def _check_column_norm_sq(acc: Tensor, x: Tensor, token_weight: Tensor | None = None) -> None:
    check_tensors(x=x)
    if x.dim() != 2:
        raise ValueError(f"x has shape {shape(x)}; expected two dimensions [N, in]")
    _check_float32("acc", acc, x, x.shape[1], "in, the columns of x")
    if acc.stride(0) != 1 and acc.shape[0] > 1:
        raise ValueError(
            f"acc has a stride of {acc.stride(0)}; expected a contiguous tensor, which is written in place"
        )
    if token_weight is not None:
        _check_float32("token_weight", token_weight, x, x.shape[0], "N, the rows of x")


def _check_float32(name: str, vector: Tensor, beside: Tensor, size: int, what: str) -> None:
    expect_tensors(**{name: vector})
    if vector.dtype != torch.float32:
        raise TypeError(f"{name} has dtype {vector.dtype}; expected float32")
    if vector.dim() != 1 or vector.shape[0] != size:
        raise ValueError(f"{name} has shape {shape(vector)}; expected [{size}] ({what})")
    if vector.device != beside.device:
        raise ValueError(f"{name} is on {vector.device}; expected {beside.device}")


def _written(tensor: Tensor) -> None:
    """Increment a tensor's autograd version, so that a graph which saved it refuses to run backwards."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensor)


def _column_norm_sq(acc: Tensor, x: Tensor, token_weight: Tensor | None = None) -> None:
    _check_column_norm_sq(acc, x, token_weight)
    chunks = -(-x.shape[0] // _native.NORM_CHUNK)
    partial = acc.new_empty((chunks, x.shape[1]))
    _native.column_norm_sq(acc, rows(x), None if token_weight is None else token_weight.contiguous(), partial)


def column_norm_sq_(acc: Tensor, x: Tensor, token_weight: Tensor | None = None) -> Tensor:
    """Add the squared norms of the columns of ``x`` to ``acc``, in place: ``acc_j += sum_n w_n x_nj^2``.

    The statistic of Wanda (arXiv 2306.11695, eq. 1) and, weighted by token, of CoMP (arXiv 2604.02956, eq. 4).

    Parameters
    ----------
    acc : Tensor [in], fp32
        Running sums; contiguous. Returned.
    x : Tensor [N, in], fp32/fp16/bf16
        Input of a linear layer, one row a token.
    token_weight : Tensor [N], fp32, optional
        w; 0 leaves a row out, as padding should be, unless it holds an infinity or a NaN. All 1 by default.

    Raises
    ------
    TypeError
        A dtype that is not supported.
    ValueError
        Shapes or devices that do not fit.
    """
    expect_tensors(acc=acc, x=x)
    if token_weight is not None:
        expect_tensors(token_weight=token_weight)
    torch.ops.vlprune.column_norm_sq_(acc, x, token_weight)
    _written(acc)
    return acc


_library.impl("column_norm_sq_", _column_norm_sq, "CPU")
_library.impl("column_norm_sq_", _column_norm_sq, "CUDA")
torch.library.register_fake("vlprune::column_norm_sq_", _check_column_norm_sq, lib=_library)


# ---- prune_smallest_, smallest_mask ---------------------------------------------------------------------------------


def _check_weight(weight: Tensor, column_scale: Tensor | None) -> None:
    check_tensors(weight=weight)
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {shape(weight)}; expected two dimensions [out, in]")
    if weight.shape[0] >= 1 << 31 or weight.shape[1] >= 1 << 30:
        raise ValueError(f"weight has shape {shape(weight)}; expected fewer than 2**31 rows and 2**30 columns")
    if column_scale is not None:
        _check_float32("column_scale", column_scale, weight, weight.shape[1], "in, the columns of weight")


def _check_no_overlap(weight: Tensor) -> None:
    """Raise ValueError if rows overlap in memory, so that they cannot be written in place."""
    if weight.shape[0] > 1 and weight.stride(1) == 1 and weight.stride(0) < weight.shape[1]:
        raise ValueError(f"weight has rows {weight.stride(0)} apart and {weight.shape[1]} wide; expected no overlap")


def _check_smallest(weight: Tensor, column_scale: Tensor | None, k: int, scope: str) -> None:
    _check_weight(weight, column_scale)
    if scope not in SCOPES:
        raise ValueError(f"scope is {scope!r}; expected one of {', '.join(SCOPES)}")
    most = weight.shape[1] if scope == "row" else weight.numel()
    if not 0 <= k <= most:
        raise ValueError(f"k is {k}; expected 0 <= k <= {most} (the entries of a {scope})")


def _mask_of_smallest(weight: Tensor, column_scale: Tensor | None, k: int, scope: str) -> Tensor:
    _check_smallest(weight, column_scale, k, scope)
    return weight.new_empty(weight.shape, dtype=torch.bool)


def _select(weight: Tensor, column_scale: Tensor | None, mask: Tensor | None, k: int, scope: str) -> None:
    scale = None if column_scale is None else column_scale.contiguous()
    # A weight whose columns are not contiguous is pruned in a copy.
    compact = rows(weight)
    if scope == "row":
        _native.prune_smallest(compact, scale, mask, k)
    else:
        _native.prune_smallest(compact, scale, mask, 0, _smallest_of_rows([compact], [scale], k)[0])
    if mask is None and compact is not weight:
        weight.copy_(compact)


def _prune_smallest(weight: Tensor, column_scale: Tensor | None, k: int, scope: str) -> None:
    _check_smallest(weight, column_scale, k, scope)
    _check_no_overlap(weight)
    if k > 0:
        _select(weight, column_scale, None, k, scope)


def _smallest_mask(weight: Tensor, column_scale: Tensor | None, k: int, scope: str) -> Tensor:
    mask = _mask_of_smallest(weight, column_scale, k, scope)
    _select(weight, column_scale, mask, k, scope)
    return mask


def _smallest_of_rows(weights: Sequence[Tensor], scales: Sequence[Tensor | None], k: int) -> list[Tensor]:
    """Count the k least scores of all weights in each row, [out] int64 for each weight, without a host sync."""
    if k == sum(weight.numel() for weight in weights):
        return [weight.new_full(weight.shape[:1], weight.shape[1], dtype=torch.int64) for weight in weights]
    device = weights[0].device
    left = torch.full((1,), k, dtype=torch.int64, device=device)  # the k-th from 0 among those that share the prefix
    prefix = torch.zeros(1, dtype=torch.int64, device=device)
    for level, bits in enumerate(_DIGITS):
        counts = torch.zeros(1 + _native.HISTOGRAM_BINS, dtype=torch.int64, device=device)
        for weight, scale in zip(weights, scales, strict=True):
            own = counts.new_zeros(_native.HISTOGRAM_BINS, device=weight.device)
            _native.key_histogram(weight, scale, own, prefix.to(weight.device), level)
            counts[1:] += own.to(device)
        below = counts.cumsum(0)  # [bins + 1]: how many have a lesser digit
        digit = (below[1:] <= left).sum(0, keepdim=True)
        left = left - below[digit]
        prefix = (prefix << bits) + digit
    # Ties with the k-th score are taken in the order of the weights and of their rows.
    result = []
    for weight, scale in zip(weights, scales, strict=True):
        below = torch.zeros(weight.shape[0], dtype=torch.int64, device=weight.device)
        equal = torch.zeros_like(below)
        _native.count_keys(weight, scale, prefix.to(weight.device), below, equal)
        before = equal.cumsum(0) - equal
        taken = (left.to(weight.device) - before).clamp(min=0).minimum(equal)
        result.append(below + taken)
        left = (left - equal.sum().to(device)).clamp(min=0)
    return result


def _check_scores(weight: Tensor, column_scale: Tensor | None) -> None:
    """Raise ValueError for a NaN score, which has no order, or a bad scale; reads the data (synchronises on CUDA)."""
    if not weight.numel() or not may_read(weight):
        return
    if column_scale is not None:
        bad = ~(column_scale >= 0) | column_scale.isinf()
        if bool(bad.any()):
            column = int(bad.nonzero()[0])
            raise ValueError(
                f"column_scale[{column}] is {column_scale[column].item()}; expected a finite number of at least 0"
            )
    least, most = torch.stack(weight.aminmax()).tolist()
    if math.isfinite(least) and math.isfinite(most):
        return
    scores = weight.float() if column_scale is None else weight.float() * column_scale
    if bool(scores.isnan().any()):
        row, column = scores.isnan().nonzero()[0].tolist()
        times = "" if column_scale is None else f" with column_scale {column_scale[column].item()}"
        raise ValueError(
            f"weight[{row}, {column}] is {weight[row, column].item()}{times};"
            " expected a score |w| * scale that is not NaN"
        )


def prune_smallest_(weight: Tensor, column_scale: Tensor | None, k: int, *, scope: str = "row") -> Tensor:
    """Zero the ``k`` weights of least ``|w| * scale`` in each row, or in the whole matrix, in place.

    Exactly those that a stable sort of the fp32 scores puts first: ties go to the lower index (row by row).

    Parameters
    ----------
    weight : Tensor [out, in], fp32/fp16/bf16
        Written in place and returned; a pruned weight becomes +0.
    column_scale : Tensor [in], fp32, or None
        ``||X_j||_2`` for Wanda (arXiv 2306.11695, eq. 1); None for magnitude.
    k : int
        0 <= k <= in for ``scope="row"``, 0 <= k <= out * in for ``scope="matrix"``.
    scope : {"row", "matrix"}
        Comparison group: each output row, or the matrix.

    Raises
    ------
    TypeError
        A dtype that is not supported.
    ValueError
        Shapes or devices that do not fit, k out of range, a scale that is negative or not finite, a score that is NaN.
        The last two read the data (on CUDA: a synchronisation). While a CUDA graph is captured or torch.compile traces
        they are not checked: then a NaN is the largest score. The weight is unchanged.
    """
    expect_tensors(weight=weight)
    k = expect_int("k", k)
    _check_smallest(weight, column_scale, k, scope)
    _check_scores(weight, column_scale)
    torch.ops.vlprune.prune_smallest_(weight, column_scale, k, scope)
    _written(weight)
    return weight


def smallest_mask(weight: Tensor, column_scale: Tensor | None, k: int, *, scope: str = "row") -> Tensor:
    """Return the mask [out, in] bool of what :func:`prune_smallest_` would zero; same arguments, nothing written."""
    expect_tensors(weight=weight)
    k = expect_int("k", k)
    _check_smallest(weight, column_scale, k, scope)
    _check_scores(weight, column_scale)
    return torch.ops.vlprune.smallest_mask(weight, column_scale, k, scope)


_library.impl("prune_smallest_", _prune_smallest, "CPU")
_library.impl("prune_smallest_", _prune_smallest, "CUDA")
torch.library.register_fake("vlprune::prune_smallest_", _check_smallest, lib=_library)
_library.impl("smallest_mask", _smallest_mask, "CPU")
_library.impl("smallest_mask", _smallest_mask, "CUDA")
torch.library.register_fake("vlprune::smallest_mask", _mask_of_smallest, lib=_library)


def share_smallest(weights: Sequence[Tensor], column_scales: Sequence[Tensor | None], k: int) -> list[int]:
    """Count how many of the ``k`` least scores of several matrices lie in each, by the exact k-th value.

    ``prune_smallest_(weight, scale, share, scope="matrix")`` with each count then zeroes what one stable sort of all
    scores, matrix after matrix, puts first. Nothing is concatenated; memory beyond the weights is two numbers a row and
    a few histograms.

    Parameters
    ----------
    weights : sequence of n Tensor [out, in], fp32/fp16/bf16
        On any devices.
    column_scales : sequence of n Tensor [in], fp32, or None
        As in :func:`prune_smallest_`.
    k : int
        0 <= k <= entries of all weights.

    Returns
    -------
    list of n int

    Raises
    ------
    TypeError, ValueError
        As :func:`prune_smallest_`.
    """
    k = expect_int("k", k)
    if not weights or len(weights) != len(column_scales):
        raise ValueError(f"got {len(weights)} weights and {len(column_scales)} column_scales; expected one for each")
    for weight, scale in zip(weights, column_scales, strict=True):
        expect_tensors(weight=weight)
        _check_weight(weight, scale)
        _check_scores(weight, scale)
    total = sum(weight.numel() for weight in weights)
    if not 0 <= k <= total:
        raise ValueError(f"k is {k}; expected 0 <= k <= {total} (the entries of all weights)")
    scales = [None if scale is None else scale.contiguous() for scale in column_scales]
    return [int(counts.sum()) for counts in _smallest_of_rows([rows(weight) for weight in weights], scales, k)]


# ---- prune_nm_, nm_mask ---------------------------------------------------------------------------------------------


def _check_nm(weight: Tensor, column_scale: Tensor | None, n: int, m: int) -> None:
    _check_weight(weight, column_scale)
    if not 0 < n < m <= _WIDEST_GROUP:
        raise ValueError(f"n:m is {n}:{m}; expected 0 < n < m <= {_WIDEST_GROUP}")
    if weight.shape[1] % m != 0:
        raise ValueError(f"weight has shape {shape(weight)}; expected a number of columns that {m} divides")


def _mask_of_nm(weight: Tensor, column_scale: Tensor | None, n: int, m: int) -> Tensor:
    _check_nm(weight, column_scale, n, m)
    return weight.new_empty(weight.shape, dtype=torch.bool)


def _prune_nm(weight: Tensor, column_scale: Tensor | None, n: int, m: int) -> None:
    _check_nm(weight, column_scale, n, m)
    _check_no_overlap(weight)
    compact = rows(weight)
    _native.prune_nm(compact, None if column_scale is None else column_scale.contiguous(), None, n, m)
    if compact is not weight:
        weight.copy_(compact)


def _nm_mask(weight: Tensor, column_scale: Tensor | None, n: int, m: int) -> Tensor:
    mask = _mask_of_nm(weight, column_scale, n, m)
    _native.prune_nm(rows(weight), None if column_scale is None else column_scale.contiguous(), mask, n, m)
    return mask


def prune_nm_(weight: Tensor, column_scale: Tensor | None, n: int, m: int) -> Tensor:
    """Zero the ``n`` weights of least ``|w| * scale`` in every ``m`` consecutive ones of a row, in place.

    2:4 is the pattern of NVIDIA's sparse tensor cores. Ties go to the lower index.

    Parameters
    ----------
    weight : Tensor [out, in], fp32/fp16/bf16
        m divides in. Written in place and returned; a pruned weight becomes +0.
    column_scale : Tensor [in], fp32, or None
        ``||X_j||_2`` for Wanda; None for magnitude.
    n, m : int
        0 < n < m <= 4096.

    Raises
    ------
    TypeError, ValueError
        As :func:`prune_smallest_`.
    """
    expect_tensors(weight=weight)
    n, m = expect_int("n", n), expect_int("m", m)
    _check_nm(weight, column_scale, n, m)
    _check_scores(weight, column_scale)
    torch.ops.vlprune.prune_nm_(weight, column_scale, n, m)
    _written(weight)
    return weight


def nm_mask(weight: Tensor, column_scale: Tensor | None, n: int, m: int) -> Tensor:
    """Return the mask [out, in] bool of what :func:`prune_nm_` would zero; same arguments, nothing written."""
    expect_tensors(weight=weight)
    n, m = expect_int("n", n), expect_int("m", m)
    _check_nm(weight, column_scale, n, m)
    _check_scores(weight, column_scale)
    return torch.ops.vlprune.nm_mask(weight, column_scale, n, m)


_library.impl("prune_nm_", _prune_nm, "CPU")
_library.impl("prune_nm_", _prune_nm, "CUDA")
torch.library.register_fake("vlprune::prune_nm_", _check_nm, lib=_library)
_library.impl("nm_mask", _nm_mask, "CPU")
_library.impl("nm_mask", _nm_mask, "CUDA")
torch.library.register_fake("vlprune::nm_mask", _mask_of_nm, lib=_library)


# ---- perturb --------------------------------------------------------------------------------------------------------


def _perturbed(weight: Tensor, seed: int, tensor_id: int, eps: float) -> tuple[Tensor, Tensor]:
    check_tensors(weight=weight)
    for name, value in (("seed", seed), ("tensor_id", tensor_id)):
        if value < 0:
            raise ValueError(f"{name} is {value}; expected 0 <= {name} < 2**63")
    if not _EPS[0] <= eps <= _EPS[1]:
        raise ValueError(f"eps is {eps}; expected a number between {_EPS[0]} and {_EPS[1]}")
    plus = weight.new_empty(weight.shape)
    return plus, weight.new_empty(weight.shape)


def _perturb(weight: Tensor, seed: int, tensor_id: int, eps: float) -> tuple[Tensor, Tensor]:
    plus, minus = _perturbed(weight, seed, tensor_id, eps)
    _native.perturb(weight.contiguous(), plus, minus, seed, tensor_id, eps)
    return plus, minus


def perturb(weight: Tensor, seed: int, tensor_id: int, eps: float) -> tuple[Tensor, Tensor]:
    """Return ``(weight + eps z, weight - eps z)``, z ~ N(0, 1): both ends of a zeroth-order difference (ECoFLaP).

    z is a function of (seed, tensor_id, position in the flattened weight): Philox4x32-10 and Box-Muller, the same bits
    on every device, instruction set and thread count. Sampled, scaled and added in fp32, rounded once. The weight is
    not written, so no rounding error accumulates (arXiv 2310.02998's code perturbs in place).

    Parameters
    ----------
    weight : Tensor, any shape, fp32/fp16/bf16
        Not written.
    seed, tensor_id : int
        0 <= both < 2**63. Another tensor_id, an independent stream.
    eps : float
        Above 0.

    Raises
    ------
    TypeError
        A dtype that is not supported.
    ValueError
        seed, tensor_id or eps out of range.
    """
    expect_tensors(weight=weight)
    seed, tensor_id = expect_int("seed", seed), expect_int("tensor_id", tensor_id)
    for name, value in (("seed", seed), ("tensor_id", tensor_id)):
        if value >= 1 << 63:
            raise ValueError(f"{name} is {value}; expected 0 <= {name} < 2**63")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps is {eps!r}; expected a number")
    return torch.ops.vlprune.perturb(weight.detach(), seed, tensor_id, float(eps))


_library.impl("perturb", _perturb, "CPU")
_library.impl("perturb", _perturb, "CUDA")
torch.library.register_fake("vlprune::perturb", _perturbed, lib=_library)
