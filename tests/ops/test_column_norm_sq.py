from __future__ import annotations

import pytest
import torch
from ops.yardstick import assert_as_exact_as, sum_floor

from vlprune_ext import _native, ops, reference

ISAS = _native.build_info()["available_isas"]
CHUNK = _native.NORM_CHUNK  # rows

# N, in: chunks of 128 rows, taken by fours; stripes of 2,048 columns; vectors of 8 and 16: met and missed by one.
SHAPES = [
    (1, 1),
    (5, 1),
    (300, 1),
    (3, 17),
    (4, 16),
    (127, 33),
    (128, 64),
    (129, 31),
    (131, 2048),
    (260, 2049),
    (37, 4100),
    (1000, 7),
]


def make(n, columns, dtype, device="cpu", weighed=True):
    """acc, x, token_weight (some 0)."""
    x = torch.randn(n, columns, device=device).to(dtype)
    weight = torch.rand(n, device=device)
    weight[torch.rand(n, device=device) < 0.3] = 0
    return torch.rand(columns, device=device), x, weight if weighed else None


def check(acc, x, weight):
    naive = reference.column_norm_sq_(acc.clone(), x, weight)
    exact = reference.column_norm_sq_(acc.double(), x, None if weight is None else weight.double())
    result = ops.column_norm_sq_(acc, x, weight)
    assert result is acc
    # Terms of one sign, one after the other within a chunk: four times the usual rounding of such a sum.
    largest = float(exact.max()) if exact.numel() else 0.0
    assert_as_exact_as(acc, naive, exact, sum_floor(1, 0.67 * largest * min(max(x.shape[0], 1), CHUNK) ** 0.5))
    return acc


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference(shape, weighed, dtype, device):
    check(*make(*shape, dtype, device, weighed))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set(shape, isa, dtype):
    with _native.force_isa(isa):
        check(*make(*shape, dtype))
        check(*make(*shape, dtype, weighed=False))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_whole_numbers_are_exact(shape, isa, dtype):
    """Sums that fp32 holds: each term is there once, with its own weight."""
    n, columns = shape
    x, weight = torch.randint(-5, 6, shape), torch.randint(0, 4, (n,))
    acc = torch.arange(columns) % 1000
    with _native.force_isa(isa):
        actual = ops.column_norm_sq_(acc.float(), x.to(dtype), weight.float())
        alone = ops.column_norm_sq_(acc.float(), x.to(dtype))
    assert torch.equal(actual.long(), acc + (weight[:, None] * x.square()).sum(0))
    assert torch.equal(alone.long(), acc + x.square().sum(0))


def test_whole_numbers_on_any_device(dtype, device):
    for n, columns in SHAPES:
        x, weight = torch.randint(-5, 6, (n, columns)), torch.randint(0, 4, (n,))
        actual = ops.column_norm_sq_(torch.ones(columns, device=device), x.to(device, dtype), weight.float().to(device))
        assert torch.equal(actual.cpu().long(), 1 + (weight[:, None] * x.square()).sum(0)), (n, columns)


@pytest.mark.parametrize("weighed", [False, True])
def test_accumulates(weighed, dtype, device):
    """Batch after batch is all in one, to the bit where batches are whole chunks; acc only grows by what x adds."""
    acc, x, weight = make(5 * CHUNK + 9, 70, dtype, device, weighed)
    whole = ops.column_norm_sq_(acc.clone(), x, weight)
    for first, last in ((0, 2 * CHUNK), (2 * CHUNK, 3 * CHUNK), (3 * CHUNK, x.shape[0])):
        ops.column_norm_sq_(acc, x[first:last], None if weight is None else weight[first:last])
    assert torch.equal(acc, whole)


def test_a_weight_of_zero_leaves_a_token_out(dtype, device):
    acc, x, weight = make(200, 40, dtype, device)
    kept = weight > 0
    assert 0 < int(kept.sum()) < 200
    x[~kept] = torch.finfo(dtype).max  # its square overflows
    expected = ops.column_norm_sq_(acc.clone(), x.where(kept[:, None], 0), weight)
    assert torch.equal(ops.column_norm_sq_(acc, x, weight), expected)
    assert bool(acc.isfinite().all())


