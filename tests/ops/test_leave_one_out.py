from __future__ import annotations

import itertools

import pytest
import torch
from ops.yardstick import assert_as_exact_as, sum_floor

from vlprune_ext import _native, ops, reference

ISAS = _native.build_info()["available_isas"]

# N, D, g, G: tiles of 14 x 32, 6 x 16 and 4 x 8 met exactly, missed by one on both sides, chunks of 256 k and more.
SHAPES = [
    (1, 1, 1, 1),
    (1, 33, 3, 5),
    (5, 17, 7, 3),
    (14, 32, 16, 2),
    (13, 31, 15, 3),
    (15, 33, 17, 2),
    (64, 96, 64, 4),
    (29, 515, 64, 3),
    (197, 130, 80, 2),
    (70, 64, 256, 1),
    (70, 40, 257, 2),
    (40, 530, 700, 1),
]


def make(n, d, g, groups, dtype, device="cpu"):
    x = torch.randn(n, groups * g, device=device).to(dtype)
    weight = torch.randn(d, groups * g, device=device).to(dtype)
    base = torch.randn(n, d, device=device).to(dtype)
    return x, weight, base


def check(x, weight, base, g, groups=None):
    actual = ops.leave_one_out(x, weight, base, g, groups)
    naive = reference.leave_one_out(x, weight, base, g, groups)
    exact = reference.leave_one_out(x.double(), weight.double(), base.double(), g, groups)
    assert_as_exact_as(actual, naive, exact, sum_floor(g))
    return actual


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference(shape, dtype, device):
    n, d, g, groups = shape
    check(*make(n, d, g, groups, dtype, device), g)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set(shape, isa, dtype):
    n, d, g, groups = shape
    with _native.force_isa(isa):
        check(*make(n, d, g, groups, dtype), g)


@pytest.mark.parametrize("groups", [[2], [3, 0], [1, 1, 1], list(range(4))], ids=str)
def test_subset_equals_rows_of_all(groups, dtype, device):
    x, weight, base = make(37, 50, 16, 4, dtype, device)
    some = ops.leave_one_out(x, weight, base, 16, groups)
    assert torch.equal(some, ops.leave_one_out(x, weight, base, 16)[groups])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("d", [400, 408, 404, 403], ids=lambda d: f"D{d}")
def test_outputs_that_outgrow_the_caches(d, isa):
    """Past 16 MB whole, aligned vectors are stored past the caches; other widths, and outputs out of step, are not."""
    n, g, groups = 701, 8, 16
    x, weight, base = make(n, d, g, groups, torch.float32)
    with _native.force_isa(isa):
        out = check(x, weight, base, g)
        for i in (0, groups - 1):
            assert torch.equal(out[i], ops.leave_one_out(x, weight, base, g, [i])[0])
        shifted = torch.full((groups * n * d + 2,), 7.0)
        _native.leave_one_out(x, weight, base, shifted[1:-1].view(groups, n, d), list(range(groups)), g)
    assert torch.equal(shifted[1:-1].view(groups, n, d), out)
    assert shifted[0] == shifted[-1] == 7


def test_more_groups_than_a_kernel_parameter_holds(device):
    x, weight, base = make(3, 5, 1, 3000, torch.float32, device)
    check(x, weight, base, 1)
    check(x, weight, base, 1, list(reversed(range(3000))))


def test_empty(dtype, device):
    x, weight, base = make(6, 5, 4, 2, dtype, device)
    assert ops.leave_one_out(x, weight, base, 4, []).shape == (0, 6, 5)
    assert ops.leave_one_out(x[:0], weight, base[:0], 4).shape == (2, 0, 5)
    assert ops.leave_one_out(x, weight[:0], base[:, :0], 4).shape == (2, 6, 0)


@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_for_every_thread_count(isa, threads, dtype):
    x, weight, base = make(150, 70, 300, 3, dtype)
    with _native.force_isa(isa):
        torch.set_num_threads(1)
        one = ops.leave_one_out(x, weight, base, 300)
        torch.set_num_threads(threads)
        assert torch.equal(one, ops.leave_one_out(x, weight, base, 300))


