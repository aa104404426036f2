from __future__ import annotations

import pytest
import torch

from vlprune_ext import _native, ops, reference
from vlprune_ext.ops import ablation

ISAS = _native.build_info()["available_isas"]

# V, N, M, D
SHAPES = [
    (1, 1, 1, 1),
    (1, 1, 40, 3),
    (2, 5, 17, 7),
    (1, 14, 32, 16),
    (2, 13, 31, 15),
    (1, 15, 33, 257),
    (3, 40, 100, 64),
    (1, 200, 1100, 130),
    (1, 9, 530, 700),
]


def whole(shape, dtype, device="cpu"):
    """Small whole numbers: their scores are exact in fp32, so ranks can be compared for equality and ties abound."""
    return torch.randint(-3, 4, shape, device=device).to(dtype)


def check(query, gallery, positives):
    actual = ops.retrieval_rank(query, gallery, positives)
    assert actual.dtype == torch.int32
    assert torch.equal(actual, reference.retrieval_rank(query.double(), gallery.double(), positives))
    return actual


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference(shape, shared, dtype, device):
    v, n, m, d = shape
    positives = torch.randint(0, m, (n,), device=device)
    check(whole((v, n, d), dtype, device), whole((1 if shared else v, m, d), dtype, device), positives)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set(shape, isa, dtype):
    v, n, m, d = shape
    with _native.force_isa(isa):
        check(whole((v, n, d), dtype), whole((v, m, d), dtype), torch.randint(0, m, (n, 2)))


def test_two_dimensions(dtype, device):
    query, gallery = whole((9, 8), dtype, device), whole((30, 8), dtype, device)
    positives = torch.randint(0, 30, (9,), device=device)
    flat = check(query, gallery, positives)
    assert flat.shape == (9,)
    assert torch.equal(ops.retrieval_rank(query[None], gallery[None], positives[:, None]), flat[None])


def embeddings(device="cpu"):
    """Normalised embeddings, a third of the gallery close to the first item, and two positives for each query."""
    query = torch.nn.functional.normalize(torch.randn(2, 60, 300, device=device), dim=-1)
    gallery = torch.randn(700, 300, device=device)
    gallery[::3] = (
        gallery[0] + torch.randn(234, 300, device=device) * torch.logspace(-1, -8, 234, device=device)[:, None]
    )
    positives = torch.randint(0, 700, (60, 2), device=device)
    positives[::2] //= 233 * 3  # mostly the first
    return query, torch.nn.functional.normalize(gallery, dim=-1), positives


def check_as_in_float64(query, gallery, positives):
    """A rank may differ from float64's only by items within rounding of the threshold."""
    rank = ops.retrieval_rank(query, gallery, positives)
    scores = query.double() @ gallery.double().T
    best = scores.gather(-1, positives.expand(2, 60, 2)).amax(-1, keepdim=True)
    slack = 1e-6
    assert bool((rank >= (scores > best + slack).sum(-1)).all())
    assert bool((rank <= (scores > best - slack).sum(-1) - 1).all())  # the positive itself is no item above


@pytest.mark.parametrize("isa", ISAS)
def test_real_scores_rank_as_in_float64(isa):
    with _native.force_isa(isa):
        check_as_in_float64(*embeddings())


def test_real_scores_rank_as_in_float64_on_any_device(device):
    check_as_in_float64(*embeddings(device))


SCALES = [1.0, 1e-12, 1e-19, 1e-25, 1e-38, 1e-42, 1e12, 1e18, 1e25, 1e38]


@pytest.mark.parametrize("kind", ["embeddings", "lengths", "not finite"])
def test_no_rank_depends_on_the_room_for_a_list(kind, device, monkeypatch):
    """In fp32 on a GPU: what the tensor cores decide with the help of a list, all scores in fp32 decide without one."""
    query, gallery, positives = embeddings(device)
    if kind != "embeddings":
        lengths = torch.tensor(SCALES, device=device)
        query[0] *= lengths.repeat(6)[:, None]
        gallery *= lengths.repeat(70)[torch.randperm(700, device=device), None]
        gallery[100:110] = 0
        query[1, 5] = 0
    if kind == "not finite":
        gallery[200, 7], gallery[300, 8], query[1, 9, 10] = torch.inf, -torch.inf, torch.inf
        gallery[400:402, 9] = torch.tensor([torch.inf, -torch.inf], device=device)
        query[1, 20, 30] = torch.nan
    for items in (gallery, torch.stack([gallery, gallery.flip(0)])):
        ranks = []
        for room in (2**17, 0):
            monkeypatch.setattr(ablation, "_FEWEST_LISTED", room)
            monkeypatch.setattr(ablation, "_SCORES_PER_LISTED", 2**40)
            ranks.append(torch.ops.vlprune.retrieval_rank(query, items, positives))
        assert torch.equal(*ranks)
        assert bool((ranks[0] >= 0).any())


