"""prune_smallest_ and smallest_mask: the very weights that a stable sort of fp32 scores puts first."""

from __future__ import annotations

import itertools

import pytest
import torch
from ops import pruning
from ops.pruning import (
    INF,
    ISAS,
    KINDS,
    NAN,
    SCALES,
    Op,
    bits,
    check_compiled,
    check_cuda_graph,
    check_forms,
    check_mask_past_2_31,
    check_mixed_devices,
    check_overlapping_rows,
    check_refused,
    finite_scores,
    metric,
    nan_patterns,
    nothing_written_beside,
    rows_far_apart,
    to,
)

from vlprune_ext import _native, ops, reference

SCOPES = ("row", "matrix")
WIDEST = 245_758  # columns of a row that the scratch memory of csrc/cpu/prune_smallest.cpp holds


def some_ks(entries):
    return sorted({0, 1, entries // 3, entries // 2, entries - 1, entries} - {-1})


def first_of_sort(weight, scale, k, scope="row"):
    """[out, in] bool on the CPU: the first k of a stable sort, as the published code drops them."""
    scores = metric(weight, scale)
    if scope == "matrix":
        scores = scores.reshape(1, -1)
    order = torch.sort(scores, dim=-1, stable=True)[1][:, :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True).view(weight.shape)


def smallest(k, scope="row", module=ops):
    return Op(
        f"k={k} {scope}",
        lambda weight, scale: module.prune_smallest_(weight, scale, k, scope=scope),
        lambda weight, scale: module.smallest_mask(weight, scale, k, scope=scope),
        lambda weight, scale: first_of_sort(weight, scale, k, scope),
    )


def check(weight, scale, k, scope="row", what="", dropped=None):
    """Both forms, against the sort; leaves ``weight`` pruned."""
    check_forms(smallest(k, scope), weight, scale, what, dropped)


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
        k = min(k, weight.shape[1] if scope == "row" else weight.numel())
        with nothing_written_beside(view, wide, name):
            check(weight, scale, k, scope, name)


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
        check_forms(smallest(13, scope, reference), weight, scale, kind)


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
    for isa, pattern in itertools.product(ISAS, nan_patterns(dtype)):
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

    check_compiled(prune, weight, scale)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.gpu
def test_cuda_graph(scope, dtype):
    source, scale = KINDS["few values"]((40, 300), dtype).cuda(), SCALES["some zero"](300).cuda()
    check_cuda_graph(smallest(140 if scope == "row" else 5000, scope), source, scale)


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
    if dtype == torch.float32:
        pytest.skip("the 16-bit types take as many elements in half the memory")
    for k, scope in ((33, "row"), (170, "matrix")):
        check(rows_far_apart(KINDS["few values"]((5, 70), dtype).to(device)), None, k, scope)


@pytest.mark.large
def test_mask_past_2_31_elements(device):
    row = torch.randperm(1 << 16).to(torch.int16).view(torch.float16)[None].nan_to_num(0).to(device)
    check_mask_past_2_31(smallest(30_000), row)


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


# ---- bad input -------------------------------------------------------------------------------------------------------

BAD = [
    *pruning.BAD,
    ({"k": -1, "scope": "row"}, ValueError, r"k is -1; expected 0 <= k <= 8 \(the entries of a row\)"),
    ({"k": 9, "scope": "row"}, ValueError, r"k is 9; expected 0 <= k <= 8 \(the entries of a row\)"),
    ({"k": -1, "scope": "matrix"}, ValueError, r"k is -1; expected 0 <= k <= 24 \(the entries of a matrix\)"),
    ({"k": 25, "scope": "matrix"}, ValueError, r"k is 25; expected 0 <= k <= 24 \(the entries of a matrix\)"),
    ({"k": 1.0}, TypeError, r"k is 1.0; expected an int"),
    ({"k": "2"}, TypeError, r"k is '2'; expected an int"),
    ({"scope": "column"}, ValueError, r"scope is 'column'; expected one of row, matrix"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input(changes, error, message):
    for scope, op in itertools.product(SCOPES, (ops.prune_smallest_, ops.smallest_mask)):
        check_refused(op, {**pruning.good(), "k": 2, "scope": scope, **changes}, error, message)


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


@pytest.mark.gpu
@pytest.mark.parametrize("op", [ops.prune_smallest_, ops.smallest_mask])
def test_mixed_devices(op):
    check_mixed_devices(op, 1)


def test_rows_that_overlap_are_refused():
    check_overlapping_rows(ops.prune_smallest_, 2)


def test_autograd_knows_that_the_weight_changed():
    x = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(5, 4)
    loss = torch.nn.functional.linear(x, weight).square().sum()
    ops.prune_smallest_(weight, None, 2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
