"""Ops that shorten the sequence of a layer's state: gather the kept tokens, or merge the dropped ones into them.

For each op: the schema, one function that checks the arguments and allocates the output (also the fake kernel), the
implementation, and the public function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .checks import INT32_MAX, check_beside, check_tensors, expect_int, expect_tensors, rows, shape

__all__ = [
    "compact_tokens",
    "match_tokens",
    "merge_tokens",
]

_library = torch.library.Library("vlprune", "FRAGMENT")
_library.define("compact_tokens(Tensor index, Tensor[] tensors, int[]? dims) -> Tensor[]")
_library.define("match_tokens(Tensor key, Tensor target, Tensor? source=None) -> (Tensor, Tensor)")
_library.define(
    "merge_tokens(Tensor index, Tensor match, Tensor[] tensors, Tensor? size, int[]? dims) -> (Tensor[], Tensor)"
)

_CUDA_DEPTH = 8  # gathered keys are padded to a multiple of it


# ---- compact_tokens --------------------------------------------------------------------------------------------------


def _expect_tokens(tensors: object, dims: object) -> list[int] | None:
    """Check the types of ``tensors`` and ``dims`` before the dispatcher does in its own words; return ``dims``."""
    if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
        raise TypeError(f"tensors is a {type(tensors).__name__}; expected a sequence of tensors")
    expect_tensors(**{f"tensors[{i}]": tensor for i, tensor in enumerate(tensors)})
    if isinstance(dims, Tensor) or not (dims is None or isinstance(dims, Sequence)):
        raise TypeError(f"dims is a {type(dims).__name__}; expected None or a sequence of int, on the host")
    return None if dims is None else [expect_int(f"dims[{i}]", dim) for i, dim in enumerate(dims)]


def _token_dims(tensors: Sequence[Tensor], dims: Sequence[int] | None) -> Sequence[int]:
    """Return the token dimension of each tensor, counted from the front."""
    if dims is None:
        dims = [1] * len(tensors)
    if len(dims) != len(tensors):
        raise ValueError(f"dims has {len(dims)} entries; expected {len(tensors)}, one for each of tensors")
    found = []
    for i, (tensor, dim) in enumerate(zip(tensors, dims, strict=True)):
        dimensions = tensor.dim()
        if dimensions < 2:
            raise ValueError(f"tensors[{i}] has shape {shape(tensor)}; expected [B, .., T, ..]")
        place = dim + dimensions if dim < 0 else dim
        if not 1 <= place < dimensions:
            raise ValueError(
                f"dims[{i}] is {dim}; expected a dimension of tensors[{i}] {shape(tensor)} behind its batch,"
                f" 1 <= dim < {dimensions}"
            )
        found.append(place)
    return found


def _compacted(
    index: Tensor,  # [B, K]
    tensors: Sequence[Tensor],  # [B or 1, .., T, ..]
    dims: Sequence[int] | None,
) -> list[Tensor]:  # [B, .., K, ..], not filled
    if index.dtype != torch.int64:
        raise TypeError(f"index has dtype {index.dtype}; expected int64")
    if index.dim() != 2:
        raise ValueError(f"index has shape {shape(index)}; expected two dimensions [B, K]")
    device = index.device
    if device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"index is on {device}; expected a CPU or CUDA tensor")
    batch, keep = index.shape
    out: list[Tensor] = []
    expected = -1  # tokens
    for i, (tensor, dim) in enumerate(zip(tensors, _token_dims(tensors, dims), strict=True)):
        sizes = tensor.shape
        tokens = sizes[dim]
        if tensor.device != device:
            raise ValueError(f"tensors[{i}] is on {tensor.device}; expected {device} as index")
        if sizes[0] != batch and sizes[0] != 1:
            raise ValueError(
                f"tensors[{i}] has shape {shape(tensor)}; expected a batch of {batch} as index, or of 1 (shared)"
            )
        expected = expected if out else tokens
        if tokens == 0 and keep > 0:
            raise ValueError(f"tensors[{i}] has shape {shape(tensor)}; expected at least one token")
        if tokens != expected:
            raise ValueError(
                f"tensors[{i}] has shape {shape(tensor)}, {tokens} tokens in dimension {dim};"
                f" expected {expected} as tensors[0]"
            )
        out.append(tensor.new_empty((batch, *sizes[1:dim], keep, *sizes[dim + 1 :])))
    return out


def _check_index(index: Tensor, tokens: int) -> None:
    """Raise ValueError for an index out of range on a CPU, where reading is cheap and a stray address would be used."""
    if index.device.type != "cpu" or index.numel() == 0:
        return
    least, most = index.aminmax()
    if least >= 0 and most < tokens:
        return
    row, column = ((index < 0) | (index >= tokens)).nonzero()[0].tolist()
    raise ValueError(
        f"index[{row}, {column}] is {index[row, column].item()}; expected 0 <= index < {tokens}, the tokens of tensors"
    )


def _compact_tokens(index: Tensor, tensors: Sequence[Tensor], dims: Sequence[int] | None) -> list[Tensor]:
    places = _token_dims(tensors, dims)
    out = _compacted(index, tensors, places)
    if out:
        _check_index(index, tensors[0].shape[places[0]])
        _native.compact_tokens(index.contiguous(), tensors, out, places)
    return out


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, list[Tensor], list[int] | None], output: list[Tensor]) -> None:
    index, tensors, dims = inputs
    ctx.save_for_backward(index)
    ctx.dims = _token_dims(tensors, dims)
    ctx.shapes = [tensor.shape if tensor.requires_grad else None for tensor in tensors]
    ctx.mark_non_differentiable(*(kept for kept, full in zip(output, ctx.shapes, strict=True) if full is None))
    ctx.set_materialize_grads(False)


def _spread(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[None, list[Tensor | None], None]:
    """Scatter the gradients to the tokens' positions, zeros elsewhere; those of a shared batch are summed."""
    (index,) = ctx.saved_tensors
    batch = torch.arange(index.shape[0], device=index.device)[:, None]
    found: list[Tensor | None] = []
    for grad, full, dim in zip(grads, ctx.shapes, ctx.dims, strict=True):
        if grad is None or full is None:
            found.append(None)
            continue
        row = batch if full[0] == index.shape[0] else torch.zeros_like(batch)
        spread = grad.new_zeros(full)
        spread.movedim(dim, 1).index_put_((row, index), grad.movedim(dim, 1), accumulate=True)
        found.append(spread)
    return None, found, None


