"""select_tokens: the very tokens that a stable sort puts first, as ascending positions."""

from __future__ import annotations

import itertools

import pytest
import torch
from ops.pruning import INF, ISAS, KINDS, NAN, nan_patterns, rows_far_apart, signs
from torch._dynamo.testing import CompileCounterWithBackend

from vlprune_ext import _native, ops, reference

WIDEST = 491_520  # tokens of a row that the scratch memory of csrc/cpu/select_tokens.cpp holds


def with_nan(shape, dtype):
    return torch.where(torch.rand(shape) < 0.3, NAN, KINDS["infinite"](shape, torch.float32)).to(dtype)


SCORES = {
    **KINDS,  # signed, with infinities, denormals and both zeros among them
    "NaN": lambda shape, dtype: torch.full(shape, NAN, dtype=dtype),
    "some NaN": with_nan,
    "-inf": lambda shape, dtype: torch.full(shape, -INF, dtype=dtype),
    "extremes": lambda shape, dtype: (torch.finfo(dtype).max * signs(shape)).to(dtype),
    "softmax": lambda shape, dtype: (torch.randn(shape) * 3).softmax(-1).to(dtype),
}
PROTECT = {
    "none": lambda shape, keep: None,
    "none of them": lambda shape, keep: torch.zeros(shape, dtype=torch.bool),
    "some": lambda shape, keep: torch.rand(shape) < keep / shape[1] / 2,
    "keep": lambda shape, keep: torch.rand(shape).argsort(1) < keep,
    "one less": lambda shape, keep: torch.rand(shape).argsort(1) < keep - 1,
    "one more": lambda shape, keep: torch.rand(shape).argsort(1) < keep + 1,
    "a half": lambda shape, keep: torch.rand(shape) < 0.5,
    "all": lambda shape, keep: torch.ones(shape, dtype=torch.bool),
}


def first_of_sort(score, keep, protected=None):
    """[B, keep] on the CPU, by float64 numbers among which a NaN is below -inf."""
    least = torch.finfo(torch.float64).min
    score = score.cpu().double()
    score = score.clamp(min=least).where(~score.isnan(), -torch.inf)
    order = score.sort(dim=1, descending=True, stable=True).indices
    place = torch.empty_like(order).scatter_(1, order, torch.arange(score.shape[1]).expand_as(order))
    if protected is not None:
        place = place - protected.cpu() * score.shape[1]
    return place.argsort(dim=1)[:, :keep].sort(dim=1).values


def check(score, keep, protected=None, what="", module=ops, expected=None):
    expected = first_of_sort(score, keep, protected) if expected is None else expected
    index = module.select_tokens(score, keep, protected)
    assert index.dtype == torch.int64
    assert index.device == score.device
    assert torch.equal(index.cpu(), expected), (what, keep, list(score.shape))


