"""The attention that each key receives, as an op that stores no attention map.

The schema, one function that checks the arguments and allocates the output (also the fake kernel), the implementation,
and the public function.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _native
from .checks import check_beside, check_tensors, expect_tensors, rows, shape

__all__ = ["attention_importance"]

_library = torch.library.Library("vlprune", "FRAGMENT")
_library.define(
    "attention_importance(Tensor q, Tensor k, Tensor lse, Tensor? head_weight, Tensor? query_weight, str reduce,"
    " bool causal, Tensor? key_mask, float scale) -> Tensor"
)

REDUCTIONS = ("sum", "max")
_CPU_QUERIES = 144  # queries per part, enough to amortise packing a block of keys
_CUDA_KEYS, _CUDA_QUERIES = 128, {"sum": 128, "max": 64}  # tile sizes
_CUDA_BLOCKS = 1024  # thread blocks per sample: about four per resident slot on a large GPU
_CUDA_STEPS = {"sum": 2, "max": 1}  # tiles per thread block at least, so that loads and sums overlap


def _attention_importance_out(
    q: Tensor,  # [B, H, Tq, d]
    k: Tensor,  # [B, Hkv, Tk, d]
    lse: Tensor,  # [B, H, Tq] fp32
    head_weight: Tensor | None,  # [B or 1, H] fp32
    query_weight: Tensor | None,  # [B, Tq] fp32
    reduce: str,
    causal: bool,
    key_mask: Tensor | None,  # [B, Tk] bool
    scale: float,
) -> Tensor:  # [B, Tk] fp32, not filled
    check_tensors(q=q, k=k)
    for name, tensor, expected in (("q", q, "[B, H, Tq, d]"), ("k", k, "[B, Hkv, Tk, d]")):
        if tensor.dim() != 4:
            raise ValueError(f"{name} has shape {shape(tensor)}; expected four dimensions {expected}")
    b, h, tq, d = q.shape
    _, hkv, tk, _ = k.shape
    if h < 1 or d < 1:
        raise ValueError(f"q has shape {shape(q)}; expected at least one head of at least one number")
    if k.shape[0] != b or k.shape[3] != d:
        raise ValueError(f"k has shape {shape(k)}; expected [{b}, Hkv, Tk, {d}], the batch and head size of q")
    if hkv < 1 or h % hkv != 0:
        raise ValueError(f"k has shape {shape(k)}; expected a number of heads that divides q's {h}")
    check_beside("lse", lse, torch.float32, [[b, h, tq]], "one for each row of q", "q", q)
    if head_weight is not None:
        check_beside("head_weight", head_weight, torch.float32, [[b, h], [1, h]], "the heads of q", "q", q)
    if query_weight is not None:
        check_beside("query_weight", query_weight, torch.float32, [[b, tq]], "the queries", "q", q)
    if key_mask is not None:
        check_beside("key_mask", key_mask, torch.bool, [[b, tk]], "the keys", "q", q)
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce is {reduce!r}; expected 'sum' or 'max'")
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; expected a finite number")
    return q.new_empty((b, tk), dtype=torch.float32)


def _parts(q: Tensor, k: Tensor, reduce: str) -> int:
    """Into how many parts the queries are split (for a sum on CUDA: the queries of all heads).

    By the shapes of one sample only, so that its sums are the same beside any other.
    """
    h, tq, tk = q.shape[1], q.shape[2], k.shape[2]
    if tq <= _native.FEW_QUERIES:
        return 1
    if not _native.is_cuda(q.device):
        return -(-tq // _CPU_QUERIES)
    steps = -(-tq // _CUDA_QUERIES[reduce]) * (h if reduce == "sum" else 1)
    of_a_block = max(_CUDA_STEPS[reduce], -(-steps * -(-tk // _CUDA_KEYS) // _CUDA_BLOCKS))
    return -(-steps // of_a_block)


def _attention_importance(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    head_weight: Tensor | None,
    query_weight: Tensor | None,
    reduce: str,
    causal: bool,
    key_mask: Tensor | None,
    scale: float,
) -> Tensor:
    out = _attention_importance_out(q, k, lse, head_weight, query_weight, reduce, causal, key_mask, scale)
    if q.shape[2] == 0:
        return out.zero_()
    parts = _parts(q, k, reduce)
    partial = out[None] if parts == 1 else out.new_empty((parts, *out.shape))
    _native.attention_importance(
        rows(q),
        rows(k),
        lse.contiguous(),
        None if head_weight is None else head_weight.contiguous(),
        None if query_weight is None else query_weight.contiguous(),
        None if key_mask is None else key_mask.contiguous(),
        partial,
        out,
        scale,
        reduce == "max",
        causal,
    )
    return out


def attention_importance(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    head_weight: Tensor | None = None,
    query_weight: Tensor | None = None,
    reduce: str = "sum",
    causal: bool = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return the attention each key receives: ``out_bj = sum_i query_weight_bi R_h(head_weight_h p_bhij)``.

    R is the sum or maximum over heads, p the attention weights, recomputed from q, k and the log-sum-exp that flash
    attention returns: ``p_bhij = exp(scale <q_bhi, k_bhj> - lse_bhi)``. No attention map is stored; memory beyond the
    result is O(Tk). The mean over heads of a last row ranks the visual tokens of FastV (arXiv 2403.06764, section 4.1);
    query_weight selects rows. No gradient.

    Parameters
    ----------
    q : Tensor [B, H, Tq, d], fp32/fp16/bf16
        Queries, after any rotary embedding. Any strides; a last dimension that is not contiguous is copied.
    k : Tensor [B, Hkv, Tk, d], dtype of q
        Keys, likewise. Hkv divides H; query head h reads key head ``h // (H / Hkv)``.
    lse : Tensor [B, H, Tq], fp32
        Natural log-sum-exp of each row's logits under the same masking. -inf marks a row whose keys are all masked: it
        contributes 0. p is not normalised again.
    head_weight : Tensor [B or 1, H], fp32, optional
        All 1 by default. May be negative: the maximum is that of the weighted values.
    query_weight : Tensor [B, Tq], fp32, optional
        All 1 by default.
    reduce : {"sum", "max"}
        R, over the heads.
    causal : bool
        Query i attends to keys j <= i + Tk - Tq; the last one to all. p is 0 elsewhere.
    key_mask : Tensor [B, Tk], bool, optional
        True for keys that were attended; p is 0 elsewhere.
    scale : float, optional
        Factor of the logits, d**-0.5 by default.

    Returns
    -------
    Tensor [B, Tk], fp32
        Logits, p and sums are fp32; bitwise reproducible on every run and thread count, whatever else is in the batch.

    Raises
    ------
    TypeError
        A dtype that is not supported.
    ValueError
        Shapes or devices that do not fit, an unknown reduce, a scale that is not finite.
    """
    expect_tensors(q=q, k=k, lse=lse)
    for name, tensor in (("head_weight", head_weight), ("query_weight", query_weight), ("key_mask", key_mask)):
        if tensor is not None:
            expect_tensors(**{name: tensor})
    if not isinstance(reduce, str):
        raise TypeError(f"reduce is {reduce!r}; expected 'sum' or 'max'")
    if not isinstance(causal, bool):
        raise TypeError(f"causal is {causal!r}; expected a bool")
    if scale is None:
        scale = max(q.shape[-1], 1) ** -0.5 if q.dim() > 0 else 1.0
    elif isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale is {scale!r}; expected a number")
    return torch.ops.vlprune.attention_importance(
        q.detach(),
        k.detach(),
        lse.detach(),
        None if head_weight is None else head_weight.detach(),
        None if query_weight is None else query_weight.detach(),
        reduce,
        causal,
        key_mask,
        float(scale),
    )


_library.impl("attention_importance", _attention_importance, "CPU")
_library.impl("attention_importance", _attention_importance, "CUDA")
torch.library.register_fake("vlprune::attention_importance", _attention_importance_out, lib=_library)