def test_same_bits_on_every_run(dtype, device):
    x, weight, base = make(150, 70, 64, 3, dtype, device)
    assert torch.equal(ops.leave_one_out(x, weight, base, 64), ops.leave_one_out(x, weight, base, 64))


def test_strides(dtype, device):
    """Rows far apart, an odd start, a transposed weight, a base of one row for all: the same as contiguous copies."""
    wide = torch.randn(21, 400, device=device).to(dtype)
    x = wide[:, 3 : 3 + 48]
    weight = torch.randn(48, 19, device=device).to(dtype).t()
    base = torch.randn(1, 19, device=device).to(dtype).expand(21, 19)
    strided = ops.leave_one_out(x, weight, base, 16)
    assert torch.equal(strided, ops.leave_one_out(x.contiguous(), weight.contiguous(), base.contiguous(), 16))
    check(x, weight, base, 16)
    last_apart = torch.randn(21, 96, device=device).to(dtype)[:, ::2]
    check(last_apart, weight, base, 16)


def test_not_finite_stays_where_it_is(dtype, device):
    x, weight, base = make(20, 40, 8, 3, dtype, device)
    x[4, 9] = float("nan")  # group 1
    base[7, 11] = float("inf")
    out = ops.leave_one_out(x, weight, base, 8)
    expected = torch.zeros(3, 20, 40, dtype=torch.bool)
    expected[1, 4] = True
    assert torch.equal(out.isnan().cpu(), expected)
    assert bool((out[:, 7, 11] == float("inf")).all())


