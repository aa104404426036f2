"""prune_nm_ and nm_mask: in every m neighbours, the very n that a stable sort of fp32 scores puts first."""

from __future__ import annotations

import itertools

import pytest
import torch
from ops.test_prune_smallest import (
    INF,
    ISAS,
    KINDS,
    NAN,
    SCALES,
    assert_dropped,
    bits,
    changed,
    finite_scores,
    metric,
    to,
)

from vlprune_ext import _native, ops, reference

NM = [(1, 2), (2, 4), (3, 4), (1, 4), (4, 8), (5, 16), (2, 3), (5, 11), (40, 100)]


def first_of_sorts(weight, scale, n, m):
    """[out, in] bool on the CPU."""
    scores = metric(weight.cpu(), to("cpu", scale)).reshape(weight.shape[0], -1, m)
    order = torch.sort(scores, dim=-1, stable=True)[1][..., :n]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True).view(weight.shape)


def check(weight, scale, n, m, what="", dropped=None):
    """Both forms, against the sorts; leaves ``weight`` pruned."""
    before = weight.clone()
    dropped = first_of_sorts(weight, scale, n, m) if dropped is None else dropped
    what = f"{what} {n}:{m} {list(weight.shape)}"
    mask = ops.nm_mask(weight, scale, n, m)
    assert mask.dtype == torch.bool, what
    assert mask.device == weight.device, what
    assert torch.equal(mask.cpu(), dropped), what
    assert torch.equal(bits(weight), bits(before)), f"the mask form wrote: {what}"
    assert ops.prune_nm_(weight, scale, n, m) is weight
    assert_dropped(weight, before, dropped, what)


@pytest.mark.parametrize("nm", NM, ids=lambda nm: "{}:{}".format(*nm))
def test_equals_stable_sorts(nm, dtype, device):
    n, m = nm
    for kind, name in itertools.product(KINDS, SCALES):
        if finite_scores(kind, name):
            columns = m * (13 if name == "random" else 3)
            weight, scale = KINDS[kind]((5, columns), dtype).to(device), to(device, SCALES[name](columns))
            check(weight, scale, n, m, f"{kind}, scale {name}")


@pytest.mark.parametrize("nm", NM, ids=lambda nm: "{}:{}".format(*nm))
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa, nm, dtype):
    """Whole vectors of 8 or 16 keys, and what is left behind them."""
    n, m = nm
    with _native.force_isa(isa):
        for kind, groups in itertools.product(KINDS, (1, 7, 34)):
            weight, scale = KINDS[kind]((3, groups * m), dtype), SCALES["random"](groups * m)
            check(weight, scale if groups == 7 else None, n, m, kind)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("m", [2, 4, 8, 16])
def test_every_n_and_order(isa, m):
    """Every n, over every order of the scores where m is 4, and every pattern of two values where m is 8 at most."""
    orders = [torch.tensor(list(itertools.product((1.0, -2.0), repeat=m)))] if m <= 8 else [torch.randn(200, m)]
    if m == 4:
        orders.append(torch.tensor(list(itertools.permutations((1.0, -2.0, 3.0, -4.0)))))
    with _native.force_isa(isa):
        for n, rows in itertools.product(range(1, m), orders):
            check(rows.reshape(1, -1).clone(), None, n, m)


