"""Weights and scales that are hard to sort, and what every op that prunes by ``|w| * scale`` has to do with them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from vlprune_ext import _native

ISAS = _native.build_info()["available_isas"]
NAN, INF = float("nan"), float("inf")


# ---- weights and scales ----------------------------------------------------------------------------------------------


def any_bits(shape, dtype):
    """Every finite pattern is as likely as any other: all exponents, denormals, both zeros."""
    if dtype == torch.float32:
        weight = torch.randint(-(2**31), 2**31, shape).to(torch.int32).view(dtype)
    else:
        weight = torch.randint(-(2**15), 2**15, shape).to(torch.int16).view(dtype)
    return weight.where(weight.isfinite(), torch.ones_like(weight))


def denormal(shape, dtype):
    least = torch.finfo(dtype).smallest_normal
    return ((torch.rand(shape) * 2 - 1).double() * least).to(dtype)


def signs(shape):
    return torch.randint(0, 2, shape) * 2.0 - 1


def lower_halves(shape, dtype):
    """fp32 numbers whose upper 16 bits are the same, 16-bit ones that are neighbours."""
    if dtype == torch.float32:
        return ((0x3F80 << 16) + torch.randint(0, 1 << 16, shape)).to(torch.int32).view(dtype) * signs(shape)
    return (1 + torch.randint(0, 2, shape) * torch.finfo(dtype).eps).to(dtype)


def zeros_and_some(shape, dtype):
    return torch.where(torch.rand(shape) < 0.8, 0.0 * signs(shape), torch.randn(shape)).to(dtype)


def with_infinities(shape, dtype):
    return torch.where(torch.rand(shape) < 0.3, torch.inf * signs(shape), torch.randn(shape)).to(dtype)


KINDS = {
    "random": lambda shape, dtype: torch.randn(shape).to(dtype),
    "constant": lambda shape, dtype: torch.full(shape, 0.5, dtype=dtype),
    "equal magnitudes": lambda shape, dtype: (signs(shape) * 0.25).to(dtype),
    "few values": lambda shape, dtype: (torch.randint(-3, 4, shape) / 4).to(dtype),
    "zeros": lambda shape, dtype: (signs(shape) * 0.0).to(dtype),
    "mostly zeros": zeros_and_some,
    "denormal": denormal,
    "any bits": any_bits,
    "infinite": with_infinities,
    "lower halves": lower_halves,
    "descending": lambda shape, dtype: torch.linspace(2, 1, shape[0] * shape[1]).view(shape).to(dtype),
}


def some_zero(columns, zero=0.0):
    scale = torch.rand(columns) + 0.5
    scale[torch.rand(columns) < 0.4] = zero
    return scale


SCALES = {
    "none": lambda columns: None,
    "random": lambda columns: torch.rand(columns) + 0.1,
    "some zero": some_zero,
    "some -0": lambda columns: some_zero(columns, -0.0),
    "all zero": torch.zeros,
    "tiny": lambda columns: torch.rand(columns) * 1e-40,  # denormal, and so are the products
    "huge": lambda columns: torch.rand(columns) * 3e38,  # the product overflows where |w| > 1
    "everything": lambda columns: torch.logspace(-40, 38, columns)[torch.randperm(columns)],
}


def finite_scores(kind, scale):
    """Whether no infinity meets a zero: that is an error, as the last of ``BAD`` say."""
    return kind != "infinite" or scale in ("none", "random", "huge")


def rows_far_apart(weight):
    """A copy whose last row starts past 2**31 elements."""
    out, columns = weight.shape
    stride = 2**31 // (out - 1) + 1
    storage = torch.empty((out - 1) * stride + columns, dtype=weight.dtype, device=weight.device)
    return storage.as_strided((out, columns), (stride, 1)).copy_(weight)


def nan_patterns(dtype):
    """All ones but for the sign, all ones, a signalling NaN."""
    return [0x7FFFFFFF, -1, 0x7F800001] if dtype == torch.float32 else [0x7FFF, -1, 0x7FC1]


def to(device, scale):
    return None if scale is None else scale.to(device)


def changed(values, place, value):
    values[place] = value
    return values


# ---- what is expected ------------------------------------------------------------------------------------------------


class Op(NamedTuple):
    """An op with all its parameters; each form takes a weight and a column scale."""

    name: str
    prune: Callable  # writes the weight and returns it
    mask: Callable
    dropped: Callable  # the mask that is right, on the CPU


def bits(tensor):
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def metric(weight, scale):
    """[out, in] fp32 on the CPU, where expectations are sorted: the sort on CUDA may tell -0 from +0."""
    scores = weight.cpu().float().abs()
    return scores if scale is None else scores * scale.cpu()


def assert_dropped(weight, before, dropped, what=""):
    """``weight`` is ``before`` with +0 where ``dropped``, bit for bit."""
    expected = bits(before).masked_fill(dropped.to(before.device), 0)
    assert torch.equal(bits(weight), expected), what


def check_forms(op, weight, scale, what="", dropped=None):
    """Both forms; leaves ``weight`` pruned."""
    before = weight.clone()
    dropped = op.dropped(weight, scale) if dropped is None else dropped
    what = f"{what} {op.name} {list(weight.shape)}"
    mask = op.mask(weight, scale)
    assert mask.dtype == torch.bool, what
    assert mask.device == weight.device, what
    assert torch.equal(mask.cpu(), dropped), what
    assert torch.equal(bits(weight), bits(before)), f"the mask form wrote: {what}"
    assert op.prune(weight, scale) is weight
    assert_dropped(weight, before, dropped, what)


@contextlib.contextmanager
def nothing_written_beside(view, wide, what):
    """Of ``wide``, nothing but ``view(wide)`` changes."""
    before = bits(wide).clone()
    yield
    after = bits(wide).clone()
    view(after).copy_(view(before))
    assert torch.equal(after, before), f"{what}: wrote beside the weight"


def check_compiled(prune, weight, scale):
    """``prune(weight, scale)`` writes its weight and returns two tensors: the same in one compiled graph."""
    of_compiled, of_eager = weight.clone(), weight.clone()
    compiled = torch.compile(prune, fullgraph=True, backend="aot_eager")(of_compiled, scale)
    eager = prune(of_eager, scale)
    assert torch.equal(compiled[0], eager[0])
    assert torch.equal(compiled[1], eager[1])
    assert torch.equal(bits(of_compiled), bits(of_eager))
    assert not torch.equal(of_eager, weight)


def check_cuda_graph(op, source, scale):
    """Both forms replayed, over other contents the second time."""
    weight = source.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask = op.mask(source, scale)
        weight.copy_(source)
        op.prune(weight, scale)
    for _ in range(2):
        mask.zero_()
        graph.replay()
        dropped = op.dropped(source, scale)
        assert torch.equal(mask.cpu(), dropped)
        assert_dropped(weight, source, dropped)
        source.copy_(KINDS["random"](source.shape, source.dtype))


def check_mask_past_2_31(op, row):
    """One row [1, in], expanded to a mask of more than 2**31 bytes, the weight next to nothing."""
    columns = row.shape[1]
    expected = op.dropped(row, None)[0].to(row.device)
    mask = op.mask(row.expand(2**31 // columns + 1, columns), None)
    assert mask.numel() > 2**31
    for i in (0, 1, mask.shape[0] // 2, mask.shape[0] - 2, mask.shape[0] - 1):
        assert torch.equal(mask[i], expected)


# ---- bad input -------------------------------------------------------------------------------------------------------


def good():
    return {"weight": torch.randn(3, 8), "column_scale": torch.rand(8) + 0.1}


BAD = [  # what is changed of ``good``
    ({"weight": [[1.0]]}, TypeError, r"weight is a list; expected a tensor"),
    (
        {"weight": torch.randn(3, 8).double()},
        TypeError,
        r"weight has dtype torch.float64; expected float32, float16 or",
    ),
    ({"weight": torch.ones(3, 8, dtype=torch.int32)}, TypeError, r"weight has dtype torch.int32; expected float32"),
    ({"weight": torch.randn(8)}, ValueError, r"weight has shape \[8\]; expected two dimensions \[out, in\]"),
    ({"weight": torch.randn(2, 3, 8)}, ValueError, r"weight has shape \[2, 3, 8\]; expected two dimensions"),
    ({"column_scale": torch.rand(7)}, ValueError, r"column_scale has shape \[7\]; expected \[8\] \(in, the columns of"),
    ({"column_scale": torch.rand(1, 8)}, ValueError, r"column_scale has shape \[1, 8\]; expected \[8\]"),
    ({"column_scale": torch.rand(8).half()}, TypeError, r"column_scale has dtype torch.float16; expected float32"),
    ({"column_scale": torch.rand(8).double()}, TypeError, r"column_scale has dtype torch.float64; expected float32"),
    ({"column_scale": torch.rand(8, device="meta")}, ValueError, r"column_scale is on meta; expected cpu"),
    (
        {"column_scale": torch.tensor([1, -0.5, 1, -1, 1, 1, 1, 1])},
        ValueError,
        r"column_scale\[1\] is -0.5; expected a finite number",
    ),
    (
        {"column_scale": changed(torch.ones(8), 0, NAN)},
        ValueError,
        r"column_scale\[0\] is nan; expected a finite number",
    ),
    (
        {"column_scale": changed(torch.ones(8), 7, INF)},
        ValueError,
        r"column_scale\[7\] is inf; expected a finite number",
    ),
    (
        {"weight": changed(torch.ones(3, 8), (1, 2), NAN), "column_scale": None},
        ValueError,
        r"weight\[1, 2\] is nan; expected a score \|w\| \* scale that is not NaN",
    ),
    (
        {"weight": changed(torch.ones(3, 8).bfloat16(), (2, 0), NAN), "column_scale": torch.full((8,), 0.5)},
        ValueError,
        r"weight\[2, 0\] is nan with column_scale 0.5; expected a score",
    ),
    (
        {"weight": changed(torch.ones(3, 8), (2, 6), INF), "column_scale": changed(torch.ones(8), 6, 0)},
        ValueError,
        r"weight\[2, 6\] is inf with column_scale 0.0; expected a score",
    ),
    (
        {"weight": changed(torch.ones(3, 8).half(), (0, 3), -INF), "column_scale": changed(torch.ones(8), 3, 0)},
        ValueError,
        r"weight\[0, 3\] is -inf with column_scale 0.0; expected a score",
    ),
    (  # a NaN behind an infinity that is fine
        {
            "weight": changed(changed(torch.ones(8, 3), (0, 1), INF), (1, 2), NAN).t(),
            "column_scale": torch.ones(8),
        },
        ValueError,
        r"weight\[2, 1\] is nan with column_scale 1.0; expected a score",
    ),
]


def check_refused(op, arguments, error, message):
    """Raises, and writes nothing."""
    weight = arguments["weight"]
    before = weight.clone() if isinstance(weight, torch.Tensor) else None
    with pytest.raises(error, match=message):
        op(**arguments)
    if before is not None:
        assert torch.equal(weight.contiguous().view(torch.uint8), before.contiguous().view(torch.uint8))


def check_mixed_devices(op, *parameters):
    with pytest.raises(ValueError, match=r"column_scale is on cpu; expected cuda:0"):
        op(torch.ones(3, 4, device="cuda"), torch.ones(4), *parameters)
    with pytest.raises(ValueError, match=r"column_scale is on cuda:0; expected cpu"):
        op(torch.ones(3, 4), torch.ones(4, device="cuda"), *parameters)


def check_overlapping_rows(prune, *parameters):
    """What is written in place may lie in no two rows."""
    memory = torch.randn(40)
    kept = memory.clone()
    for overlapping in (memory[:8].expand(3, 8), memory.as_strided((4, 8), (5, 1))):
        with pytest.raises(ValueError, match=r"weight has rows \d apart and 8 wide; expected no overlap"):
            prune(overlapping, None, *parameters)
    assert torch.equal(memory, kept)
