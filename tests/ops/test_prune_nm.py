"""prune_nm_ and nm_mask: in every m neighbours, the very n that a stable sort of fp32 scores puts first."""

from __future__ import annotations

import itertools

import pytest
import torch
from ops import pruning
from ops.pruning import (
    ISAS,
    KINDS,
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

NM = [(1, 2), (2, 4), (3, 4), (1, 4), (4, 8), (5, 16), (2, 3), (5, 11), (40, 100)]
NAME = "{0[0]}:{0[1]}".format


def first_of_sorts(weight, scale, n, m):
    """[out, in] bool on the CPU."""
    scores = metric(weight, scale).reshape(weight.shape[0], -1, m)
    order = torch.sort(scores, dim=-1, stable=True)[1][..., :n]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True).view(weight.shape)


def of_neighbours(n, m, module=ops):
    return Op(
        f"{n}:{m}",
        lambda weight, scale: module.prune_nm_(weight, scale, n, m),
        lambda weight, scale: module.nm_mask(weight, scale, n, m),
        lambda weight, scale: first_of_sorts(weight, scale, n, m),
    )


def check(weight, scale, n, m, what="", dropped=None):
    """Both forms, against the sorts; leaves ``weight`` pruned."""
    check_forms(of_neighbours(n, m), weight, scale, what, dropped)


@pytest.mark.parametrize("nm", NM, ids=NAME)
def test_equals_stable_sorts(nm, dtype, device):
    n, m = nm
    for kind, name in itertools.product(KINDS, SCALES):
        if finite_scores(kind, name):
            columns = m * (13 if name == "random" else 3)
            weight, scale = KINDS[kind]((5, columns), dtype).to(device), to(device, SCALES[name](columns))
            check(weight, scale, n, m, f"{kind}, scale {name}")


@pytest.mark.parametrize("nm", NM, ids=NAME)
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


@pytest.mark.parametrize("nm", [(2, 4), (1, 3)], ids=NAME)
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
        with nothing_written_beside(view, wide, name):
            check(weight, scale, n, m, name)


def test_the_whole_mask_is_written(dtype, device):
    for n, m in NM:
        weight = KINDS["few values"]((3, 7 * m), dtype).to(device)
        mask = torch.ones(3, 7 * m, dtype=torch.bool, device=device)
        _native.prune_nm(weight, None, mask, n, m)
        assert torch.equal(mask.cpu(), first_of_sorts(weight, None, n, m)), (n, m)


@pytest.mark.parametrize("nm", NM, ids=NAME)
def test_reference_equals_stable_sorts(nm, dtype, device):
    n, m = nm
    for kind in KINDS:
        weight, scale = KINDS[kind]((4, 3 * m), dtype).to(device), SCALES["random"](3 * m).to(device)
        check_forms(of_neighbours(n, m, reference), weight, scale, kind)


def test_empty(dtype, device):
    for shape in ((0, 8), (5, 0)):
        weight = torch.empty(shape, dtype=dtype, device=device)
        assert ops.prune_nm_(weight, torch.ones(shape[1], device=device), 2, 4) is weight
        assert ops.nm_mask(weight, None, 2, 4).shape == shape


@pytest.mark.parametrize("nm", NM, ids=NAME)
@pytest.mark.parametrize("isa", ISAS)
def test_unchecked_nan_is_the_largest_score(isa, nm, dtype):
    """What a compiled graph sees: the op without the look at the data. All of a NaN's bit patterns."""
    n, m = nm
    for pattern in nan_patterns(dtype):
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

    check_compiled(prune, weight, scale)


@pytest.mark.gpu
@pytest.mark.parametrize("nm", NM, ids=NAME)
def test_cuda_graph(nm, dtype):
    columns = 7 * nm[1]
    source, scale = KINDS["few values"]((40, columns), dtype).cuda(), SCALES["some zero"](columns).cuda()
    check_cuda_graph(of_neighbours(*nm), source, scale)


@pytest.mark.large
def test_rows_past_2_31_elements(device):
    for (n, m), columns in itertools.product(((2, 4), (2, 3)), (12, 72)):
        check(rows_far_apart(KINDS["few values"]((5, columns), torch.bfloat16).to(device)), None, n, m)


@pytest.mark.large
def test_mask_past_2_31_elements(device):
    check_mask_past_2_31(of_neighbours(2, 4), KINDS["few values"]((1, 1 << 16), torch.float16).to(device))


# ---- bad input -------------------------------------------------------------------------------------------------------

BAD = [
    *pruning.BAD,
    (
        {"weight": torch.randn(3, 10), "column_scale": None},
        ValueError,
        r"weight has shape \[3, 10\]; .* that 4 divides",
    ),
    ({"m": 16}, ValueError, r"weight has shape \[3, 8\]; expected a number of columns that 16 divides"),
    ({"n": 0}, ValueError, r"n:m is 0:4; expected 0 < n < m <= 4096"),
    ({"n": -1}, ValueError, r"n:m is -1:4; expected 0 < n < m <= 4096"),
    ({"n": 4}, ValueError, r"n:m is 4:4; expected 0 < n < m <= 4096"),
    ({"n": 1, "m": 1}, ValueError, r"n:m is 1:1; expected 0 < n < m <= 4096"),
    ({"n": 2, "m": -4}, ValueError, r"n:m is 2:-4; expected 0 < n < m"),
    ({"n": 1.5}, TypeError, r"n is 1.5; expected an int"),
    ({"m": "4"}, TypeError, r"m is '4'; expected an int"),
]


@pytest.mark.parametrize("op", [ops.prune_nm_, ops.nm_mask])
@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input(changes, error, message, op):
    check_refused(op, {**pruning.good(), "n": 2, "m": 4, **changes}, error, message)


@pytest.mark.gpu
@pytest.mark.parametrize("op", [ops.prune_nm_, ops.nm_mask])
def test_mixed_devices(op):
    check_mixed_devices(op, 2, 4)


def test_rows_that_overlap_are_refused():
    check_overlapping_rows(ops.prune_nm_, 2, 4)