def some_keeps(tokens):
    return sorted({1, (tokens + 2) // 3, tokens - 1, tokens} - {0})


@pytest.mark.parametrize("kind", SCORES)
def test_equals_stable_sort(kind, dtype, device):
    for tokens, protect in itertools.product((1, 2, 63, 577), PROTECT):
        for keep in some_keeps(tokens):
            score, protected = SCORES[kind]((3, tokens), dtype), PROTECT[protect]((3, tokens), keep)
            protected = None if protected is None else protected.to(device)
            check(score.to(device), keep, protected, protect)
    score = SCORES[kind]((2, 5000), dtype).to(device)
    for keep, protect in ((1, "none"), (1250, "some"), (5000, "a half")):
        protected = PROTECT[protect]((2, 5000), keep)
        check(score, keep, None if protected is None else protected.to(device), protect)


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa, kind, dtype):
    """Rows about the width of what is converted at once."""
    for tokens, protect in itertools.product((5, 64, 65, 191, 1000), ("none", "some", "one more", "all")):
        keep = (tokens + 2) // 3
        score, protected = SCORES[kind]((2, tokens), dtype), PROTECT[protect]((2, tokens), keep)
        with _native.force_isa(isa):
            check(score, keep, protected, protect)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("isa", ISAS)
def test_every_thread_count(isa, threads, dtype):
    torch.set_num_threads(threads)
    with _native.force_isa(isa):
        for kind in ("random", "few values", "some NaN"):
            score = SCORES[kind]((23, 150), dtype)
            check(score, 70, PROTECT["some"]((23, 150), 70), kind)


@pytest.mark.parametrize("tokens", [WIDEST, WIDEST + 1])
def test_rows_wider_than_the_scratch_memory(tokens, dtype, device):
    score = torch.cat([KINDS[kind]((1, tokens), dtype) for kind in ("any bits", "few values")]).to(device)
    protected = PROTECT["some"]((2, tokens), tokens // 3).to(device)
    expected = first_of_sort(score, tokens // 3, protected)
    for isa in ISAS if device.type == "cpu" else ISAS[:1]:
        with _native.force_isa(isa):
            check(score, tokens // 3, protected, isa, expected=expected)


@pytest.mark.parametrize("kind", SCORES)
def test_reference_equals_stable_sort(kind, dtype, device):
    for protect in PROTECT:
        score, protected = SCORES[kind]((3, 40), dtype).to(device), PROTECT[protect]((3, 40), 13)
        check(score, 13, None if protected is None else protected.to(device), protect, reference)


def test_every_nan_is_the_same(dtype):
    """All of a NaN's bit patterns, with either sign: behind -inf, in the order of their positions."""
    score = torch.full((1, 40), -torch.inf, dtype=dtype)
    bits = score.view(torch.int32 if dtype == torch.float32 else torch.int16)
    for i, pattern in enumerate(nan_patterns(dtype)):
        bits[0, 9 - i] = pattern
    assert int(score.isnan().sum()) == 3
    for isa, keep in itertools.product(ISAS, (37, 38, 39)):
        with _native.force_isa(isa):
            check(score, keep, None, isa)


def test_protected_nan_comes_before_infinity(dtype, device):
    score = torch.tensor([[INF, NAN, INF, -INF]], dtype=dtype, device=device)
    protected = torch.tensor([[False, True, False, True]], device=device)
    assert [ops.select_tokens(score, keep, protected).tolist() for keep in (1, 2, 3)] == [[[3]], [[1, 3]], [[0, 1, 3]]]


def test_zeros_are_equal(dtype, device):
    score = torch.tensor([[-0.0, 0.0, -1e-7, 0.0, -0.0, 1e-7]], dtype=dtype, device=device)
    assert ops.select_tokens(score, 3).tolist() == [[0, 1, 5]]
    assert ops.select_tokens(score, 5).tolist() == [[0, 1, 3, 4, 5]]


def test_other_rows_do_not_matter(dtype, device):
    score = torch.cat([SCORES[kind]((1, 300), dtype) for kind in SCORES]).to(device)
    protected = (torch.rand(score.shape) < 0.3).to(device)
    together = ops.select_tokens(score, 90, protected)
    for i in range(score.shape[0]):
        assert torch.equal(ops.select_tokens(score[i : i + 1], 90, protected[i : i + 1])[0], together[i])


def test_strides(dtype, device):
    wide = KINDS["few values"]((12, 50), dtype).to(device)
    crowd = (torch.rand(12, 50) < 0.4).to(device)
    for view in (
        lambda t: t[2:9, 3:40],
        lambda t: t[::3, 5:6],
        lambda t: t[2:9, 3:40].t(),
        lambda t: t[1:, 1::2],
        lambda t: t[:1].expand(7, 50),
    ):
        score, protected = view(wide), view(crowd)
        for keep in some_keeps(score.shape[1]):
            check(score, keep, protected)
            check(score, keep, protected.contiguous())
            check(score.contiguous(), keep, protected)


def test_no_rows(dtype, device):
    score = torch.empty(0, 5, dtype=dtype, device=device)
    assert ops.select_tokens(score, 2, torch.empty(0, 5, dtype=torch.bool, device=device)).shape == (0, 2)


def test_a_score_with_a_gradient():
    score = torch.rand(2, 9, requires_grad=True)
    index = ops.select_tokens(score * 2, 3)
    assert not index.requires_grad
    assert torch.equal(index, first_of_sort(score.detach(), 3))


def test_opcheck(device):
    score, protected = torch.randn(4, 10, device=device).bfloat16(), torch.rand(4, 10, device=device) < 0.3
    torch.library.opcheck(torch.ops.vlprune.select_tokens, (score, 4, protected))
    torch.library.opcheck(torch.ops.vlprune.select_tokens, (score, 4))


def test_compile_fullgraph(device):
    score, protected = torch.randn(4, 10, device=device), torch.rand(4, 10, device=device) < 0.3

    def select(score, protected):
        return ops.select_tokens(score * -1, 4, protected) + 1

    compiled = torch.compile(select, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(score, protected), select(score, protected))


def test_compiled_once_for_every_keep(device):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda score: ops.select_tokens(score, score.shape[1] // 3), fullgraph=True, backend=counter, dynamic=True
    )
    for tokens in (30, 50, 71):
        score = torch.randn(2, tokens, device=device)
        assert torch.equal(compiled(score), ops.select_tokens(score, tokens // 3))
    assert counter.frame_count == 1


@pytest.mark.gpu
def test_cuda_graph(dtype):
    score = KINDS["few values"]((5, 577), dtype).cuda()
    protected = torch.rand(5, 577, device="cuda") < 0.2
    ops.select_tokens(score, 144, protected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        index = ops.select_tokens(score, 144, protected)
    for _ in range(2):
        index.zero_()
        graph.replay()
        assert torch.equal(index.cpu(), first_of_sort(score, 144, protected))
        score.copy_(torch.randn(5, 577))
        protected.copy_(torch.rand(5, 577) < 0.3)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [511, 512, 513, 2047, 2048, 2049, 4095, 4096, 4097, 8193, 100_000])
def test_every_width_of_block(tokens, dtype):
    """The widths at which the CUDA kernel changes its block or begins another round."""
    for kind, protect in itertools.product(("random", "few values", "some NaN"), ("none", "some", "one more")):
        for keep in (1, tokens // 3, tokens):
            protected = PROTECT[protect]((3, tokens), keep)
            check(SCORES[kind]((3, tokens), dtype).cuda(), keep, None if protected is None else protected.cuda())


@pytest.mark.large
def test_rows_past_2_31_elements(dtype, device):
    if dtype == torch.float32:
        pytest.skip("the 16-bit types take as many elements in half the memory")
    score = rows_far_apart(KINDS["few values"]((5, 70), dtype).to(device))
    check(score, 33, rows_far_apart((torch.rand(5, 70) < 0.3).to(device)))


# ---- bad input -------------------------------------------------------------------------------------------------------


def good():
    return {"score": torch.rand(3, 8), "keep": 2, "protected": torch.rand(3, 8) < 0.5}


BAD = [
    ({"score": [[1.0]]}, TypeError, r"score is a list; expected a tensor"),
    ({"score": torch.rand(3, 8).double()}, TypeError, r"score has dtype torch.float64; expected float32, float16 or"),
    ({"score": torch.rand(8)}, ValueError, r"score has shape \[8\]; expected two dimensions \[B, T\]"),
    ({"keep": 0}, ValueError, r"keep is 0; expected 0 < keep <= 8 \(T, the tokens of score\)"),
    ({"keep": 9}, ValueError, r"keep is 9; expected 0 < keep <= 8"),
    ({"keep": -1}, ValueError, r"keep is -1; expected 0 < keep <= 8"),
    ({"keep": 2.0}, TypeError, r"keep is 2.0; expected an int"),
    ({"score": torch.rand(3, 0)}, ValueError, r"keep is 2; expected 0 < keep <= 0"),
    ({"protected": torch.rand(3, 8)}, TypeError, r"protected has dtype torch.float32; expected bool"),
    ({"protected": torch.rand(8) < 0.5}, ValueError, r"protected has shape \[8\]; expected \[3, 8\] as score"),
    ({"protected": [True]}, TypeError, r"protected is a list; expected a tensor"),
    (
        {"protected": torch.ones(3, 8, dtype=torch.bool, device="meta")},
        ValueError,
        r"protected is on meta; expected cpu as score",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        ops.select_tokens(**{**good(), **changes})
