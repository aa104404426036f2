"""Loads the compiled module and is the only place that sees an address.

One function per launcher: it turns checked tensors into pointers, a dtype code, and, for CUDA, a device guard and the
current stream; for the CPU, torch's thread count. Everything about the arguments was checked by ``vlprune_ext.ops``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

try:
    from vlprune_ext import _C
except ImportError as error:
    raise ImportError(
        f"vlprune_ext: the compiled module vlprune_ext._C cannot be imported ({error}). It is built by installing the"
        " package: 'pip install .' or 'pip install --no-build-isolation -e .' in the source folder, with this Python."
    ) from error

SPLIT_DEPTH: int = _C.split_depth
NORM_CHUNK: int = _C.norm_chunk
HISTOGRAM_BINS: int = _C.histogram_bins
FEW_QUERIES: int = _C.few_queries
MERGE_PARTS: int = _C.merge_parts
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum DType in csrc/dtype.h


def build_info() -> dict[str, Any]:
    """What was compiled, and which instruction set runs: plain data, for ``vlprune info``."""
    return {
        "compiler": _C.compiler,
        "isa": _C.cpu.isa(),
        "available_isas": list(_C.cpu.available_isas()),
        "cuda_built": _C.cuda_built,
        "cuda_version": _C.cuda_version,
        "cuda_archs": _C.cuda_archs,
    }


@contextlib.contextmanager
def force_isa(name: str) -> Iterator[None]:
    """Run the CPU kernels with the instruction set ``name`` ("scalar", "avx2", "avx512") inside the ``with`` block.

    The environment variable VLPRUNE_FORCE_ISA does so for a whole process. RuntimeError where the machine lacks it.
    """
    previous = _C.cpu.isa()
    _C.cpu.force_isa(name)
    try:
        yield
    finally:
        _C.cpu.force_isa(previous)


def is_cuda(device: torch.device) -> bool:
    """Whether the CUDA launchers take tensors on ``device``: some want other scratch memory than those of the CPU."""
    return device.type == "cuda"


def _launch(name: str, device: torch.device, *args: Any) -> None:
    if not is_cuda(device):
        getattr(_C.cpu, name)(*args, torch.get_num_threads())
        return
    if not _C.cuda_built:
        raise RuntimeError(
            f"vlprune::{name} got a tensor on {device}, but this build of vlprune_ext has CPU kernels only."
            " Reinstall it where nvcc is on PATH or named by CUDACXX: 'VLPRUNE_CUDA=ON pip install --no-build-isolation"
            " .', or move the tensors to the CPU."
        )
    with torch.cuda.device(device):
        getattr(_C.cuda, name)(*args, torch.cuda.current_stream(device).cuda_stream)


def leave_one_out(x: Tensor, weight: Tensor, base: Tensor, out: Tensor, groups: list[int], group_size: int) -> None:
    if out.numel() == 0:
        return
    _launch(
        "leave_one_out",
        x.device,
        x.data_ptr(),
        weight.data_ptr(),
        base.data_ptr(),
        out.data_ptr(),
        groups,
        base.shape[0],
        base.shape[1],
        group_size,
        x.stride(0),
        weight.stride(0),
        base.stride(0),
        DTYPES[x.dtype],
    )


def retrieval_rank(
    query: Tensor,
    gallery: Tensor,
    positives: Tensor,
    best: Tensor,
    rank: Tensor,
    split: Tensor,
    norm: Tensor,
    listed: Tensor,
) -> None:
    if rank.numel() == 0:
        return
    v, n, d = query.shape
    _launch(
        "retrieval_rank",
        query.device,
        query.data_ptr(),
        gallery.data_ptr(),
        positives.data_ptr(),
        best.data_ptr(),
        rank.data_ptr(),
        split.data_ptr(),
        norm.data_ptr(),
        listed.data_ptr(),
        listed.numel() - 1,
        v,
        n,
        gallery.shape[1],
        d,
        positives.shape[1],
        gallery.shape[0] == 1,
        DTYPES[query.dtype],
    )


def column_norm_sq(acc: Tensor, x: Tensor, token_weight: Tensor | None, partial: Tensor) -> None:
    if x.numel() == 0:
        return
    _launch(
        "column_norm_sq",
        x.device,
        acc.data_ptr(),
        x.data_ptr(),
        _address(token_weight),
        partial.data_ptr(),
        x.shape[0],
        x.shape[1],
        x.stride(0),
        DTYPES[x.dtype],
    )


def prune_smallest(
    weight: Tensor, scale: Tensor | None, mask: Tensor | None, k: int, k_of_row: Tensor | None = None
) -> None:
    if weight.numel() == 0:
        return
    _launch("prune_smallest", weight.device, _keys(weight, scale), _address(mask), k, _address(k_of_row))


def prune_nm(weight: Tensor, scale: Tensor | None, mask: Tensor | None, n: int, m: int) -> None:
    if weight.numel() == 0:
        return
    _launch("prune_nm", weight.device, _keys(weight, scale), _address(mask), n, m)


def key_histogram(weight: Tensor, scale: Tensor | None, counts: Tensor, prefix: Tensor | None, level: int) -> None:
    if weight.numel() == 0:
        return
    _launch("key_histogram", weight.device, _keys(weight, scale), counts.data_ptr(), _address(prefix), level)


def count_keys(weight: Tensor, scale: Tensor | None, threshold: Tensor, below: Tensor, equal: Tensor) -> None:
    if weight.numel() == 0:
        return
    _launch(
        "count_keys",
        weight.device,
        _keys(weight, scale),
        threshold.data_ptr(),
        below.data_ptr(),
        equal.data_ptr(),
    )


def perturb(weight: Tensor, plus: Tensor, minus: Tensor, seed: int, tensor_id: int, eps: float) -> None:
    if weight.numel() == 0:
        return
    _launch(
        "perturb",
        weight.device,
        weight.data_ptr(),
        plus.data_ptr(),
        minus.data_ptr(),
        weight.numel(),
        seed,
        tensor_id,
        eps,
        DTYPES[weight.dtype],
    )


def attention_importance(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    head_weight: Tensor | None,
    query_weight: Tensor | None,
    key_mask: Tensor | None,
    partial: Tensor,
    out: Tensor,
    scale: float,
    of_max: bool,
    causal: bool,
) -> None:
    if out.numel() == 0:
        return
    b, h, tq, d = q.shape
    _launch(
        "attention_importance",
        q.device,
        q.data_ptr(),
        k.data_ptr(),
        lse.data_ptr(),
        _address(head_weight),
        _address(query_weight),
        _address(key_mask),
        partial.data_ptr(),
        out.data_ptr(),
        b,
        h,
        k.shape[1],
        tq,
        k.shape[2],
        d,
        partial.shape[0],
        q.stride()[:3],
        k.stride()[:3],
        h if head_weight is not None and head_weight.shape[0] > 1 else 0,
        scale,
        of_max,
        causal,
        DTYPES[q.dtype],
    )


def select_tokens(score: Tensor, protected: Tensor | None, index: Tensor) -> None:
    if index.numel() == 0:
        return
    _launch(
        "select_tokens",
        score.device,
        score.data_ptr(),
        _address(protected),
        index.data_ptr(),
        score.shape[0],
        score.shape[1],
        index.shape[1],
        score.stride(0),
        0 if protected is None else protected.stride(0),
        DTYPES[score.dtype],
    )


def diverse_tokens(
    x: Tensor,
    keep: int,
    keep_of_sample: Tensor | None,
    candidate: Tensor | None,
    gram: Tensor,
    scale: Tensor,
    closest: Tensor,
    kept: Tensor,
) -> None:
    if kept.numel() == 0:
        return
    _launch(
        "diverse_tokens",
        x.device,
        x.data_ptr(),
        _address(candidate),
        _address(keep_of_sample),
        kept.data_ptr(),
        gram.data_ptr(),
        scale.data_ptr(),
        closest.data_ptr(),
        *x.shape,
        keep,
        x.stride(0),
        x.stride(1),
        DTYPES[x.dtype],
    )


def compact_tokens(
    index: Tensor, tensors: Sequence[Tensor], out: Sequence[Tensor], dims: Sequence[int], tokens: int
) -> None:
    kept = [_token_tensor(*each) for each in zip(tensors, out, dims, strict=True) if each[1].numel()]
    if not kept:
        return
    _launch(
        "compact_tokens",
        index.device,
        index.data_ptr(),
        [each[0] for each in kept],
        index.shape[0],
        index.shape[1],
        tokens,
    )


def match_tokens(
    key: Tensor,
    target: Tensor,
    source: Tensor | None,
    similarity: Tensor,
    match: Tensor,
    lists: Tensor,
    counts: Tensor,
    inverse: Tensor,
    gathered: Tensor,
) -> None:
    if match.numel() == 0:
        return
    b, t, d = key.shape
    _launch(
        "match_tokens",
        key.device,
        key.data_ptr(),
        target.data_ptr(),
        _address(source),
        similarity.data_ptr(),
        match.data_ptr(),
        lists.data_ptr(),
        counts.data_ptr(),
        inverse.data_ptr(),
        gathered.data_ptr(),
        b,
        t,
        d,
        gathered.shape[1],
        gathered.shape[2],
        key.stride(0),
        key.stride(1),
        DTYPES[key.dtype],
    )


def merge_tokens(
    index: Tensor,
    match: Tensor,
    size: Tensor | None,
    total: Tensor,
    lists: Tensor,
    ends: Tensor,
    tensors: Sequence[Tensor],
    out: Sequence[Tensor],
    dims: Sequence[int],
) -> None:
    if index.numel() == 0:
        return
    kept = [_token_tensor(*each) for each in zip(tensors, out, dims, strict=True) if each[1].numel()]
    _launch(
        "merge_tokens",
        index.device,
        index.data_ptr(),
        match.data_ptr(),
        _address(size),
        total.data_ptr(),
        lists.data_ptr(),
        ends.data_ptr(),
        [each[0] for each in kept],
        [DTYPES[each[1].dtype] for each in kept],
        index.shape[0],
        index.shape[1],
        match.shape[1],
    )


_TokenTuple = tuple[int, int, int, int, int, int, int, int, int]


def _token_tensor(tensor: Tensor, out: Tensor, dim: int) -> tuple[_TokenTuple, Tensor]:
    """A tensor as compact_tokens takes it (csrc/ops.h), and what has to live as long: the tensor or a copy.

    Copied is what has two dimensions or more before the token's, or after it and before what is contiguous, that
    cannot be walked with one stride.
    """
    sizes, strides, size = tensor.shape, tensor.stride(), tensor.element_size()
    run = 1
    last = tensor.dim() - 1
    while last > dim and (strides[last] == run or sizes[last] == 1):
        run *= sizes[last]
        last -= 1
    outer = _merged(sizes[1:dim], strides[1:dim])
    inner = _merged(sizes[dim + 1 : last + 1], strides[dim + 1 : last + 1])
    if outer is None or inner is None:
        return _token_tensor(tensor.contiguous(), out, dim)
    described = (
        tensor.data_ptr(),
        out.data_ptr(),
        outer[0],
        inner[0],
        run * size,
        strides[0] * size if sizes[0] > 1 else 0,
        outer[1] * size,
        strides[dim] * size,
        inner[1] * size,
    )
    return described, tensor


def _merged(sizes: Sequence[int], strides: Sequence[int]) -> tuple[int, int] | None:
    """Size and stride of some dimensions walked as one, or None where one stride does not do."""
    if len(sizes) == 0:
        return 1, 0
    if len(sizes) == 1:
        return sizes[0], strides[0]
    size, stride = 1, 0
    for next_size, next_stride in zip(reversed(sizes), reversed(strides), strict=True):
        if next_size == 1:
            continue
        if size > 1 and next_stride != stride * size:
            return None
        stride = stride if size > 1 else next_stride
        size *= next_size
    return size, stride


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _keys(weight: Tensor, scale: Tensor | None) -> tuple[int, int, int, int, int, int]:
    return (
        weight.data_ptr(),
        _address(scale),
        weight.shape[0],
        weight.shape[1],
        weight.stride(0),
        DTYPES[weight.dtype],
    )
