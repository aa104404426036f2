"""Bindings to the compiled module ``_C``: the only place that passes data pointers.

One function per launcher: it describes checked tensors to csrc/launchers.h and skips launches without output.
``_launch`` adds, for CUDA, a device guard and the current stream; for the CPU, torch's thread count.
``vlprune_ext.ops`` has checked all arguments.
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
    """Return the compiler, CUDA version and instruction sets of the build, as plain data for ``vlprune info``."""
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
    """Run the CPU kernels with one instruction set inside the ``with`` block.

    The environment variable VLPRUNE_FORCE_ISA does so for a whole process.

    Parameters
    ----------
    name : {"scalar", "avx2", "avx512"}
        The instruction set.

    Raises
    ------
    RuntimeError
        A machine or build without it.
    """
    previous = _C.cpu.isa()
    _C.cpu.force_isa(name)
    try:
        yield
    finally:
        _C.cpu.force_isa(previous)


def is_cuda(device: torch.device) -> bool:
    """Return whether CUDA launchers are used for ``device``; some need other scratch memory than the CPU's."""
    return device.type == "cuda"


def _launch(name: str, device: torch.device, *args: Any) -> None:
    """Call a launcher of the device's backend; raise RuntimeError for a CUDA tensor in a build without CUDA."""
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


_Tensor = tuple[int, Sequence[int], Sequence[int], int] | None


def _tensor(tensor: Tensor | None) -> _Tensor:
    """Describe a tensor as csrc/tensor.h takes it: address, sizes, strides, dtype (-1 if not in DTYPES)."""
    if tensor is None:
        return None
    return tensor.data_ptr(), tensor.shape, tensor.stride(), DTYPES.get(tensor.dtype, -1)


def leave_one_out(x: Tensor, weight: Tensor, base: Tensor, out: Tensor, groups: list[int], group_size: int) -> None:
    """Launch the GEMM that writes ``base`` without each group's product to ``out`` [V, N, D]."""
    if out.numel() == 0:
        return
    _launch("leave_one_out", x.device, _tensor(x), _tensor(weight), _tensor(base), _tensor(out), groups, group_size)


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
    """Launch the search that writes ``rank`` [V, N] int32; ``best``, ``split``, ``norm`` and ``listed`` are scratch."""
    if rank.numel() == 0:
        return
    _launch(
        "retrieval_rank",
        query.device,
        _tensor(query),
        _tensor(gallery),
        _tensor(positives),
        _tensor(best),
        _tensor(rank),
        _tensor(split),
        _tensor(norm),
        _tensor(listed),
    )


def column_norm_sq(acc: Tensor, x: Tensor, token_weight: Tensor | None, partial: Tensor) -> None:
    """Launch the reduction that adds squared column norms to ``acc`` [in]; ``partial`` is scratch."""
    if x.numel() == 0:
        return
    _launch("column_norm_sq", x.device, _tensor(acc), _tensor(x), _tensor(token_weight), _tensor(partial))


def prune_smallest(
    weight: Tensor, scale: Tensor | None, mask: Tensor | None, k: int, k_of_row: Tensor | None = None
) -> None:
    """Launch the selection of each row's ``k`` (or ``k_of_row`` [out]) least scores: written to ``mask``, or zeroed."""
    if weight.numel() == 0:
        return
    _launch("prune_smallest", weight.device, _tensor(weight), _tensor(scale), _tensor(mask), _tensor(k_of_row), k)


def prune_nm(weight: Tensor, scale: Tensor | None, mask: Tensor | None, n: int, m: int) -> None:
    """Launch the selection of the n least scores of every m: written to ``mask``, or zeroed."""
    if weight.numel() == 0:
        return
    _launch("prune_nm", weight.device, _tensor(weight), _tensor(scale), _tensor(mask), n, m)


def key_histogram(weight: Tensor, scale: Tensor | None, counts: Tensor, prefix: Tensor | None, level: int) -> None:
    """Launch the histogram of digit ``level`` of the scores' sort keys that share ``prefix``, added to ``counts``."""
    if weight.numel() == 0:
        return
    _launch("key_histogram", weight.device, _tensor(weight), _tensor(scale), _tensor(counts), _tensor(prefix), level)