def test_copies_of_a_positive_are_ties(dtype, device):
    """Exact copies of the positive, wherever they lie in the gallery, are never higher, although scores are rounded."""
    query = torch.randn(30, 515, device=device).to(dtype)
    gallery = torch.randn(200, 515, device=device).to(dtype)
    gallery[torch.arange(0, 200, 3, device=device)] = gallery[0].clone()
    positives = torch.zeros(30, dtype=torch.int64, device=device)
    others = torch.ones(200, dtype=torch.bool, device=device)
    others[::3] = False
    only_others = gallery[torch.cat([torch.tensor([0], device=device), others.nonzero()[:, 0]])].contiguous()
    assert torch.equal(ops.retrieval_rank(query, gallery, positives), ops.retrieval_rank(query, only_others, positives))
    same = gallery[:1].expand(200, 515)
    assert ops.retrieval_rank(query, same, positives).eq(0).all()


def test_a_permuted_gallery_gives_the_same_ranks(dtype, device):
    """A score has the same bits wherever its item lies: real numbers, no tolerance."""
    query = torch.randn(2, 33, 300, device=device).to(dtype)
    gallery = torch.randn(2, 517, 300, device=device).to(dtype)
    positives = torch.randint(0, 517, (33,), device=device)
    order = torch.randperm(517, device=device)
    where = torch.empty_like(order)
    where[order] = torch.arange(517, device=device)
    rank = ops.retrieval_rank(query, gallery, positives)
    assert torch.equal(rank, ops.retrieval_rank(query, gallery[:, order], where[positives]))


def test_best_of_several_positives(dtype, device):
    query, gallery = whole((25, 12), dtype, device), whole((80, 12), dtype, device)
    positives = torch.randint(0, 80, (25, 4), device=device)
    each = torch.stack([ops.retrieval_rank(query, gallery, column) for column in positives.T])
    assert torch.equal(ops.retrieval_rank(query, gallery, positives), each.amin(0))
    padded = torch.cat([torch.full_like(positives[:, :1], -1), positives, torch.full_like(positives[:, :1], -1)], 1)
    assert torch.equal(ops.retrieval_rank(query, gallery, padded), each.amin(0))


def test_all_scores_negative_or_infinite(dtype, device):
    query = torch.ones(3, 4, device=device).to(dtype)
    gallery = -torch.arange(1, 36, device=device).to(dtype)[:, None].expand(35, 4).contiguous()
    positives = torch.tensor([0, 10, 34], device=device)
    assert ops.retrieval_rank(query, gallery, positives).tolist() == [0, 10, 34]
    gallery[5] = float("inf")
    assert ops.retrieval_rank(query, gallery, positives).tolist() == [1, 10, 34]
    gallery[10] = float("-inf")
    assert ops.retrieval_rank(query, gallery, positives).tolist() == [1, 34, 33]


@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize("isa", ISAS)
def test_same_ranks_for_every_thread_count(isa, threads, dtype):
    query, gallery = torch.randn(2, 75, 300).to(dtype), torch.randn(1, 1111, 300).to(dtype)
    positives = torch.randint(0, 1111, (75, 2))
    with _native.force_isa(isa):
        torch.set_num_threads(1)
        one = ops.retrieval_rank(query, gallery, positives)
        torch.set_num_threads(threads)
        assert torch.equal(one, ops.retrieval_rank(query, gallery, positives))


def test_strides(dtype, device):
    query = whole((12, 3, 20), dtype, device).transpose(0, 1)
    gallery = whole((20, 50), dtype, device).t()
    positives = torch.randint(0, 50, (2, 12), device=device).t()
    check(query, gallery, positives)


@pytest.mark.parametrize("where", ["query", "gallery", "positive"])
def test_nan_raises(where, dtype, device):
    query, gallery = whole((2, 40, 20), dtype, device), whole((1, 90, 20), dtype, device)
    positives = torch.arange(40, device=device)
    target = {"query": query[1, 23], "gallery": gallery[0, 77], "positive": gallery[0, 0]}[where]
    target[3] = float("nan")
    with pytest.raises(ValueError, match=r"query \[\d+, \d+\] has a NaN among its scores"):
        ops.retrieval_rank(query, gallery, positives)
    marked = torch.ops.vlprune.retrieval_rank(query, gallery, positives)
    if where == "query":
        assert (marked == -1).nonzero().tolist() == [[1, 23]]
    else:
        assert bool((marked == -1).all())


def test_infinity_minus_infinity_is_nan(device):
    query = torch.tensor([[1.0, -1.0], [1.0, 1.0]], device=device)
    gallery = torch.tensor([[0.0, 0.0], [float("inf"), float("inf")]], device=device)
    with pytest.raises(ValueError, match=r"query \[0\] has a NaN"):
        ops.retrieval_rank(query, gallery, torch.zeros(2, dtype=torch.int64, device=device))


def test_no_queries(device):
    none = torch.empty(0, 4, device=device)
    positives = torch.empty(0, dtype=torch.int64, device=device)
    assert ops.retrieval_rank(none, torch.randn(3, 4, device=device), positives).shape == (0,)
    no_variant = torch.empty(0, 2, 4, device=device)
    positives = torch.zeros(2, dtype=torch.int64, device=device)
    assert ops.retrieval_rank(no_variant, torch.randn(1, 3, 4, device=device), positives).shape == (0, 2)


