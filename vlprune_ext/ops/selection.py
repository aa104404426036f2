"""Ops that select the tokens to keep: by score, or by diversity.

For each op: the schema, one function that checks the arguments and allocates the output (also the fake kernel), the
implementation, and the public function.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from .checks import INT32_MAX, check_beside, check_tensors, expect_int, expect_tensors, rows, shape

__all__ = ["diverse_tokens", "select_tokens"]

_library = torch.library.Library("vlprune", "FRAGMENT")
_library.define("select_tokens(Tensor score, SymInt keep, Tensor? protected=None) -> Tensor")
_library.define("diverse_tokens(Tensor x, SymInt keep, Tensor? keep_of_sample=None, Tensor? candidate=None) -> Tensor")

_GRAM_BYTES = 256 << 20  # Gram matrices held at a time; one sample's may be larger


# ---- select_tokens ---------------------------------------------------------------------------------------------------


def _selected(
    score: Tensor,  # [B, T]
    keep: int,
    protected: Tensor | None = None,  # [B, T]
) -> Tensor:  # [B, keep] int64, not filled
    check_tensors(score=score)
    if score.dim() != 2:
        raise ValueError(f"score has shape {shape(score)}; expected two dimensions [B, T]")
    if score.shape[0] > INT32_MAX or score.shape[1] > INT32_MAX:
        raise ValueError(f"score has shape {shape(score)}; expected fewer than 2**31 rows and 2**31 tokens")
    if not 0 < keep <= score.shape[1]:
        raise ValueError(f"keep is {keep}; expected 0 < keep <= {score.shape[1]} (T, the tokens of score)")
    if protected is not None:
        if protected.dtype != torch.bool:
            raise TypeError(f"protected has dtype {protected.dtype}; expected bool")
        if protected.shape != score.shape:
            raise ValueError(f"protected has shape {shape(protected)}; expected {shape(score)} as score")
        if protected.device != score.device:
            raise ValueError(f"protected is on {protected.device}; expected {score.device} as score")
    return score.new_empty((score.shape[0], keep), dtype=torch.int64)


def _select_tokens(score: Tensor, keep: int, protected: Tensor | None = None) -> Tensor:
    index = _selected(score, keep, protected)
    _native.select_tokens(rows(score), None if protected is None else rows(protected), index)
    return index


def select_tokens(score: Tensor, keep: int, protected: Tensor | None = None) -> Tensor:
    """Return the positions of the ``keep`` tokens of highest score of each row, ascending.

    Exactly those that a stable sort puts first: ties go to the lower position, whatever the other rows hold. No
    host-device synchronisation: a CUDA graph may capture it.

    Parameters
    ----------
    score : Tensor [B, T], fp32/fp16/bf16
        The highest are kept. -0 equals +0; a NaN ranks below everything, -inf included.
    keep : int
        K, 0 < keep <= T.
    protected : Tensor [B, T], bool, optional
        True for tokens that rank above all others, whatever their scores. If they are more than ``keep``, those of
        highest score among them are kept.

    Returns
    -------
    Tensor [B, K], int64
        For :func:`compact_tokens`.

    Raises
    ------
    TypeError
        A dtype that is not supported.
    ValueError
        Shapes or devices that do not fit, keep out of range.
    """
    expect_tensors(score=score)
    if protected is not None:
        expect_tensors(protected=protected)
    return torch.ops.vlprune.select_tokens(score.detach(), expect_int("keep", keep), protected)


_library.impl("select_tokens", _select_tokens, "CPU")
_library.impl("select_tokens", _select_tokens, "CUDA")
torch.library.register_fake("vlprune::select_tokens", _selected, lib=_library)


# ---- diverse_tokens --------------------------------------------------------------------------------------------------


def _diverse(
    x: Tensor,  # [B, T, d]
    keep: int,
    keep_of_sample: Tensor | None = None,  # [B], instead of keep
    candidate: Tensor | None = None,  # [B, T]
) -> Tensor:  # [B, T] bool, not filled
    check_tensors(x=x)
    if x.dim() != 3:
        raise ValueError(f"x has shape {shape(x)}; expected three dimensions [B, T, d]")
    if x.shape[2] < 1:
        raise ValueError(f"x has shape {shape(x)}; expected tokens of at least one number")
    if keep < 0:
        raise ValueError(f"keep is {keep}; expected keep >= 0")
    for name, tensor, dtype, sizes, what in (
        ("keep", keep_of_sample, torch.int64, x.shape[:1], "the samples of x"),
        ("candidate", candidate, torch.bool, x.shape[:2], "the tokens of x"),
    ):
        if tensor is not None:
            check_beside(name, tensor, dtype, [list(sizes)], what, "x", x)
    return x.new_empty(x.shape[:2], dtype=torch.bool)


def _check_keep(keep_of_sample: Tensor) -> None:
    """Raise ValueError for a negative count, on the host only, where reading is cheap."""
    if keep_of_sample.device.type != "cpu" or bool((keep_of_sample >= 0).all()):
        return
    sample = int((keep_of_sample < 0).nonzero()[0])
    raise ValueError(f"keep[{sample}] is {int(keep_of_sample[sample])}; expected keep >= 0")


def _diverse_tokens(
    x: Tensor, keep: int, keep_of_sample: Tensor | None = None, candidate: Tensor | None = None
) -> Tensor:
    kept = _diverse(x, keep, keep_of_sample, candidate)
    if keep_of_sample is not None:
        _check_keep(keep_of_sample)
    batch, tokens = kept.shape
    if kept.numel() == 0:
        return kept
    x = rows(x)
    step = min(batch, max(1, _GRAM_BYTES // (4 * tokens**2)))
    gram = x.new_empty((step, tokens, tokens), dtype=torch.float32)
    scale, closest = x.new_empty((2, step, tokens), dtype=torch.float32)
    for first in range(0, batch, step):
        some = slice(first, first + step)
        _native.diverse_tokens(
            x[some],
            keep,
            None if keep_of_sample is None else keep_of_sample[some].contiguous(),
            None if candidate is None else candidate[some].contiguous(),
            gram,
            scale,
            closest,
            kept[some],
        )
    return kept


def diverse_tokens(x: Tensor, keep: int | Tensor, *, candidate: Tensor | None = None) -> Tensor:
    """Return the mask of tokens kept by greedy max-min selection on cosine distance (DivPrune, arXiv 2503.02175).

    The first is the candidate whose least distance to another candidate is greatest; each next one is the candidate
    whose least distance to those kept so far is greatest. Ties go to the lower position. No host-device
    synchronisation: a CUDA graph may capture it. No gradient.

    Parameters
    ----------
    x : Tensor [B, T, d], fp32/fp16/bf16
        Features to compare. Any strides; a last dimension that is not contiguous is copied.
    keep : int, or Tensor [B], int64
        How many, of every sample or of each; at least 0. A sample with fewer candidates keeps them all. A tensor on a
        GPU is not read by the host: there less than 0 keeps none.
    candidate : Tensor [B, T], bool, optional
        True for the tokens that may be kept; all by default. Distances to others are ignored.

    Returns
    -------
    Tensor [B, T], bool
        True for kept tokens. Bitwise reproducible on every run and thread count, whatever else is in the batch, and
        wherever tokens that are no candidates lie between.

    Raises
    ------
    TypeError
        A dtype that is not supported.
    ValueError
        Shapes or devices that do not fit, a negative keep.

    Notes
    -----
    Products and squares are summed in fp32. A token whose squares sum to less than 2**-126 has distance 1 to every
    other. One with a NaN, or whose squares sum to 2**126 or more, has no direction: it is compared with none and ranks
    behind all others, by position. Memory beyond the result is 4 T**2 bytes a sample, for as many samples at a time as
    256 MB hold.
    """
    expect_tensors(x=x)
    if candidate is not None:
        expect_tensors(candidate=candidate)
    if isinstance(keep, Tensor):
        return torch.ops.vlprune.diverse_tokens(x.detach(), 0, keep, candidate)
    return torch.ops.vlprune.diverse_tokens(x.detach(), expect_int("keep", keep), None, candidate)


_library.impl("diverse_tokens", _diverse_tokens, "CPU")
_library.impl("diverse_tokens", _diverse_tokens, "CUDA")
torch.library.register_fake("vlprune::diverse_tokens", _diverse, lib=_library)