def count_keys(weight: Tensor, scale: Tensor | None, threshold: Tensor, below: Tensor, equal: Tensor) -> None:
    """Launch the count of each row's sort keys below and equal to ``threshold``."""
    if weight.numel() == 0:
        return
    _launch(
        "count_keys",
        weight.device,
        _tensor(weight),
        _tensor(scale),
        _tensor(threshold),
        _tensor(below),
        _tensor(equal),
    )


def perturb(weight: Tensor, plus: Tensor, minus: Tensor, seed: int, tensor_id: int, eps: float) -> None:
    """Launch the draw of z that writes ``weight + eps z`` to ``plus`` and ``weight - eps z`` to ``minus``."""
    if weight.numel() == 0:
        return
    _launch("perturb", weight.device, _tensor(weight), _tensor(plus), _tensor(minus), seed, tensor_id, eps)


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
    """Launch the reduction of recomputed attention weights to ``out`` [B, Tk]; ``partial`` is scratch."""
    if out.numel() == 0:
        return
    _launch(
        "attention_importance",
        q.device,
        _tensor(q),
        _tensor(k),
        _tensor(lse),
        _tensor(head_weight),
        _tensor(query_weight),
        _tensor(key_mask),
        _tensor(partial),
        _tensor(out),
        scale,
        of_max,
        causal,
    )


def select_tokens(score: Tensor, protected: Tensor | None, index: Tensor) -> None:
    """Launch the top-k selection that writes ascending positions to ``index`` [B, K]."""
    if index.numel() == 0:
        return
    _launch("select_tokens", score.device, _tensor(score), _tensor(protected), _tensor(index))


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
    """Launch the greedy max-min selection that writes ``kept`` [B, T]; ``gram``, ``scale``, ``closest`` are scratch."""
    if kept.numel() == 0:
        return
    _launch(
        "diverse_tokens",
        x.device,
        _tensor(x),
        _tensor(candidate),
        _tensor(keep_of_sample),
        _tensor(kept),
        _tensor(gram),
        _tensor(scale),
        _tensor(closest),
        keep,
    )


def compact_tokens(index: Tensor, tensors: Sequence[Tensor], out: Sequence[Tensor], dims: Sequence[int]) -> None:
    """Launch the gather of all tensors into ``out``."""
    kept = [_token_tensor(*each) for each in zip(tensors, out, dims, strict=True) if each[1].numel()]
    if not kept:
        return
    _launch("compact_tokens", index.device, _tensor(index), [each[0] for each in kept])


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
    """Launch the cosine matching that writes ``similarity`` and ``match`` [B, T]; all after them is scratch."""
    if match.numel() == 0:
        return
    _launch(
        "match_tokens",
        key.device,
        _tensor(key),
        _tensor(target),
        _tensor(source),
        _tensor(similarity),
        _tensor(match),
        _tensor(lists),
        _tensor(counts),
        _tensor(inverse),
        _tensor(gathered),
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
    """Launch the weighted means that write ``out`` and ``total`` [B, K]; ``lists`` and ``ends`` are scratch."""
    if index.numel() == 0:
        return
    kept = [_token_tensor(*each) for each in zip(tensors, out, dims, strict=True) if each[1].numel()]
    _launch(
        "merge_tokens",
        index.device,
        _tensor(index),
        _tensor(match),
        _tensor(size),
        _tensor(total),
        _tensor(lists),
        _tensor(ends),
        [each[0] for each in kept],
    )


def _token_tensor(tensor: Tensor, out: Tensor, dim: int) -> tuple[tuple[_Tensor, _Tensor], Tensor]:
    """Describe source and output of a gather along ``dim``; return with them the tensor to keep alive until the launch.

    The source is described as bytes, [B or 1, outer, T, inner, run] with T the dimension ``dim``. It is copied where
    the dimensions before ``dim``, or those after it and before the contiguous run, cannot be merged into one stride.
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
    read = (
        tensor.data_ptr(),
        (sizes[0], outer[0], sizes[dim], inner[0], run * size),
        (strides[0] * size, outer[1] * size, strides[dim] * size, inner[1] * size, 1),
        DTYPES.get(tensor.dtype, -1),
    )
    return (read, _tensor(out)), tensor


def _merged(sizes: Sequence[int], strides: Sequence[int]) -> tuple[int, int] | None:
    """Return size and stride of some dimensions merged into one, or None if they do not share a stride."""
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
