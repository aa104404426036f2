"""prune_smallest_, smallest_mask and share_smallest: the very weights that a stable sort of fp32 scores puts first."""

from __future__ import annotations

import itertools

import pytest
import torch

from vlprune_ext import _native, ops, reference

ISAS = _native.build_info()["available_isas"]
SCOPES = ("row", "matrix")
DETERMINISTIC_SORT = "cpu"  # expectations are sorted there: the sort on CUDA may tell -0 from +0
WIDEST = 245_758  # columns of a row that the scratch memory of csrc/cpu/prune_smallest.cpp holds


# ---- weights and scales that are hard to sort ------------------------------------------------------------------------


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


def some_ks(entries):
    return sorted({0, 1, entries // 3, entries // 2, entries - 1, entries} - {-1})


def finite_scores(kind, scale):
    """Whether no infinity meets a zero: that is an error, tested below."""
    return kind != "infinite" or scale in ("none", "random", "huge")


# ---- what is expected ------------------------------------------------------------------------------------------------


def bits(tensor):
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def metric(weight, scale):
    scores = weight.float().abs()
    return scores if scale is None else scores * scale


def first_of_sort(weight, scale, k, scope="row"):
    """[out, in] bool on the CPU: the first k of a stable sort, as the published code drops them."""
    scores = metric(weight.to(DETERMINISTIC_SORT), None if scale is None else scale.to(DETERMINISTIC_SORT))
    if scope == "matrix":
        scores = scores.reshape(1, -1)
    order = torch.sort(scores, dim=-1, stable=True)[1][:, :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True).view(weight.shape)


def assert_dropped(weight, before, dropped, what=""):
    """``weight`` is ``before`` with +0 where ``dropped``, bit for bit."""
    expected = bits(before).masked_fill(dropped.to(before.device), 0)
    assert torch.equal(bits(weight), expected), what


def check(weight, scale, k, scope="row", what="", dropped=None):
    """Both forms, against the sort; leaves ``weight`` pruned."""
    before = weight.clone()
    dropped = first_of_sort(weight, scale, k, scope) if dropped is None else dropped
    what = f"{what} k={k} {scope} {list(weight.shape)}"
    mask = ops.smallest_mask(weight, scale, k, scope=scope)
    assert mask.dtype == torch.bool, what
    assert mask.device == weight.device, what
    assert torch.equal(mask.cpu(), dropped), what
    assert torch.equal(bits(weight), bits(before)), f"the mask form wrote: {what}"
    assert ops.prune_smallest_(weight, scale, k, scope=scope) is weight
    assert_dropped(weight, before, dropped, what)


def to(device, scale):
    return None if scale is None else scale.to(device)


# ---- prune_smallest_, smallest_mask ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_stable_sort(kind, scope, dtype, device):
    for name, columns in [*((name, 127) for name in SCALES), *itertools.product(("none", "random"), (1, 3, 4097))]:
        if not finite_scores(kind, name):
            continue
        out = 2 if columns > 1000 else 5
        weight, scale = KINDS[kind]((out, columns), dtype).to(device), to(device, SCALES[name](columns))
        for k in some_ks(columns if scope == "row" else out * columns):
            check(weight.clone(), scale, k, scope, f"scale {name}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa, kind, dtype):
    """Widths about those of the vectors (8 to 64 numbers) and of the parts of 2,048 keys."""
    for columns, scope in itertools.product((1, 15, 33, 64, 135, 2049), SCOPES):
        out, name = (1, "none") if columns > 1000 else (4, "random")
        weight, scale = KINDS[kind]((out, columns), dtype), SCALES[name](columns)
        for k in {columns // 3, columns - 1} if scope == "row" else {out * columns // 2}:
            dropped = first_of_sort(weight, scale, k, scope)
            with _native.force_isa(isa):
                check(weight.clone(), scale, k, scope, f"scale {name}", dropped)


@pytest.mark.parametrize("columns", [WIDEST, WIDEST + 1])
def test_rows_wider_than_the_scratch_memory(columns, dtype, device):
    weight = torch.cat([KINDS[kind]((1, columns), dtype) for kind in ("any bits", "few values")]).to(device)
    scale = torch.ones(columns, device=device)
    scale[::3] = 0.5
    k = columns // 3
    dropped = first_of_sort(weight, scale, k)
    for isa in ISAS if device.type == "cpu" else ISAS[:1]:
        with _native.force_isa(isa):
            check(weight.clone(), scale, k, "row", isa, dropped)


def test_wide_rows_without_and_with_everything(device):
    weight = KINDS["few values"]((2, WIDEST + 5), torch.bfloat16).to(device)
    for k, every in ((0, False), (WIDEST + 5, True)):
        check(weight.clone(), None, k, dropped=torch.full(weight.shape, every))
    check(weight, None, WIDEST, "matrix")


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("isa", ISAS)
def test_every_thread_count(isa, threads, dtype):
    weights = {kind: KINDS[kind]((23, 150), dtype) for kind in ("random", "few values", "zeros")}
    scale = SCALES["some zero"](150)
    torch.set_num_threads(threads)
    with _native.force_isa(isa):
        for kind, weight in weights.items():
            check(weight.clone(), scale, 70, "row", kind)
            check(weight.clone(), scale, 1777, "matrix", kind)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", ["random", "few values"])
def test_strides(kind, scope, dtype, device):
    """Rows far apart, an odd start, a transposed weight, every other column, a strided scale; around it, no write."""
    views = {
        "rows apart": lambda wide: wide[2:9, 3:40],
        "one row in three": lambda wide: wide[::3, 5:6],
        "transposed": lambda wide: wide[2:9, 3:40].t(),
        "every other column": lambda wide: wide[1:, 1::2],
        "one column": lambda wide: wide[:, 7:8],
    }
    for name, view in views.items():
        wide = KINDS[kind]((12, 50), dtype).to(device)
        weight = view(wide)
        scale = (torch.rand(2 * weight.shape[1], device=device) + 0.5)[::2]
        k = (weight.shape[1] if scope == "row" else weight.numel()) // 2 + 1
        expected, dropped = bits(wide).clone(), first_of_sort(weight, scale, min(k, weight.numel()), scope)
        k = min(k, weight.shape[1] if scope == "row" else weight.numel())
        view(expected).masked_fill_(dropped.to(device), 0)
        check(weight, scale, k, scope, name)
        assert torch.equal(bits(wide), expected), f"{name}: wrote beside the weight"


@pytest.mark.parametrize("scope", SCOPES)
def test_expanded_rows_have_a_mask(scope, dtype, device):
    weight = KINDS["few values"]((1, 33), dtype).to(device).expand(7, 33)
    k = 11 if scope == "row" else 100
    mask = ops.smallest_mask(weight, None, k, scope=scope)
    assert torch.equal(mask.cpu(), first_of_sort(weight, None, k, scope))


def test_massive_ties_in_a_matrix(dtype, device):
    """All scores equal: the first k entries, whatever the row they lie in; then all but a few."""
    weight = torch.full((300, 400), -2.0, dtype=dtype, device=device)
    for k in (1, 399, 400, 401, 60_000, 119_999):
        mask = ops.smallest_mask(weight, None, k, scope="matrix")
        assert torch.equal(mask.flatten().cpu(), torch.arange(120_000) < k)
    weight[17, 33], weight[200, 5] = 1, 3
    mask = ops.smallest_mask(weight, None, 119_999, scope="matrix")
    assert mask.logical_not().nonzero().tolist() == [[200, 5]]
    assert ops.smallest_mask(weight, None, 1, scope="matrix").nonzero().tolist() == [[17, 33]]


def test_the_whole_mask_is_written(dtype, device):
    """Memory that comes filled with ones changes nothing."""
    for columns, k in itertools.product((1, 70, 4097), (0, 1, 30, 70, 4096, 4097)):
        if k <= columns:
            weight = KINDS["few values"]((3, columns), dtype).to(device)
            mask = torch.ones(3, columns, dtype=torch.bool, device=device)
            _native.prune_smallest(weight, None, mask, k)
            assert torch.equal(mask.cpu(), first_of_sort(weight, None, k)), (columns, k)


@pytest.mark.parametrize("scope", SCOPES)
def test_reference_equals_stable_sort(scope, dtype, device):
    for kind in KINDS:
        weight, scale = KINDS[kind]((6, 31), dtype).to(device), SCALES["random"](31).to(device)
        dropped = first_of_sort(weight, scale, 13, scope)
        assert torch.equal(reference.smallest_mask(weight, scale, 13, scope=scope).cpu(), dropped)
        before = weight.clone()
        assert reference.prune_smallest_(weight, scale, 13, scope=scope) is weight
        assert_dropped(weight, before, dropped, kind)


def test_empty(dtype, device):
    for shape in ((0, 5), (5, 0), (0, 0)):
        weight = torch.empty(shape, dtype=dtype, device=device)
        scale = torch.ones(shape[1], device=device)
        assert ops.prune_smallest_(weight, scale, min(shape[1], 3)) is weight
        assert ops.prune_smallest_(weight, scale, 0, scope="matrix") is weight
        for mask in (ops.smallest_mask(weight, None, 0), ops.smallest_mask(weight, None, 0, scope="matrix")):
            assert mask.shape == shape
            assert mask.dtype == torch.bool


@pytest.mark.parametrize("scope", SCOPES)
def test_unchecked_nan_is_the_largest_score(scope, dtype):
    """What a compiled graph sees: the op without the look at the data. All of a NaN's bit patterns."""
    patterns = [0x7FFFFFFF, -1, 0x7F800001] if dtype == torch.float32 else [0x7FFF, -1, 0x7FC1]
    for isa, pattern in itertools.product(ISAS, patterns):
        weight = torch.full((3, 40), torch.inf, dtype=dtype)
        weight[:, 1::2] = 1
        bits(weight)[:, 5:8] = pattern  # a view: weight is contiguous
        assert int(weight.isnan().sum()) == 9
        with _native.force_isa(isa):
            mask = torch.ops.vlprune.smallest_mask(weight, None, 37 if scope == "row" else 111, scope)
        assert torch.equal(mask, ~weight.isnan()), (isa, hex(pattern))


@pytest.mark.parametrize("scope", SCOPES)
def test_opcheck(scope, device):
    weight, scale = torch.randn(4, 10, device=device).bfloat16(), torch.rand(10, device=device)
    torch.library.opcheck(torch.ops.vlprune.prune_smallest_, (weight, scale, 4, scope))
    torch.library.opcheck(torch.ops.vlprune.smallest_mask, (weight, None, 4, scope))


@pytest.mark.parametrize("scope", SCOPES)
def test_compile_fullgraph(scope, device):
    weight, scale = torch.randn(9, 10, device=device), torch.rand(10, device=device)

    def prune(weight, scale):
        doubled = weight * 2
        ops.prune_smallest_(doubled, scale, 4, scope=scope)
        ops.prune_smallest_(weight, None, 3, scope=scope)  # an argument, too, is written
        return doubled + 1, ops.smallest_mask(weight + 1, scale, 4, scope=scope)

    of_compiled, of_eager = weight.clone(), weight.clone()
    compiled = torch.compile(prune, fullgraph=True, backend="aot_eager")(of_compiled, scale)
    eager = prune(of_eager, scale)
    assert torch.equal(compiled[0], eager[0])
    assert torch.equal(compiled[1], eager[1])
    assert torch.equal(bits(of_compiled), bits(of_eager))
    assert not torch.equal(of_eager, weight)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.gpu
def test_cuda_graph(scope, dtype):
    weight, scale = KINDS["few values"]((40, 300), dtype).cuda(), SCALES["some zero"](300).cuda()
    source = weight.clone()
    k = 140 if scope == "row" else 5000
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask = ops.smallest_mask(source, scale, k, scope=scope)
        weight.copy_(source)
        ops.prune_smallest_(weight, scale, k, scope=scope)
    for _ in range(2):
        mask.zero_()
        graph.replay()
        dropped = first_of_sort(source, scale, k, scope)
        assert torch.equal(mask.cpu(), dropped)
        assert_dropped(weight, source, dropped)
        source.copy_(KINDS["random"]((40, 300), dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [1, 2, 31, 255, 257, 1023, 1025, 4095, 4097, 12_289, 32_769, 33_000])
def test_every_width_of_block(columns, dtype):
    """The widths at which the CUDA kernel changes its block, and rows that do not start on a vector's boundary."""
    for kind, shift in itertools.product(("random", "few values"), (0, 1)):
        weight = KINDS[kind]((3, columns + shift), dtype).cuda()[:, shift:]
        check(weight.clone(memory_format=torch.preserve_format), None, columns // 2, "row", kind)
        check(weight, None, 3 * columns // 2, "matrix", kind)


@pytest.mark.large
def test_rows_past_2_31_elements(dtype, device):
    """Rows that lie so far apart that the last starts past 2**31 elements."""
    if dtype == torch.float32:
        pytest.skip("the 16-bit types take as many elements in half the memory")
    out, columns = 5, 70
    stride = 2**31 // (out - 1) + 1
    apart = torch.empty((out - 1) * stride + columns, dtype=dtype, device=device).as_strided(
        (out, columns), (stride, 1)
    )
    for k, scope in ((33, "row"), (170, "matrix")):
        apart.copy_(KINDS["few values"]((out, columns), dtype))
        check(apart, None, k, scope)


@pytest.mark.large
def test_mask_past_2_31_elements(device):
    """One row, expanded: a mask of 2**31 + 2**16 bytes, the weight next to nothing."""
    columns = 1 << 16
    weight = torch.randperm(columns).to(torch.int16).view(torch.float16)[None].nan_to_num(0).to(device)
    expected = first_of_sort(weight, None, 30_000)[0].to(device)
    mask = ops.smallest_mask(weight.expand(2**31 // columns + 1, columns), None, 30_000)
    assert mask.numel() > 2**31
    for i in (0, 1, mask.shape[0] // 2, mask.shape[0] - 2, mask.shape[0] - 1):
        assert torch.equal(mask[i], expected)


@pytest.mark.large
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)  # a minute on a CPU
def test_more_than_2_31_ties(device):
    """One matrix-wide selection from 2**31 + 2**16 scores, nearly all equal; the weight is one row, expanded."""
    columns = 1 << 16
    row = torch.ones(columns, dtype=torch.float16, device=device)
    row[0], row[-1] = 0.5, 2
    weight = row.expand(2**31 // columns + 1, columns)
    k = 2**31 - 12_345  # the first column, then ones in the order of the rows
    mask = ops.smallest_mask(weight, None, k, scope="matrix")
    full, rest = divmod(k - weight.shape[0], columns - 2)
    assert int(mask.sum(dtype=torch.int64)) == k
    assert bool(mask[:, 0].all())
    assert not bool(mask[:, -1].any())
    assert bool(mask[:full, :-1].all())
    assert mask[full].nonzero().flatten().tolist() == list(range(rest + 1))


# ---- share_smallest --------------------------------------------------------------------------------------------------


def check_share(weights, scales, k):
    """Shares, and what pruning by them drops, against one stable sort of all scores, one after the other."""
    scores = [
        metric(w.to(DETERMINISTIC_SORT), to(DETERMINISTIC_SORT, s)).flatten()
        for w, s in zip(weights, scales, strict=True)
    ]
    order = torch.cat(scores).sort(stable=True).indices[:k]
    dropped = torch.zeros(sum(w.numel() for w in weights), dtype=torch.bool).index_fill_(0, order, True)
    parts = dropped.split([w.numel() for w in weights])
    shares = ops.share_smallest(weights, scales, k)
    assert all(type(share) is int for share in shares)
    assert shares == [int(part.sum()) for part in parts]
    for weight, scale, share, part in zip(weights, scales, shares, parts, strict=True):
        mask = ops.smallest_mask(weight, scale, share, scope="matrix")
        assert torch.equal(mask.cpu().flatten(), part)
    return shares


def shared_ks(weights):
    total = sum(weight.numel() for weight in weights)
    return sorted({0, 1, total // 3, total // 2, total - 1, total})


@pytest.mark.parametrize("kind", KINDS)
def test_share_equals_sort_of_all(kind, dtype, device):
    weights = [KINDS[kind](shape, dtype).to(device) for shape in ((7, 40), (1, 129), (33, 1), (12, 65))]
    before = [weight.clone() for weight in weights]
    for name in ("none", "random"):
        scales = [to(device, SCALES[name](weight.shape[1])) for weight in weights]
        for k in shared_ks(weights):
            check_share(weights, scales, k)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(weights, before, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("isa", ISAS)
def test_share_of_every_instruction_set_and_thread_count(isa, threads):
    weights = [KINDS["few values"]((9, 70), dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    weights += [KINDS["any bits"]((5, 2050), torch.float32)]
    scales = [None, SCALES["some zero"](70), SCALES["huge"](70), SCALES["everything"](2050)]
    torch.set_num_threads(threads)
    with _native.force_isa(isa):
        for k in shared_ks(weights):
            check_share(weights, scales, k)


def test_share_of_mixed_dtypes(device):
    """The values of the coarsest type in each of the types: ties across matrices, strided weights, some scales."""
    values = [torch.randint(-3, 4, shape) / 4 for shape in ((8, 30), (11, 17), (6, 40))]
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    weights = [value.to(device, dtype) for value, dtype in zip(values, dtypes, strict=True)]
    weights[1], weights[2] = weights[1].t(), weights[2][:, 3::2]
    scales = [None, torch.full((22,), 2.0, device=device)[::2], SCALES["some zero"](weights[2].shape[1]).to(device)]
    for k in shared_ks(weights):
        check_share(weights, scales, k)


def test_share_gives_ties_to_the_first_matrix(device):
    weights = [torch.full((4, 5), value, device=device) for value in (1.0, -1.0, 1.0)]
    assert [ops.share_smallest(weights, [None] * 3, k) for k in (0, 7, 20, 33, 60)] == [
        [0, 0, 0],
        [7, 0, 0],
        [20, 0, 0],
        [20, 13, 0],
        [20, 20, 20],
    ]


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)], ids=str)
def test_share_with_an_empty_matrix(shape, device):
    weights = [torch.empty(shape, device=device), torch.randn(3, 4, device=device), torch.empty(shape, device=device)]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns
    try:
        for k in (0, 5, 12):
            assert ops.share_smallest(weights, [None] * 3, k) == [0, k, 0]
        assert ops.share_smallest(weights[:1], [None], 0) == [0]
    finally:
        torch.use_deterministic_algorithms(before)


def test_reference_share_equals_op(dtype):
    weights = [KINDS["few values"](shape, dtype) for shape in ((4, 9), (5, 7))]
    scales = [None, SCALES["random"](7)]
    for k in shared_ks(weights):
        assert reference.share_smallest(weights, scales, k) == ops.share_smallest(weights, scales, k)


@pytest.mark.gpu
def test_share_across_devices(dtype):
    weights = [KINDS["few values"]((6, 50), dtype) for _ in range(3)]
    weights[1] = weights[1].cuda()
    scales = [None, SCALES["some zero"](50).cuda(), SCALES["some zero"](50)]
    for k in shared_ks(weights):
        check_share(weights, scales, k)


# ---- bad input -------------------------------------------------------------------------------------------------------


def bad(**changes):
    """Arguments of a good call with some replaced."""
    return {"weight": torch.randn(3, 4), "column_scale": torch.rand(4) + 0.1, "k": 2, **changes}


def changed(values, place, value):
    values[place] = value
    return values


NAN, INF = float("nan"), float("inf")
BAD = [
    (bad(weight=[[1.0]]), TypeError, r"weight is a list; expected a tensor"),
    (
        bad(weight=torch.randn(3, 4).double()),
        TypeError,
        r"weight has dtype torch.float64; expected float32, float16 or",
    ),
    (bad(weight=torch.ones(3, 4, dtype=torch.int32)), TypeError, r"weight has dtype torch.int32; expected float32"),
    (bad(weight=torch.randn(4)), ValueError, r"weight has shape \[4\]; expected two dimensions \[out, in\]"),
    (bad(weight=torch.randn(2, 3, 4)), ValueError, r"weight has shape \[2, 3, 4\]; expected two dimensions"),
    (bad(column_scale=torch.rand(3)), ValueError, r"column_scale has shape \[3\]; expected \[4\] \(in, the columns of"),
    (bad(column_scale=torch.rand(1, 4)), ValueError, r"column_scale has shape \[1, 4\]; expected \[4\]"),
    (bad(column_scale=torch.rand(4).half()), TypeError, r"column_scale has dtype torch.float16; expected float32"),
    (bad(column_scale=torch.rand(4).double()), TypeError, r"column_scale has dtype torch.float64; expected float32"),
    (bad(column_scale=torch.rand(4, device="meta")), ValueError, r"column_scale is on meta; expected cpu"),
    (bad(k=-1), ValueError, r"k is -1; expected 0 <= k <= 4 \(the entries of a row\)"),
    (bad(k=5), ValueError, r"k is 5; expected 0 <= k <= 4 \(the entries of a row\)"),
    (bad(k=-1, scope="matrix"), ValueError, r"k is -1; expected 0 <= k <= 12 \(the entries of a matrix\)"),
    (bad(k=13, scope="matrix"), ValueError, r"k is 13; expected 0 <= k <= 12 \(the entries of a matrix\)"),
    (bad(k=1.0), TypeError, r"k is 1.0; expected an int"),
    (bad(k="2"), TypeError, r"k is '2'; expected an int"),
    (bad(scope="column"), ValueError, r"scope is 'column'; expected one of row, matrix"),
    (
        bad(column_scale=torch.tensor([1, -0.5, 1, -1])),
        ValueError,
        r"column_scale\[1\] is -0.5; expected a finite number",
    ),
    (bad(column_scale=torch.tensor([1, 1, NAN, 1])), ValueError, r"column_scale\[2\] is nan; expected a finite number"),
    (bad(column_scale=torch.tensor([1, 1, 1, INF])), ValueError, r"column_scale\[3\] is inf; expected a finite number"),
    (
        bad(weight=changed(torch.ones(3, 4), (1, 2), NAN), column_scale=None),
        ValueError,
        r"weight\[1, 2\] is nan; expected a score \|w\| \* scale that is not NaN",
    ),
    (
        bad(weight=changed(torch.ones(3, 4).bfloat16(), (2, 0), NAN), column_scale=torch.full((4,), 0.5)),
        ValueError,
        r"weight\[2, 0\] is nan with column_scale 0.5; expected a score",
    ),
    (
        bad(weight=changed(torch.ones(3, 4).half(), (0, 3), -INF), column_scale=torch.tensor([1.0, 1, 1, 0])),
        ValueError,
        r"weight\[0, 3\] is -inf with column_scale 0.0; expected a score",
    ),
    (  # a NaN behind an infinity that is fine
        bad(weight=changed(changed(torch.ones(4, 3), (0, 1), INF), (1, 2), NAN).t(), column_scale=torch.ones(4)),
        ValueError,
        r"weight\[2, 1\] is nan with column_scale 1.0; expected a score",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input(arguments, error, message):
    arguments = dict(arguments)
    before = arguments["weight"].clone() if isinstance(arguments["weight"], torch.Tensor) else None
    for scope in (arguments.pop("scope", None),) if "scope" in arguments else SCOPES:
        if "the entries of a row" in message and scope == "matrix":
            continue
        for op in (ops.prune_smallest_, ops.smallest_mask):
            with pytest.raises(error, match=message):
                op(**arguments, scope=scope)
            if before is not None:
                assert torch.equal(bits_of_any(arguments["weight"]), bits_of_any(before))


def bits_of_any(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("op", [ops.prune_smallest_, ops.smallest_mask])
def test_bad_values_on_any_device(op, dtype, device):
    weight = torch.randn(60, 70, device=device).to(dtype)
    weight[41, 13] = NAN
    before = weight.clone()
    with pytest.raises(ValueError, match=r"weight\[41, 13\] is nan; expected a score"):
        op(weight, None, 3)
    weight[41, 13] = before[41, 13] = INF
    op(weight.clone(), torch.ones(70, device=device), 3)
    scale = torch.ones(70, device=device)
    scale[13] = 0
    with pytest.raises(ValueError, match=r"weight\[41, 13\] is inf with column_scale 0.0; expected a score"):
        op(weight, scale, 3)
    scale[60] = -1
    with pytest.raises(ValueError, match=r"column_scale\[60\] is -1.0; expected a finite number of at least 0"):
        op(weight, scale, 3)
    assert torch.equal(bits(weight), bits(before))


BAD_SHARES = [
    (([], [], 0), ValueError, r"got 0 weights and 0 column_scales; expected one for each"),
    (([torch.ones(2, 3)], [], 0), ValueError, r"got 1 weights and 0 column_scales; expected one for each"),
    (([torch.ones(2, 3)], [None, None], 0), ValueError, r"got 1 weights and 2 column_scales; expected one for each"),
    (([torch.ones(2, 3)] * 2, [None] * 2, 13), ValueError, r"k is 13; expected 0 <= k <= 12 \(the entries of all"),
    (([torch.ones(2, 3)] * 2, [None] * 2, -1), ValueError, r"k is -1; expected 0 <= k <= 12"),
    (([torch.ones(2, 3)] * 2, [None] * 2, 0.5), TypeError, r"k is 0.5; expected an int"),
    (([torch.ones(2, 3), [[1.0]]], [None] * 2, 1), TypeError, r"weight is a list; expected a tensor"),
    (([torch.ones(2, 3), torch.ones(3)], [None] * 2, 1), ValueError, r"weight has shape \[3\]; expected two dim"),
    (([torch.ones(2, 3), torch.ones(2, 3).double()], [None] * 2, 1), TypeError, r"weight has dtype torch.float64"),
    (([torch.ones(2, 3)] * 2, [None, torch.ones(2)], 1), ValueError, r"column_scale has shape \[2\]; expected \[3\]"),
    (
        ([torch.ones(2, 3)] * 2, [None, torch.tensor([1.0, 1, -2])], 1),
        ValueError,
        r"column_scale\[2\] is -2.0; expected a finite number",
    ),
    (
        ([torch.ones(2, 3), changed(torch.ones(2, 3), (1, 1), NAN)], [None, None], 1),
        ValueError,
        r"weight\[1, 1\] is nan; expected a score",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_SHARES, ids=[message for _, _, message in BAD_SHARES])
def test_bad_share(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.share_smallest(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("op", [ops.prune_smallest_, ops.smallest_mask])
def test_mixed_devices(op):
    with pytest.raises(ValueError, match=r"column_scale is on cpu; expected cuda:0"):
        op(torch.ones(3, 4, device="cuda"), torch.ones(4), 1)
    with pytest.raises(ValueError, match=r"column_scale is on cuda:0; expected cpu"):
        op(torch.ones(3, 4), torch.ones(4, device="cuda"), 1)


@pytest.mark.parametrize("prune", [lambda w: ops.prune_smallest_(w, None, 2), lambda w: ops.prune_nm_(w, None, 2, 4)])
def test_rows_that_overlap_are_refused(prune):
    """What is written in place may lie in no two rows."""
    memory = torch.randn(40)
    kept = memory.clone()
    for overlapping in (memory[:8].expand(3, 8), memory.as_strided((4, 8), (5, 1))):
        with pytest.raises(ValueError, match=r"weight has rows \d apart and 8 wide; expected no overlap"):
            prune(overlapping)
    assert torch.equal(memory, kept)


def test_autograd_knows_that_the_weight_changed():
    x = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(5, 4)
    loss = torch.nn.functional.linear(x, weight).square().sum()
    ops.prune_smallest_(weight, None, 2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