def test_ones_are_no_weights(dtype, device):
    acc, x, _ = make(200, 40, dtype, device)
    weighed = ops.column_norm_sq_(acc.clone(), x, torch.ones(200, device=device))
    assert torch.equal(weighed, ops.column_norm_sq_(acc, x))


def test_not_finite_stays_in_its_column(dtype, device):
    _, x, _ = make(20, 40, dtype, device)
    x[3, 7], x[4, 9], x[5, 30] = float("nan"), float("inf"), -float("inf")
    acc = ops.column_norm_sq_(torch.zeros(40, device=device), x)
    assert acc.isnan().nonzero().flatten().tolist() == [7]
    assert acc.isinf().nonzero().flatten().tolist() == [9, 30]
    weight = torch.ones(20, device=device)
    weight[3:6] = 0  # 0 * infinity: no number, as documented
    acc = ops.column_norm_sq_(torch.zeros(40, device=device), x, weight)
    assert acc.isnan().nonzero().flatten().tolist() == [7, 9, 30]


def test_strides(dtype, device):
    """Rows far apart, an odd start, a transposed x, every other column, one row for all, a strided token weight."""
    wide = torch.randn(60, 90, device=device).to(dtype)
    views = (wide[2:50, 3:64], wide[::7, 1:34], wide[:, 5:40].t(), wide[:, 1::2], wide[:1].expand(60, 90), wide[:, 3:4])
    for x in views:
        weight = torch.rand(2 * x.shape[0], device=device)[::2]
        acc = torch.rand(x.shape[1], device=device)
        plain = ops.column_norm_sq_(acc.clone(), x.clone(memory_format=torch.contiguous_format), weight.clone())
        assert torch.equal(check(acc, x, weight), plain)


def test_writes_acc_only(dtype, device):
    _, x, weight = make(150, 33, dtype, device)
    room = torch.zeros(37, device=device)
    before = x.clone(), weight.clone()
    ops.column_norm_sq_(room[2:35], x, weight)
    assert bool((room[2:35] > 0).all())
    assert room[[0, 1, 35, 36]].tolist() == [0] * 4
    assert torch.equal(x, before[0])
    assert torch.equal(weight, before[1])


def test_empty(dtype, device):
    acc = torch.rand(5, device=device)
    before = acc.clone()
    x = torch.empty(0, 5, dtype=dtype, device=device)
    assert ops.column_norm_sq_(acc, x) is acc
    ops.column_norm_sq_(acc, x, torch.empty(0, device=device))
    assert torch.equal(acc, before)
    assert ops.column_norm_sq_(acc[:0], x.view(5, 0) if x.numel() else x.reshape(0, 5)[:, :0]).shape == (0,)


@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_for_every_thread_count(isa, threads, dtype):
    for n, columns in ((700, 50), (300, 4500)):
        acc, x, weight = make(n, columns, dtype)
        with _native.force_isa(isa):
            torch.set_num_threads(1)
            one = ops.column_norm_sq_(acc.clone(), x, weight)
            torch.set_num_threads(threads)
            assert torch.equal(one, ops.column_norm_sq_(acc, x, weight))


def test_same_bits_on_every_run(dtype, device):
    acc, x, weight = make(2000, 70, dtype, device)
    assert torch.equal(ops.column_norm_sq_(acc.clone(), x, weight), ops.column_norm_sq_(acc, x, weight))


def test_opcheck(dtype, device):
    acc, x, weight = make(9, 10, dtype, device)
    torch.library.opcheck(torch.ops.vlprune.column_norm_sq_, (acc, x, weight))
    torch.library.opcheck(torch.ops.vlprune.column_norm_sq_, (acc, x))


def test_compile_fullgraph(device):
    acc, x, weight = make(9, 10, torch.float32, device)

    def scale(acc, x, weight):
        ops.column_norm_sq_(acc, x * 2, weight)
        return acc.sqrt()

    of_eager = acc.clone()
    expected = scale(of_eager, x, weight)
    actual = torch.compile(scale, fullgraph=True, backend="aot_eager")(acc, x, weight)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(acc, of_eager)


