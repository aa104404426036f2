"""Ops for module ablation: a linear layer's output without each head or neuron group, and ranks for recall@k.

For each op: the schema, one function that checks the arguments and allocates the output (also the fake kernel), the
implementation, and the public function.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native
from .checks import INT32_MAX, check_tensors, expect_int, expect_tensors, may_read, rows, shape

__all__ = ["leave_one_out", "retrieval_rank"]

_library = torch.library.Library("vlprune", "FRAGMENT")
_library.define("leave_one_out(Tensor x, Tensor weight, Tensor base, SymInt group_size, int[]? groups=None) -> Tensor")
_library.define("retrieval_rank(Tensor query, Tensor gallery, Tensor positives) -> Tensor")


# ---- leave_one_out --------------------------------------------------------------------------------------------------


def _leave_one_out_out(
    x: Tensor,  # [N, G*g]
    weight: Tensor,  # [D, G*g]
    base: Tensor,  # [N, D]
    group_size: int,
    groups: Sequence[int] | None = None,  # V of them
) -> Tensor:  # [V, N, D], not filled
    check_tensors(x=x, weight=weight, base=base)
    for name, tensor, expected in (("x", x, "[N, G*g]"), ("weight", weight, "[D, G*g]"), ("base", base, "[N, D]")):
        if tensor.dim() != 2:
            raise ValueError(f"{name} has shape {shape(tensor)}; expected two dimensions {expected}")
    if weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight has shape {shape(weight)}; expected [D, {x.shape[1]}], as many columns as x")
    if base.shape[0] != x.shape[0] or base.shape[1] != weight.shape[0]:
        raise ValueError(
            f"base has shape {shape(base)}; expected [{x.shape[0]}, {weight.shape[0]}],"
            " the rows of x by the rows of weight"
        )
    if group_size < 1:
        raise ValueError(f"group_size is {group_size}; expected at least 1")
    if x.shape[1] < 1:
        raise ValueError(f"x has shape {shape(x)}; expected at least one column")
    if x.shape[1] % group_size != 0:
        raise ValueError(f"group_size is {group_size}; expected a divisor of x's {x.shape[1]} columns")
    count = x.shape[1] // group_size
    if groups is not None:
        for index, group in enumerate(groups):
            if not 0 <= group < count:
                raise ValueError(f"groups[{index}] is {group}; expected 0 <= group < {count} (columns / group_size)")
    variants = count if groups is None else len(groups)
    return x.new_empty((variants, base.shape[0], base.shape[1]))


def _leave_one_out(
    x: Tensor, weight: Tensor, base: Tensor, group_size: int, groups: Sequence[int] | None = None
) -> Tensor:
    out = _leave_one_out_out(x, weight, base, group_size, groups)
    chosen = list(range(out.shape[0])) if groups is None else list(groups)
    _native.leave_one_out(rows(x), rows(weight), rows(base), out, chosen, group_size)
    return out


def leave_one_out(
    x: Tensor, weight: Tensor, base: Tensor, group_size: int, groups: Sequence[int] | None = None
) -> Tensor:
    """Return a linear layer's output without each of some groups of input columns: ``base - x_g @ weight_g.T``.

    This ablates a module at the block's own output projection (MoPE-CLIP, arXiv 2403.07839): with ``x`` the heads'
    concatenated outputs and ``group_size`` the head dimension, variant g is the projection without head g; with ``x``
    the activated neurons, without neuron group g. All variants share the forward pass up to ``x``.

    Parameters
    ----------
    x : Tensor [N, G*g], fp32/fp16/bf16
        The layer's input. Any row stride; a last dimension that is not contiguous is copied.
    weight : Tensor [D, G*g], dtype of x
        The layer's weight, as in ``torch.nn.Linear``.
    base : Tensor [N, D], dtype of x
        The output with all groups, whatever was added to it (bias, residual).
    group_size : int
        g, a divisor of the columns of x.
    groups : sequence of V int, optional
        Groups to leave out, on the host, in any order and with repeats; all G by default. Empty gives [0, N, D].

    Returns
    -------
    Tensor [V, N, D], dtype of x
        Sums of products are accumulated in fp32 and the difference is rounded once.

    Raises
    ------
    TypeError
        A dtype that is not supported or not the same for all.
    ValueError
        Shapes that do not fit, tensors on different devices, group_size no divisor, a group out of range.
    """
    expect_tensors(x=x, weight=weight, base=base)
    if isinstance(groups, Tensor) or not (groups is None or isinstance(groups, Sequence)):
        raise TypeError(f"groups is a {type(groups).__name__}; expected None or a sequence of int, on the host")
    chosen = None if groups is None else [expect_int(f"groups[{i}]", group) for i, group in enumerate(groups)]
    return torch.ops.vlprune.leave_one_out(x, weight, base, expect_int("group_size", group_size), chosen)


_library.impl("leave_one_out", _leave_one_out, "CPU")
_library.impl("leave_one_out", _leave_one_out, "CUDA")
torch.library.register_fake("vlprune::leave_one_out", _leave_one_out_out, lib=_library)


# ---- retrieval_rank -------------------------------------------------------------------------------------------------


# On CUDA in fp32 the tensor cores' precision does not decide scores close to the best: one in 900 of random embeddings
# of 512 numbers. Those are listed and recomputed; if the list overflows, everything is computed twice.
_FEWEST_LISTED, _SCORES_PER_LISTED = 4096, 512


def _retrieval_rank_out(
    query: Tensor,  # [V, N, D] or [N, D]
    gallery: Tensor,  # [V or 1, M, D] or [M, D]
    positives: Tensor,  # [N] or [N, P] int64
) -> Tensor:  # [V, N] or [N] int32, not filled
    check_tensors(query=query, gallery=gallery)
    if query.dim() not in (2, 3):
        raise ValueError(f"query has shape {shape(query)}; expected [V, N, D] or [N, D]")
    if gallery.dim() not in (2, 3):
        raise ValueError(f"gallery has shape {shape(gallery)}; expected [V, M, D], [1, M, D] or [M, D]")
    n, d = query.shape[-2:]
    if d < 1:
        raise ValueError(f"query has shape {shape(query)}; expected embeddings of at least one number")
    if gallery.shape[-1] != d:
        raise ValueError(f"gallery has shape {shape(gallery)}; expected embeddings of size {d} as query's")
    if not 1 <= gallery.shape[-2] <= INT32_MAX:
        raise ValueError(f"gallery has shape {shape(gallery)}; expected between 1 and 2**31 - 1 items")
    variants = query.shape[0] if query.dim() == 3 else 1
    if gallery.dim() == 3 and gallery.shape[0] != 1 and gallery.shape[0] != variants:
        raise ValueError(
            f"gallery has shape {shape(gallery)}; expected a leading dimension of 1 or of {variants},"
            " the variants of query"
        )
    if positives.dtype != torch.int64:
        raise TypeError(f"positives has dtype {positives.dtype}; expected int64")
    if positives.device != query.device:
        raise ValueError(f"positives is on {positives.device}; expected {query.device} as query")
    if positives.dim() not in (1, 2) or positives.shape[0] != n:
        raise ValueError(f"positives has shape {shape(positives)}; expected [{n}] or [{n}, P], one row per query")
    if positives.dim() == 2 and positives.shape[1] < 1:
        raise ValueError(f"positives has shape {shape(positives)}; expected at least one column")
    return query.new_empty(query.shape[:-1], dtype=torch.int32)


def _retrieval_rank(query: Tensor, gallery: Tensor, positives: Tensor) -> Tensor:
    rank = _retrieval_rank_out(query, gallery, positives)
    query = query.contiguous() if query.dim() == 3 else query.contiguous()[None]
    gallery = gallery.contiguous() if gallery.dim() == 3 else gallery.contiguous()[None]
    v, n, d = query.shape
    by_split = _native.is_cuda(query.device) and query.dtype == torch.float32
    rows = v * n + gallery.shape[0] * gallery.shape[1] if by_split else 0
    depth = -(-d // _native.SPLIT_DEPTH) * _native.SPLIT_DEPTH
    room = min(v * n * gallery.shape[1] // _SCORES_PER_LISTED, rows * depth // 8)  # 8: a quarter of the bytes of split
    capacity = max(_FEWEST_LISTED, room) if by_split else 0
    _native.retrieval_rank(
        query,
        gallery,
        positives.contiguous() if positives.dim() == 2 else positives.contiguous()[:, None],
        torch.empty_like(rank, dtype=torch.float32),
        rank,
        query.new_empty((rows, 2, depth), dtype=torch.bfloat16),
        query.new_empty((rows,)),
        torch.empty(1 + capacity, dtype=torch.int64, device=query.device),
    )
    return rank


def _check_positives(positives: Tensor, items: int) -> None:
    """Raise ValueError unless every query has a positive and all indices are in range; synchronises on CUDA."""
    rows = positives if positives.dim() == 2 else positives[:, None]
    bad = (rows < -1) | (rows >= items)
    lacking = (rows < 0).all(dim=1)
    if not bool((bad.any() | lacking.any()).item()):  # the only synchronisation
        return
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        where = f"positives[{row}, {column}]" if positives.dim() == 2 else f"positives[{row}]"
        raise ValueError(f"{where} is {int(rows[row, column])}; expected 0 <= index < {items} (or -1 as padding)")
    row = int(lacking.nonzero()[0])
    raise ValueError(f"positives[{row}] has no index >= 0; expected at least one positive for each query")


def retrieval_rank(query: Tensor, gallery: Tensor, positives: Tensor) -> Tensor:
    """Count the gallery items that score strictly higher than each query's best positive.

    The score is the dot product; ``recall@k`` is ``(rank < k).float().mean()``. The score matrix is never stored:
    memory beyond the result is O(V*N), and for fp32 on a GPU about as much as query and gallery take. MoPE-CLIP scores
    modules by recall (arXiv 2403.07839).

    Parameters
    ----------
    query : Tensor [V, N, D] or [N, D], fp32/fp16/bf16
        Embeddings of N queries under V variants of the model.
    gallery : Tensor [V, M, D], [1, M, D] or [M, D], dtype of query
        Embeddings of the items; one gallery for all variants, or one each.
    positives : Tensor [N] or [N, P], int64
        Indices of each query's matching items; -1 pads a row.

    Returns
    -------
    Tensor [V, N] (or [N] for a query of two dimensions), int32
        0 is a hit at 1. A tie does not count as higher; scores are accumulated in fp32, each in the same order, so an
        exact copy of a positive is a tie.

    Raises
    ------
    TypeError
        A dtype that is not supported.
    ValueError
        Shapes or devices that do not fit, an index out of range, a query without a positive, a score that is NaN. The
        last three read the data (on CUDA: a synchronisation). While a CUDA graph is captured or torch.compile traces
        they are not checked: then a rank of -1 marks a query with a NaN among its scores.
    """
    expect_tensors(query=query, gallery=gallery, positives=positives)
    readable = may_read(positives)
    if readable:
        _retrieval_rank_out(query, gallery, positives)
        _check_positives(positives, gallery.shape[-2])
    rank = torch.ops.vlprune.retrieval_rank(query, gallery, positives)
    if readable and rank.numel() and bool((rank < 0).any()):
        where = (rank < 0).nonzero()[0].tolist()
        raise ValueError(f"query {where} has a NaN among its scores; expected query and gallery without NaN")
    return rank


_library.impl("retrieval_rank", _retrieval_rank, "CPU")
_library.impl("retrieval_rank", _retrieval_rank, "CUDA")
torch.library.register_fake("vlprune::retrieval_rank", _retrieval_rank_out, lib=_library)