@pytest.mark.parametrize("isa", ISAS)
def test_rounds_once_to_nearest_even(isa):
    """base - 0: every value of a 16-bit dtype comes back, and sums halfway between two go to the even one."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        base = every.view(dtype)[:, None]
        zeros = torch.zeros(base.shape[0], 1, dtype=dtype)
        with _native.force_isa(isa):
            out = ops.leave_one_out(zeros, torch.zeros(1, 1, dtype=dtype), base, 1)[0]
            number = ~base.isnan()
            assert torch.equal(out[number], base[number])
            assert bool(out[~number].isnan().all())
            # base - x * 1 for random pairs: one rounding of the fp32 difference, as torch rounds it.
            x, b = torch.randn(4097, 1).to(dtype), (torch.randn(4097, 1) * 30).to(dtype)
            rounded = ops.leave_one_out(x, torch.ones(1, 1, dtype=dtype), b, 1)[0]
            assert torch.equal(rounded, (b.float() - x.float()).to(dtype))
            tiny = (torch.randn(4097, 1) * 2.0**-17).to(dtype)  # subnormal in fp16
            rounded = ops.leave_one_out(tiny, torch.ones(1, 1, dtype=dtype), tiny.flip(0), 1)[0]
            assert torch.equal(rounded, (tiny.flip(0).float() - tiny.float()).to(dtype))


def test_opcheck(dtype, device):
    x, weight, base = make(9, 10, 4, 3, dtype, device)
    for groups in (None, [2, 0]):
        torch.library.opcheck(torch.ops.vlprune.leave_one_out, (x, weight, base, 4, groups))


def test_compile_fullgraph(device):
    x, weight, base = make(9, 10, 4, 3, torch.float32, device)

    def scores(x, weight, base):
        return ops.leave_one_out(x * 2, weight, base, 4, [0, 2]).square().mean(dim=(1, 2))

    compiled = torch.compile(scores, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, base), scores(x, weight, base))


@pytest.mark.gpu
def test_cuda_graph(dtype):
    x, weight, base = make(40, 50, 16, 3, dtype, "cuda")
    expected = ops.leave_one_out(x, weight, base, 16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.leave_one_out(x, weight, base, 16)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
    x.mul_(2)
    graph.replay()
    assert torch.equal(out, ops.leave_one_out(x, weight, base, 16))


@pytest.mark.gpu
def test_current_stream():
    """The kernel waits for what the stream it was called on did before."""
    x, weight, base = make(64, 64, 16, 4, torch.float32, "cuda")
    expected = ops.leave_one_out(x * 3, weight, base, 16)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        tripled = x * 3
        out = ops.leave_one_out(tripled, weight, base, 16)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.large
def test_output_past_2_31_elements(device):
    """[V, N, D] of 2**31 + 2**20 fp16 elements (4.3 GB), and rows of x that lie past 2**31 elements."""
    d, n = 4096, 1024
    v = 2**31 // (n * d) + 1
    x, weight, base = make(n, d, 2, 3, torch.float16, device)
    groups = [i % 3 for i in range(v)]
    out = ops.leave_one_out(x, weight, base, 2, groups)
    assert out.numel() > 2**31
    expected = ops.leave_one_out(x, weight, base, 2)
    for i in (0, 1, v // 2, v - 2, v - 1):
        assert torch.equal(out[i], expected[groups[i]])
    del out
    stride = 2**31 // (n - 1) + 1
    apart = torch.empty((n - 1) * stride + 6, dtype=torch.float16, device=device).as_strided((n, 6), (stride, 1))
    apart.copy_(x)
    assert torch.equal(ops.leave_one_out(apart, weight, base, 2), expected)


def bad(**changes):
    """Arguments of a good call with some replaced."""
    arguments = {"x": torch.randn(4, 6), "weight": torch.randn(5, 6), "base": torch.randn(4, 5), "group_size": 3}
    return {**arguments, **changes}


BAD = [
    (bad(x=torch.randn(6)), ValueError, r"x has shape \[6\]; expected two dimensions"),
    (bad(x=torch.randn(2, 4, 6)), ValueError, r"x has shape \[2, 4, 6\]; expected two dimensions"),
    (bad(weight=torch.randn(5, 7)), ValueError, r"weight has shape \[5, 7\]; expected \[D, 6\]"),
    (bad(base=torch.randn(4, 6)), ValueError, r"base has shape \[4, 6\]; expected \[4, 5\]"),
    (bad(base=torch.randn(3, 5)), ValueError, r"base has shape \[3, 5\]; expected \[4, 5\]"),
    (
        bad(x=torch.randn(4, 0), weight=torch.randn(5, 0)),
        ValueError,
        r"x has shape \[4, 0\]; expected at least one col",
    ),
    (bad(group_size=4), ValueError, r"group_size is 4; expected a divisor of x's 6 columns"),
    (bad(group_size=0), ValueError, r"group_size is 0; expected at least 1"),
    (bad(group_size=-3), ValueError, r"group_size is -3; expected at least 1"),
    (bad(groups=[0, 2]), ValueError, r"groups\[1\] is 2; expected 0 <= group < 2"),
    (bad(groups=[-1]), ValueError, r"groups\[0\] is -1; expected 0 <= group < 2"),
    (bad(x=torch.randn(4, 6).double()), TypeError, r"x has dtype torch.float64; expected float32, float16 or bfloat16"),
    (bad(weight=torch.randn(5, 6).half()), TypeError, r"weight has dtype torch.float16; expected torch.float32 as x"),
    (bad(base=torch.zeros(4, 5, dtype=torch.int64)), TypeError, r"base has dtype torch.int64; expected torch.float32"),
    (bad(x=[[1.0]]), TypeError, r"x is a list; expected a tensor"),
    (bad(weight=torch.randn(5, 6, device="meta")), ValueError, r"weight is on meta; expected cpu as x"),
    (bad(groups=torch.tensor([0])), TypeError, r"groups is a Tensor; expected None or a sequence of int"),
    (bad(groups=[0.5]), TypeError, r"groups\[0\] is 0.5; expected an int"),
    (bad(group_size=1.5), TypeError, r"group_size is 1.5; expected an int"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.leave_one_out(**arguments)


@pytest.mark.gpu
def test_mixed_devices():
    x, weight, base = make(4, 5, 3, 2, torch.float32)
    for moved in itertools.product([False, True], repeat=3):
        if len(set(moved)) == 1:
            continue
        tensors = [t.cuda() if m else t for t, m in zip((x, weight, base), moved, strict=True)]
        with pytest.raises(ValueError, match=r"(weight|base) is on .*; expected .* as x"):
            ops.leave_one_out(*tensors, 3)