def test_opcheck(dtype, device):
    positives = torch.randint(0, 20, (7,), device=device)
    query, gallery = whole((2, 7, 9), dtype, device), whole((1, 20, 9), dtype, device)
    torch.library.opcheck(torch.ops.vlprune.retrieval_rank, (query, gallery, positives))
    torch.library.opcheck(torch.ops.vlprune.retrieval_rank, (query[0], gallery[0], positives[:, None]))


def test_compile_fullgraph(device):
    query, gallery = whole((2, 7, 9), torch.float32, device), whole((20, 9), torch.float32, device)
    positives = torch.randint(0, 20, (7,), device=device)

    def recall(query, gallery):
        return (ops.retrieval_rank(query * 2, gallery, positives) < 5).float().mean(-1)

    compiled = torch.compile(recall, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(query, gallery), recall(query, gallery))
    query[1, 3, 0] = float("nan")  # not looked at while compiled; -1 counts as "below 5" for who does not look, either
    marked = torch.compile(ops.retrieval_rank, fullgraph=True, backend="aot_eager")(query, gallery, positives)
    assert marked[1, 3] == -1


@pytest.mark.gpu
def test_cuda_graph(dtype):
    query, gallery = whole((2, 40, 64), dtype, "cuda"), whole((1, 300, 64), dtype, "cuda")
    positives = torch.randint(0, 300, (40,), device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rank = ops.retrieval_rank(query, gallery, positives)
    rank.zero_()
    graph.replay()
    assert torch.equal(rank, ops.retrieval_rank(query, gallery, positives))
    query[0, 5, 0] = float("nan")
    graph.replay()
    assert rank[0, 5] == -1


@pytest.mark.large
def test_gallery_past_2_31_elements(device):
    m = 2**31 // 64 + 1000
    gallery = torch.zeros(m, 64, dtype=torch.float16, device=device)
    gallery[:, 0] = 1
    gallery[m - 7, 0] = 5
    gallery[123, 0] = 3
    query = torch.ones(2, 64, dtype=torch.float16, device=device)
    positives = torch.tensor([m - 1, 123], device=device)
    assert ops.retrieval_rank(query, gallery, positives).tolist() == [2, 1]


def bad(**changes):
    arguments = {
        "query": torch.randn(2, 4, 6),
        "gallery": torch.randn(1, 9, 6),
        "positives": torch.tensor([0, 1, 2, 8]),
    }
    return {**arguments, **changes}


BAD = [
    (bad(query=torch.randn(6)), ValueError, r"query has shape \[6\]; expected \[V, N, D\] or \[N, D\]"),
    (bad(gallery=torch.randn(6)), ValueError, r"gallery has shape \[6\]; expected \[V, M, D\]"),
    (bad(gallery=torch.randn(1, 9, 7)), ValueError, r"gallery has shape \[1, 9, 7\]; expected embeddings of size 6"),
    (
        bad(gallery=torch.randn(3, 9, 6)),
        ValueError,
        r"gallery has shape \[3, 9, 6\]; expected a leading dimension of 1 or",
    ),
    (bad(gallery=torch.randn(1, 0, 6)), ValueError, r"gallery has shape \[1, 0, 6\]; expected between 1 and"),
    (bad(query=torch.randn(4, 0), gallery=torch.randn(9, 0)), ValueError, r"query has shape \[4, 0\]; expected embed"),
    (bad(positives=torch.tensor([0, 1, 2])), ValueError, r"positives has shape \[3\]; expected \[4\] or \[4, P\]"),
    (
        bad(positives=torch.zeros(4, 0, dtype=torch.int64)),
        ValueError,
        r"positives has shape \[4, 0\]; expected at least",
    ),
    (bad(positives=torch.tensor([0, 1, 2, 9])), ValueError, r"positives\[3\] is 9; expected 0 <= index < 9"),
    (
        bad(positives=torch.tensor([[0], [1], [-2], [3]])),
        ValueError,
        r"positives\[2, 0\] is -2; expected 0 <= index < 9",
    ),
    (
        bad(positives=torch.tensor([0, -1, 2, 3])),
        ValueError,
        r"positives\[1\] has no index >= 0; expected at least one",
    ),
    (bad(positives=torch.zeros(4)), TypeError, r"positives has dtype torch.float32; expected int64"),
    (bad(positives=[0, 1, 2, 3]), TypeError, r"positives is a list; expected a tensor"),
    (bad(query=torch.randn(2, 4, 6).double()), TypeError, r"query has dtype torch.float64; expected float32, float16"),
    (
        bad(gallery=torch.randn(9, 6).half()),
        TypeError,
        r"gallery has dtype torch.float16; expected torch.float32 as query",
    ),
    (bad(gallery=None), TypeError, r"gallery is a NoneType; expected a tensor"),
    (bad(gallery=torch.randn(9, 6, device="meta")), ValueError, r"gallery is on meta; expected cpu as query"),
    (
        bad(positives=torch.zeros(4, dtype=torch.int64, device="meta")),
        ValueError,
        r"positives is on meta; expected cpu",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.retrieval_rank(**arguments)