def compact_tokens(index: Tensor, tensors: Sequence[Tensor], dims: Sequence[int] | None = None) -> list[Tensor]:
    """Gather the tokens ``index`` of each tensor, in that order: a layer's state after token pruning, in one launch.

    Differentiable in ``tensors``: gradients are scattered back, zeros elsewhere.

    Parameters
    ----------
    index : Tensor [B, K], int64
        Positions, each once in a row, as :func:`select_tokens` gives them. Not read by the host if on a GPU: there a
        position out of range ends in a CUDA error, as in torch's own indexing.
    tensors : sequence of Tensor [B, .., T, ..] or [1, .., T, ..], any dtypes
        Hidden states [B, T, D], position ids [B, T], masks, cos and sin, keys and values [B, H, T, d]. A batch of 1 is
        shared by all rows. Any strides; a tensor with several dimensions on one side of the token's that do not merge
        into one stride is copied. More than 32 tensors take a launch for each 32.
    dims : sequence of int, optional
        The token dimension of each tensor, 1 (behind the batch) by default; from the end if negative.

    Returns
    -------
    list of Tensor [B, .., K, ..], contiguous

    Raises
    ------
    TypeError
        An index that is not int64, tensors that are none.
    ValueError
        Shapes or devices that do not fit, different numbers of tokens; on a CPU, an index out of range.
    """
    expect_tensors(index=index)
    places = _expect_tokens(tensors, dims)
    return torch.ops.vlprune.compact_tokens(index, list(tensors), places)


_library.impl("compact_tokens", _compact_tokens, "CPU")
_library.impl("compact_tokens", _compact_tokens, "CUDA")
torch.library.register_fake("vlprune::compact_tokens", _compacted, lib=_library)
torch.library.register_autograd("vlprune::compact_tokens", _spread, setup_context=_keep_for_backward, lib=_library)