@pytest.mark.parametrize("columns", [2, 5, 40, 257, 1000, 3001])
def test_m_as_wide_as_the_row(columns, dtype, device):
    for kind, n in itertools.product(("random", "few values"), {1, columns // 2, columns - 1}):
        weight = KINDS[kind]((2, columns), dtype).to(device)
        expected = weight.clone()
        check(weight, None, n, columns, kind)
        ops.prune_smallest_(expected, None, n)
        assert torch.equal(bits(weight), bits(expected))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("columns", [8190, 8192, 8196, 3 * 3000, 4001])
def test_parts_of_8192_keys(isa, columns):
    """Rows are taken in parts: whole groups, of which one may be larger than a part."""
    n, m = {8190: (4, 10), 8192: (1, 64), 8196: (2, 4), 9000: (7, 3000), 4001: (100, 4001)}[columns]
    weight = KINDS["few values"]((1, columns), torch.bfloat16)
    with _native.force_isa(isa):
        check(weight, SCALES["random"](columns), n, m)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("isa", ISAS)
def test_every_thread_count(isa, threads, dtype):
    scale = SCALES["some zero"](132)
    torch.set_num_threads(threads)
    with _native.force_isa(isa):
        for kind, (n, m) in itertools.product(("random", "few values"), ((2, 4), (2, 3), (5, 11))):
            check(KINDS[kind]((23, 132), dtype), scale, n, m, kind)


@pytest.mark.parametrize("nm", [(2, 4), (1, 3)], ids=lambda nm: "{}:{}".format(*nm))
def test_strides(nm, dtype, device):
    """Rows far apart, an odd start, a transposed weight, every other column, a strided scale; around it, no write."""
    n, m = nm
    views = {
        "rows apart": lambda wide: wide[2:9, 3:39],
        "transposed": lambda wide: wide[:, 3:40].t(),
        "every other column": lambda wide: wide[1:, 1:49:2],
    }
    for (name, view), kind in itertools.product(views.items(), ("random", "few values")):
        wide = KINDS[kind]((12, 50), dtype).to(device)
        weight = view(wide)
        scale = (torch.rand(2 * weight.shape[1], device=device) + 0.5)[::2]
        expected = bits(wide).clone()
        view(expected).masked_fill_(first_of_sorts(weight, scale, n, m).to(device), 0)
        check(weight, scale, n, m, name)
        assert torch.equal(bits(wide), expected), f"{name}: wrote beside the weight"


def test_the_whole_mask_is_written(dtype, device):
    for n, m in NM:
        weight = KINDS["few values"]((3, 7 * m), dtype).to(device)
        mask = torch.ones(3, 7 * m, dtype=torch.bool, device=device)
        _native.prune_nm(weight, None, mask, n, m)
        assert torch.equal(mask.cpu(), first_of_sorts(weight, None, n, m)), (n, m)


@pytest.mark.parametrize("nm", NM, ids=lambda nm: "{}:{}".format(*nm))
def test_reference_equals_stable_sorts(nm, dtype, device):
    n, m = nm
    for kind in KINDS:
        weight, scale = KINDS[kind]((4, 3 * m), dtype).to(device), SCALES["random"](3 * m).to(device)
        dropped = first_of_sorts(weight, scale, n, m)
        assert torch.equal(reference.nm_mask(weight, scale, n, m).cpu(), dropped)
        before = weight.clone()
        assert reference.prune_nm_(weight, scale, n, m) is weight
        assert_dropped(weight, before, dropped, kind)


def test_empty(dtype, device):
    for shape in ((0, 8), (5, 0)):
        weight = torch.empty(shape, dtype=dtype, device=device)
        assert ops.prune_nm_(weight, torch.ones(shape[1], device=device), 2, 4) is weight
        assert ops.nm_mask(weight, None, 2, 4).shape == shape


@pytest.mark.parametrize("nm", NM, ids=lambda nm: "{}:{}".format(*nm))
@pytest.mark.parametrize("isa", ISAS)
def test_unchecked_nan_is_the_largest_score(isa, nm, dtype):
    """What a compiled graph sees: the op without the look at the data. All of a NaN's bit patterns."""
    n, m = nm
    for pattern in [0x7FFFFFFF, -1, 0x7F800001] if dtype == torch.float32 else [0x7FFF, -1, 0x7FC1]:
        weight = torch.full((3, m * 12), torch.inf, dtype=dtype)
        weight.view(-1, m)[::3, -1] = 1
        place = torch.stack([torch.randperm(m)[: m - n] for _ in range(36)])
        bits(weight).view(-1, m).scatter_(1, place, pattern)  # a view: weight is contiguous
        assert int(weight.isnan().sum()) == 36 * (m - n)
        with _native.force_isa(isa):
            mask = torch.ops.vlprune.nm_mask(weight, None, n, m)
        assert torch.equal(mask, ~weight.isnan()), hex(pattern)


def test_opcheck(device):
    weight, scale = torch.randn(4, 12, device=device).bfloat16(), torch.rand(12, device=device)
    torch.library.opcheck(torch.ops.vlprune.prune_nm_, (weight, scale, 2, 4))
    torch.library.opcheck(torch.ops.vlprune.nm_mask, (weight, None, 1, 3))


def test_compile_fullgraph(device):
    weight, scale = torch.randn(9, 12, device=device), torch.rand(12, device=device)

    def prune(weight, scale):
        doubled = weight * 2
        ops.prune_nm_(doubled, scale, 2, 4)
        ops.prune_nm_(weight, None, 1, 3)  # an argument, too, is written
        return doubled + 1, ops.nm_mask(weight + 1, scale, 5, 6)

    of_compiled, of_eager = weight.clone(), weight.clone()
    compiled = torch.compile(prune, fullgraph=True, backend="aot_eager")(of_compiled, scale)
    eager = prune(of_eager, scale)
    assert torch.equal(compiled[0], eager[0])
    assert torch.equal(compiled[1], eager[1])
    assert torch.equal(bits(of_compiled), bits(of_eager))
    assert not torch.equal(of_eager, weight)


@pytest.mark.gpu
@pytest.mark.parametrize("nm", NM, ids=lambda nm: "{}:{}".format(*nm))
def test_cuda_graph(nm, dtype):
    n, m = nm
    source, scale = KINDS["few values"]((40, 7 * m), dtype).cuda(), SCALES["some zero"](7 * m).cuda()
    weight = source.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask = ops.nm_mask(source, scale, n, m)
        weight.copy_(source)
        ops.prune_nm_(weight, scale, n, m)
    for _ in range(2):
        mask.zero_()
        graph.replay()
        dropped = first_of_sorts(source, scale, n, m)
        assert torch.equal(mask.cpu(), dropped)
        assert_dropped(weight, source, dropped)
        source.copy_(KINDS["random"](source.shape, dtype))


@pytest.mark.large
def test_rows_past_2_31_elements(device):
    """Rows that lie so far apart that the last starts past 2**31 elements."""
    for (n, m), columns in itertools.product(((2, 4), (2, 3)), (12, 72)):
        stride = 2**31 // 4 + 1
        storage = torch.empty(4 * stride + columns, dtype=torch.bfloat16, device=device)
        apart = storage.as_strided((5, columns), (stride, 1))
        apart.copy_(KINDS["few values"]((5, columns), torch.bfloat16))
        check(apart, None, n, m)
        del storage, apart


@pytest.mark.large
def test_mask_past_2_31_elements(device):
    """One row, expanded: a mask of 2**31 + 2**16 bytes, the weight next to nothing."""
    columns = 1 << 16
    weight = KINDS["few values"]((1, columns), torch.float16).to(device)
    expected = first_of_sorts(weight, None, 2, 4)[0].to(device)
    mask = ops.nm_mask(weight.expand(2**31 // columns + 1, columns), None, 2, 4)
    assert mask.numel() > 2**31
    for i in (0, 1, mask.shape[0] // 2, mask.shape[0] - 2, mask.shape[0] - 1):
        assert torch.equal(mask[i], expected)


def bad(**changes):
    """Arguments of a good call with some replaced."""
    return {"weight": torch.randn(3, 8), "column_scale": torch.rand(8) + 0.1, "n": 2, "m": 4, **changes}


BAD = [
    (bad(weight=[[1.0]]), TypeError, r"weight is a list; expected a tensor"),
    (bad(weight=torch.randn(3, 8).double()), TypeError, r"weight has dtype torch.float64; expected float32, float16"),
    (bad(weight=torch.randn(8)), ValueError, r"weight has shape \[8\]; expected two dimensions \[out, in\]"),
    (bad(weight=torch.randn(2, 3, 8)), ValueError, r"weight has shape \[2, 3, 8\]; expected two dimensions"),
    (bad(weight=torch.randn(3, 10), column_scale=None), ValueError, r"weight has shape \[3, 10\]; .* that 4 divides"),
    (bad(m=16), ValueError, r"weight has shape \[3, 8\]; expected a number of columns that 16 divides"),
    (bad(column_scale=torch.rand(7)), ValueError, r"column_scale has shape \[7\]; expected \[8\] \(in, the columns of"),
    (bad(column_scale=torch.rand(8).half()), TypeError, r"column_scale has dtype torch.float16; expected float32"),
    (bad(column_scale=torch.rand(8, device="meta")), ValueError, r"column_scale is on meta; expected cpu"),
    (bad(n=0), ValueError, r"n:m is 0:4; expected 0 < n < m <= 4096"),
    (bad(n=-1), ValueError, r"n:m is -1:4; expected 0 < n < m <= 4096"),
    (bad(n=4), ValueError, r"n:m is 4:4; expected 0 < n < m <= 4096"),
    (bad(n=1, m=1), ValueError, r"n:m is 1:1; expected 0 < n < m <= 4096"),
    (bad(n=2, m=-4), ValueError, r"n:m is 2:-4; expected 0 < n < m"),
    (bad(n=1.5), TypeError, r"n is 1.5; expected an int"),
    (bad(m="4"), TypeError, r"m is '4'; expected an int"),
    (
        bad(column_scale=changed(torch.ones(8), 5, -1)),
        ValueError,
        r"column_scale\[5\] is -1.0; expected a finite number",
    ),
    (
        bad(column_scale=changed(torch.ones(8), 0, NAN)),
        ValueError,
        r"column_scale\[0\] is nan; expected a finite number",
    ),
    (
        bad(column_scale=changed(torch.ones(8), 7, INF)),
        ValueError,
        r"column_scale\[7\] is inf; expected a finite number",
    ),
    (
        bad(weight=changed(torch.ones(3, 8), (1, 2), NAN), column_scale=None),
        ValueError,
        r"weight\[1, 2\] is nan; expected a score \|w\| \* scale that is not NaN",
    ),
    (
        bad(weight=changed(torch.ones(3, 8), (2, 6), INF), column_scale=changed(torch.ones(8), 6, 0)),
        ValueError,
        r"weight\[2, 6\] is inf with column_scale 0.0; expected a score",
    ),
]


@pytest.mark.parametrize("op", [ops.prune_nm_, ops.nm_mask])
@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input(arguments, error, message, op):
    weight = arguments["weight"]
    before = weight.clone() if isinstance(weight, torch.Tensor) else None
    with pytest.raises(error, match=message):
        op(**arguments)
    if before is not None:
        assert torch.equal(weight.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("op", [ops.prune_nm_, ops.nm_mask])
def test_mixed_devices(op):
    with pytest.raises(ValueError, match=r"column_scale is on cpu; expected cuda:0"):
        op(torch.ones(3, 4, device="cuda"), torch.ones(4), 2, 4)
    with pytest.raises(ValueError, match=r"column_scale is on cuda:0; expected cpu"):
        op(torch.ones(3, 4), torch.ones(4, device="cuda"), 2, 4)