@pytest.mark.gpu
def test_cuda_graph(dtype):
    _, x, weight = make(400, 50, dtype, "cuda")
    acc = torch.zeros(50, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.column_norm_sq_(acc, x, weight)
    for _ in range(2):
        acc.zero_()
        graph.replay()
        assert torch.equal(acc, ops.column_norm_sq_(torch.zeros(50, device="cuda"), x, weight))
        x.mul_(2)


@pytest.mark.large
def test_x_past_2_31_elements(device):
    """Rows that lie far apart; then 2**31 + 2**16 elements, one row expanded."""
    stride = 2**31 // 4 + 1
    apart = torch.empty(4 * stride + 70, dtype=torch.bfloat16, device=device).as_strided((5, 70), (stride, 1))
    apart.copy_(torch.randn(5, 70))
    expected = ops.column_norm_sq_(torch.zeros(70, device=device), apart.contiguous())
    assert torch.equal(ops.column_norm_sq_(torch.zeros(70, device=device), apart), expected)
    del apart
    columns = 1 << 16
    row = (torch.arange(columns) % 4).to(device, torch.float16)
    n = 2**31 // columns + 1
    acc = ops.column_norm_sq_(torch.zeros(columns, device=device), row.expand(n, columns))
    assert torch.equal(acc, row.float().square() * n)


def bad(**changes):
    """Arguments of a good call with some replaced."""
    return {"acc": torch.zeros(4), "x": torch.randn(3, 4), "token_weight": torch.rand(3), **changes}


BAD = [
    (bad(acc=[0.0]), TypeError, r"acc is a list; expected a tensor"),
    (bad(x=[[0.0]]), TypeError, r"x is a list; expected a tensor"),
    (bad(x=torch.randn(3, 4).double()), TypeError, r"x has dtype torch.float64; expected float32, float16 or bfloat16"),
    (bad(x=torch.randn(4)), ValueError, r"x has shape \[4\]; expected two dimensions \[N, in\]"),
    (bad(x=torch.randn(2, 3, 4)), ValueError, r"x has shape \[2, 3, 4\]; expected two dimensions"),
    (bad(acc=torch.zeros(4).double()), TypeError, r"acc has dtype torch.float64; expected float32"),
    (
        bad(acc=torch.zeros(4).half(), x=torch.randn(3, 4).half()),
        TypeError,
        r"acc has dtype torch.float16; expected fl",
    ),
    (bad(acc=torch.zeros(3)), ValueError, r"acc has shape \[3\]; expected \[4\] \(in, the columns of x\)"),
    (bad(acc=torch.zeros(1, 4)), ValueError, r"acc has shape \[1, 4\]; expected \[4\]"),
    (bad(acc=torch.zeros(4, device="meta")), ValueError, r"acc is on meta; expected cpu"),
    (bad(acc=torch.zeros(8)[::2]), ValueError, r"acc has a stride of 2; expected a contiguous tensor"),
    (bad(acc=torch.zeros(1).expand(4)), ValueError, r"acc has a stride of 0; expected a contiguous tensor"),
    (bad(token_weight=torch.rand(3).double()), TypeError, r"token_weight has dtype torch.float64; expected float32"),
    (bad(token_weight=torch.ones(3, dtype=torch.bool)), TypeError, r"token_weight has dtype torch.bool; expected fl"),
    (bad(token_weight=torch.rand(4)), ValueError, r"token_weight has shape \[4\]; expected \[3\] \(N, the rows of x\)"),
    (bad(token_weight=torch.rand(3, 1)), ValueError, r"token_weight has shape \[3, 1\]; expected \[3\]"),
    (bad(token_weight=torch.rand(3, device="meta")), ValueError, r"token_weight is on meta; expected cpu"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.column_norm_sq_(**arguments)
    acc = arguments["acc"]
    if isinstance(acc, torch.Tensor) and acc.device.type == "cpu":
        assert not bool(acc.any())


@pytest.mark.gpu
def test_mixed_devices():
    acc, x, weight = make(5, 6, torch.float32)
    for moved in ("acc", "x", "token_weight"):
        tensors = {"acc": acc, "x": x, "token_weight": weight}
        tensors[moved] = tensors[moved].cuda()
        with pytest.raises(ValueError, match=r"(acc|token_weight) is on .*; expected (cpu|cuda:0)"):
            ops.column_norm_sq_(**tensors)