# ---- match_tokens ----------------------------------------------------------------------------------------------------


def _matched(
    key: Tensor,  # [B, T, d]
    target: Tensor,  # [B, T] bool
    source: Tensor | None = None,  # [B, T] bool
) -> tuple[Tensor, Tensor]:  # [B, T] fp32, [B, T] int64, not filled
    check_tensors(key=key)
    if key.dim() != 3:
        raise ValueError(f"key has shape {shape(key)}; expected three dimensions [B, T, d]")
    b, t, d = key.shape
    if d < 1:
        raise ValueError(f"key has shape {shape(key)}; expected vectors of at least one number")
    if b > INT32_MAX or t > INT32_MAX:
        raise ValueError(f"key has shape {shape(key)}; expected fewer than 2**31 rows and 2**31 tokens")
    check_beside("target", target, torch.bool, [[b, t]], "the tokens of key", "key", key)
    if source is not None:
        check_beside("source", source, torch.bool, [[b, t]], "the tokens of key", "key", key)
    return key.new_empty((b, t), dtype=torch.float32), key.new_empty((b, t), dtype=torch.int64)


def _match_tokens(key: Tensor, target: Tensor, source: Tensor | None = None) -> tuple[Tensor, Tensor]:
    similarity, match = _matched(key, target, source)
    b, t, d = key.shape
    gathered = (t if source is None else 2 * t, -(-d // _CUDA_DEPTH) * _CUDA_DEPTH)
    _native.match_tokens(
        rows(key),
        target.contiguous(),
        None if source is None else source.contiguous(),
        similarity,
        match,
        key.new_empty((b, 3, t), dtype=torch.int32),
        key.new_empty((b, 2), dtype=torch.int32),
        torch.empty_like(similarity),
        key.new_empty((b if _native.is_cuda(key.device) else 0, *gathered)),
    )
    return similarity, match


def match_tokens(key: Tensor, target: Tensor, *, source: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return each source token's target of highest cosine similarity: ``max_j <key_i, key_j> / (|key_i| |key_j|)``.

    The bipartite matching of ToMe (arXiv 2210.09461, section 3), the contextual tokens of VisionZip (arXiv 2412.04467),
    the nearest kept entry of LOOK-M (arXiv 2406.18139). For :func:`merge_tokens`. No matrix of all pairs is stored; a
    GPU holds a copy of the keys of targets and sources. No host-device synchronisation: a CUDA graph may capture it. No
    gradient.

    Parameters
    ----------
    key : Tensor [B, T, d], fp32/fp16/bf16
        Features to compare: keys, or their mean over heads, or hidden states. Any strides; a last dimension that is not
        contiguous is copied.
    target : Tensor [B, T], bool
        True for tokens that may be matched.
    source : Tensor [B, T], bool, optional
        True for tokens to find a match for; by default all others. A token may be both: it does not match itself.

    Returns
    -------
    similarity : Tensor [B, T], fp32
        Of the match; -inf where there is none. Products and squared lengths are fp32: a vector of length 0, or of one
        whose square is 0 in fp32, has a similarity of 0 with every other. It may exceed 1 by its rounding.
    match : Tensor [B, T], int64
        The target's position; ties go to the lower. -1 for a token that is no source, or that has no target but itself.
        A NaN similarity is none, so a key with a NaN or an infinity in it, or whose squared length is infinite in fp32,
        neither matches nor is matched.

    A sample's results are bitwise reproducible on every run and thread count, whatever else is in the batch and however
    many other tokens there are beside its sources and targets.

    Raises
    ------
    TypeError
        A dtype that is not supported.
    ValueError
        Shapes or devices that do not fit.
    """
    expect_tensors(key=key, target=target)
    if source is not None:
        expect_tensors(source=source)
    return torch.ops.vlprune.match_tokens(key.detach(), target, source)


_library.impl("match_tokens", _match_tokens, "CPU")
_library.impl("match_tokens", _match_tokens, "CUDA")
torch.library.register_fake("vlprune::match_tokens", _matched, lib=_library)


# ---- merge_tokens ----------------------------------------------------------------------------------------------------


def _merged(
    index: Tensor,  # [B, K] int64
    match: Tensor,  # [B, T] int64
    tensors: Sequence[Tensor],  # [B or 1, .., T, ..]
    size: Tensor | None,  # [B, T] fp32
    dims: Sequence[int] | None,
) -> tuple[list[Tensor], Tensor]:  # [B, .., K, ..], [B, K] fp32, not filled
    for i, tensor in enumerate(tensors):
        check_tensors(**{f"tensors[{i}]": tensor})
    out = _compacted(index, tensors, dims)
    if match.dim() != 2:
        raise ValueError(f"match has shape {shape(match)}; expected two dimensions [B, T]")
    batch, keep = index.shape
    tokens = tensors[0].shape[_token_dims(tensors, dims)[0]] if tensors else match.shape[1]
    check_beside("match", match, torch.int64, [[batch, tokens]], "the tokens of tensors", "index", index)
    if tokens > INT32_MAX or batch > INT32_MAX:
        raise ValueError(f"match has shape {shape(match)}; expected fewer than 2**31 rows and 2**31 tokens")
    if size is not None:
        check_beside("size", size, torch.float32, [[batch, tokens]], "the tokens of match", "index", index)
    if keep > tokens:
        raise ValueError(f"index has shape {shape(index)}; expected at most {tokens} tokens, those of match")
    return out, index.new_empty((batch, keep), dtype=torch.float32)


def _check_merge(index: Tensor, size: Tensor | None, tokens: int) -> None:
    """Raise ValueError for values out of range on a CPU, as :func:`_check_index`."""
    _check_index(index, tokens)
    if index.device.type != "cpu" or index.numel() == 0:
        return
    falls = index[:, 1:] <= index[:, :-1]
    if falls.any():
        row, column = falls.nonzero()[0].tolist()
        raise ValueError(
            f"index[{row}, {column + 1}] is {index[row, column + 1].item()} behind {index[row, column].item()};"
            " expected ascending positions"
        )
    if size is None:
        return
    least, most = size.aminmax()
    if not (least >= 0 and most < math.inf):
        row, column = (~((size >= 0) & size.isfinite())).nonzero()[0].tolist()
        raise ValueError(f"size[{row}, {column}] is {size[row, column].item()}; expected a finite number >= 0")


def _merge_tokens(
    index: Tensor, match: Tensor, tensors: Sequence[Tensor], size: Tensor | None, dims: Sequence[int] | None
) -> tuple[list[Tensor], Tensor]:
    places = _token_dims(tensors, dims)
    out, total = _merged(index, match, tensors, size, places)
    (batch, keep), tokens = index.shape, match.shape[1]
    _check_merge(index, size, tokens)
    _native.merge_tokens(
        index.contiguous(),
        match.contiguous(),
        None if size is None else size.contiguous(),
        total,
        index.new_empty((batch, 3, tokens), dtype=torch.int32),
        index.new_empty((batch, _native.MERGE_PARTS, keep), dtype=torch.int32),
        tensors,
        out,
        places,
    )
    return out, total


def _keep_for_shares(ctx: Any, inputs: Any, output: tuple[list[Tensor], Tensor]) -> None:
    index, match, tensors, size, dims = inputs
    out, total = output
    ctx.save_for_backward(index, match, total, *(() if size is None else (size,)))
    ctx.dims = _token_dims(tensors, dims)
    ctx.shapes = [tensor.shape if tensor.requires_grad else None for tensor in tensors]
    ctx.mark_non_differentiable(total, *(mean for mean, full in zip(out, ctx.shapes, strict=True) if full is None))
    ctx.set_materialize_grads(False)


def _share_out(
    ctx: Any, grads: Sequence[Tensor | None], _: Tensor | None
) -> tuple[None, None, list[Tensor | None], None, None]:
    """Scatter each mean's gradient to its tokens in proportion to their size; those of a shared batch are summed."""
    index, match, total, *sizes = ctx.saved_tensors
    keep, tokens = index.shape[1], match.shape[1]
    if keep == 0:  # an empty gradient cannot be gathered from
        nothing = [
            None if grad is None or full is None else grad.new_zeros(full)
            for grad, full in zip(grads, ctx.shapes, strict=True)
        ]
        return None, None, nothing, None, None
    kept = torch.full_like(match, -1).scatter_(1, index, torch.arange(keep, device=index.device).expand_as(index))
    goal = torch.where((match >= 0) & (match < tokens), kept.gather(1, match.clamp(0, tokens - 1)), -1)
    goal = torch.where(kept >= 0, kept, goal)  # [B, T]: index of the mean that a token is part of, or -1
    whole = total.gather(1, goal.clamp(min=0))
    part = sizes[0] if sizes else torch.ones_like(whole)
    share = torch.where(whole > 0, part / whole, 1.0).masked_fill(goal < 0, 0)
    share = share.masked_fill((kept < 0) & (part == 0), 0)
    found: list[Tensor | None] = []
    for grad, full, dim in zip(grads, ctx.shapes, ctx.dims, strict=True):
        if grad is None or full is None:
            found.append(None)
            continue
        along = [goal.shape[0], *[1] * (len(full) - 1)]
        along[dim] = tokens
        where = goal.clamp(min=0).view(along).expand(goal.shape[0], *full[1:])
        of_tokens = (grad.gather(dim, where) * share.view(along)).to(grad.dtype)
        found.append(of_tokens if full[0] == goal.shape[0] else of_tokens.sum(0, keepdim=True))
    return None, None, found, None, None


def merge_tokens(
    index: Tensor,
    match: Tensor,
    tensors: Sequence[Tensor],
    *,
    size: Tensor | None = None,
    dims: Sequence[int] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Average each kept token of ``index`` with the dropped tokens matched to it, weighted by size, in each tensor.

    ``size'_k = sum_t size_t`` and ``out_k = sum_t size_t x_t / size'_k``, over the kept token itself and the dropped
    ones of which ``match`` is its position: ToMe's merging (arXiv 2210.09461, section 3), and, with the rows of a KV
    cache as the batch, LOOK-M's (arXiv 2406.18139). No host-device synchronisation: a CUDA graph may capture it.
    Differentiable in ``tensors``, not in ``size``.

    Parameters
    ----------
    index : Tensor [B, K], int64
        Positions to keep, ascending, as :func:`select_tokens` gives them. Not read by the host if on a GPU: there a
        position out of range ends in a CUDA error, and of a repeated one it is undefined which is merged into.
    match : Tensor [B, T], int64
        For each token that is not in ``index`` the position, in ``index``, that it merges into, as :func:`match_tokens`
        gives it. A token with any other number, such as -1, is discarded. Not read for the tokens of ``index``.
    tensors : sequence of Tensor [B, .., T, ..] or [1, .., T, ..], fp32/fp16/bf16
        As in :func:`compact_tokens`, each of its own dtype and shape. A batch of 1 is shared by all rows.
    size : Tensor [B, T], fp32, optional
        How many tokens each represents, finite and >= 0, which is checked on a CPU only; all 1 by default. A token of
        size 0 contributes nothing.
    dims : sequence of int, optional
        As in :func:`compact_tokens`.

    Returns
    -------
    out : list of Tensor [B, .., K, ..], contiguous
        Sums are fp32, of the token itself and then of the others in ascending order; products, sums and the quotient
        are rounded one by one, then to the dtype: bitwise reproducible on every run, thread count and device. A token
        that nothing merges into is copied bit for bit.
    size : Tensor [B, K], fp32
        For the next merge.

    Raises
    ------
    TypeError
        An index or match that is not int64, a dtype that is not supported, tensors that are none.
    ValueError
        Shapes or devices that do not fit, different numbers of tokens; on a CPU, an index out of range or not
        ascending, a size that is negative or not finite.
    """
    expect_tensors(index=index, match=match)
    if size is not None:
        expect_tensors(size=size)
    places = _expect_tokens(tensors, dims)
    return torch.ops.vlprune.merge_tokens(index, match, list(tensors), None if size is None else size.detach(), places)


_library.impl("merge_tokens", _merge_tokens, "CPU")
_library.impl("merge_tokens", _merge_tokens, "CUDA")
torch.library.register_fake("vlprune::merge_tokens", _merged, lib=_library)
torch.library.register_autograd("vlprune::merge_tokens", _share_out, setup_context=_keep_for_shares, lib=_library)
