"""share_smallest: how many of the smallest scores of several matrices, sorted as one, lie in each."""

from __future__ import annotations

import pytest
import torch
from ops.pruning import ISAS, KINDS, NAN, SCALES, bits, changed, metric, to

from vlprune_ext import _native, ops, reference


def check(weights, scales, k):
    """Shares, and what pruning by them drops, against one stable sort of all scores, one after the other."""
    scores = [metric(weight, scale).flatten() for weight, scale in zip(weights, scales, strict=True)]
    order = torch.cat(scores).sort(stable=True).indices[:k]
    dropped = torch.zeros(sum(w.numel() for w in weights), dtype=torch.bool).index_fill_(0, order, True)
    parts = dropped.split([w.numel() for w in weights])
    shares = ops.share_smallest(weights, scales, k)
    assert all(type(share) is int for share in shares)
    assert shares == [int(part.sum()) for part in parts]
    for weight, scale, share, part in zip(weights, scales, shares, parts, strict=True):
        mask = ops.smallest_mask(weight, scale, share, scope="matrix")
        assert torch.equal(mask.cpu().flatten(), part)


def some_ks(weights):
    total = sum(weight.numel() for weight in weights)
    return sorted({0, 1, total // 3, total // 2, total - 1, total})


@pytest.mark.parametrize("kind", KINDS)
def test_equals_sort_of_all(kind, dtype, device):
    weights = [KINDS[kind](shape, dtype).to(device) for shape in ((7, 40), (1, 129), (33, 1), (12, 65))]
    before = [weight.clone() for weight in weights]
    for name in ("none", "random"):
        scales = [to(device, SCALES[name](weight.shape[1])) for weight in weights]
        for k in some_ks(weights):
            check(weights, scales, k)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(weights, before, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_and_thread_count(isa, threads):
    weights = [KINDS["few values"]((9, 70), dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    weights += [KINDS["any bits"]((5, 2050), torch.float32)]
    scales = [None, SCALES["some zero"](70), SCALES["huge"](70), SCALES["everything"](2050)]
    torch.set_num_threads(threads)
    with _native.force_isa(isa):
        for k in some_ks(weights):
            check(weights, scales, k)


def test_mixed_dtypes(device):
    """The values of the coarsest type in each of the types: ties across matrices, strided weights, some scales."""
    values = [torch.randint(-3, 4, shape) / 4 for shape in ((8, 30), (11, 17), (6, 40))]
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    weights = [value.to(device, dtype) for value, dtype in zip(values, dtypes, strict=True)]
    weights[1], weights[2] = weights[1].t(), weights[2][:, 3::2]
    scales = [None, torch.full((22,), 2.0, device=device)[::2], SCALES["some zero"](weights[2].shape[1]).to(device)]
    for k in some_ks(weights):
        check(weights, scales, k)


def test_ties_go_to_the_first_matrix(device):
    weights = [torch.full((4, 5), value, device=device) for value in (1.0, -1.0, 1.0)]
    assert [ops.share_smallest(weights, [None] * 3, k) for k in (0, 7, 20, 33, 60)] == [
        [0, 0, 0],
        [7, 0, 0],
        [20, 0, 0],
        [20, 13, 0],
        [20, 20, 20],
    ]


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)], ids=str)
def test_empty_matrix(shape, device):
    weights = [torch.empty(shape, device=device), torch.randn(3, 4, device=device), torch.empty(shape, device=device)]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns
    try:
        for k in (0, 5, 12):
            assert ops.share_smallest(weights, [None] * 3, k) == [0, k, 0]
        assert ops.share_smallest(weights[:1], [None], 0) == [0]
    finally:
        torch.use_deterministic_algorithms(before)


def test_reference_equals_op(dtype):
    weights = [KINDS["few values"](shape, dtype) for shape in ((4, 9), (5, 7))]
    scales = [None, SCALES["random"](7)]
    for k in some_ks(weights):
        assert reference.share_smallest(weights, scales, k) == ops.share_smallest(weights, scales, k)


@pytest.mark.gpu
def test_across_devices(dtype):
    weights = [KINDS["few values"]((6, 50), dtype) for _ in range(3)]
    weights[1] = weights[1].cuda()
    scales = [None, SCALES["some zero"](50).cuda(), SCALES["some zero"](50)]
    for k in some_ks(weights):
        check(weights, scales, k)


BAD = [
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


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.share_smallest(*arguments)
