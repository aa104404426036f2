"""diverse_tokens: the greedy max-min choice by cosine: exactly where cosines are exact, elsewhere within rounding."""

from __future__ import annotations

import itertools

import pytest
import torch
from ops.pruning import INF, ISAS, NAN

from vlprune_ext import _native, ops, reference
from vlprune_ext.ops import selection

# B, T, d: about the tiles of either device, and chunks of depth
SHAPES = [
    (1, 1, 1),
    (2, 2, 3),
    (2, 9, 4),
    (3, 48, 16),
    (2, 127, 17),
    (1, 129, 70),
    (1, 353, 64),
    (1, 97, 600),
]


def exact(shape, dtype=torch.float32):
    """As many entries +-1 as a power of four, times a power of two: norms, and so cosines, are exact. Ties abound."""
    batch, tokens, d = shape
    entries = 4 ** ((d.bit_length() - 1) // 2)
    chosen = torch.rand(shape).argsort(-1) < entries
    signs = torch.randint(0, 2, shape) * 2.0 - 1
    return (chosen * signs * 2.0 ** torch.randint(-3, 4, (batch, tokens, 1))).to(dtype)


def with_zeros_and_copies(x):
    """A third are zeros or copies of another."""
    batch, tokens, _ = x.shape
    source = torch.arange(tokens).expand(batch, tokens).clone()
    source[torch.rand(batch, tokens) < 0.25] = int(torch.randint(0, tokens, ()))
    x = x.gather(1, source[..., None].expand(x.shape))
    x[torch.rand(batch, tokens) < 0.1] = 0
    return x


def some_candidates(x, share=0.6):
    return (torch.rand(x.shape[:2]) < share).to(x.device)


def some_keeps(tokens):
    return sorted({1, (tokens + 2) // 3, tokens - 1, tokens} - {0}) if tokens < 50 else [(tokens + 2) // 3]


def check(x, keep, candidate=None, what=""):
    """Equal to the reference in float64."""
    kept = ops.diverse_tokens(x, keep, candidate=candidate)
    assert kept.dtype == torch.bool
    assert kept.device == x.device
    expected = reference.diverse_tokens(x.double(), keep, candidate=candidate)
    assert torch.equal(kept, expected), (what, keep, list(x.shape))
    return kept


def of_divprune(x, keep):
    """[T, d] to the positions that DivPrune (arXiv 2503.02175) takes, in its order, as its authors' code has it."""
    unit = x / x.norm(dim=1, keepdim=True)
    distance = 1.0 - unit @ unit.T
    chosen = []
    for i in range(keep):
        others = distance[chosen] if i > 0 else distance.topk(2, dim=0, largest=False).values[1:]  # but itself
        least = others.amin(0)
        chosen.append(int(least.argmax()))
    return chosen


def check_greedy(x, kept, candidate=None):
    """[T, d]: kept can be taken in an order in which each is the best one left, but for rounding in fp32.

    The yardstick is the error of plain torch's cosines of the same numbers.
    """
    usable = torch.ones_like(kept) if candidate is None else candidate
    unit, in_fp32 = (torch.nn.functional.normalize(t, dim=1) for t in (x.double(), x.float()))
    similarity = unit @ unit.T
    slack = 4 * (in_fp32 @ in_fp32.T - similarity).abs().max().item()  # twice for each of two that are compared
    chosen = torch.zeros_like(kept)
    others = similarity.clone().fill_diagonal_(-INF)[:, usable]
    for _ in range(int(kept.sum())):
        closest = others.amax(1)
        left = (kept & ~chosen).nonzero()[:, 0]
        best = left[closest[left].argmin()]
        assert closest[best] <= closest[usable & ~chosen].min() + slack
        chosen[best] = True
        others = similarity[:, chosen]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference(shape, dtype, device):
    for keep in some_keeps(shape[1]):
        x = exact(shape, dtype).to(device)
        check(x, keep)
        x = with_zeros_and_copies(exact(shape, dtype)).to(device)
        check(x, keep, what="zeros and copies")
        check(x, keep, some_candidates(x), "candidates")
        each = torch.randint(0, shape[1] + 2, shape[:1]).to(device)
        kept = check(x, each, some_candidates(x, 0.9), "keep of each")
        assert torch.equal(kept, check(x, each, kept, "once more"))


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa, shape, dtype):
    x = with_zeros_and_copies(exact(shape, dtype))
    with _native.force_isa(isa):
        for keep in some_keeps(shape[1]):
            check(x, keep)
            check(x, keep, some_candidates(x))


@pytest.mark.parametrize("isa", ISAS)
def test_real_numbers(isa, dtype):
    for tokens, d, keep in ((60, 300, 60), (400, 257, 90)):
        x = torch.randn(2, tokens, d).to(dtype) + 0.5
        candidate = some_candidates(x)
        with _native.force_isa(isa):
            kept = ops.diverse_tokens(x, keep), ops.diverse_tokens(x, keep, candidate=candidate)
        assert kept[0].sum(1).tolist() == [keep, keep]
        for b in range(2):
            check_greedy(x[b], kept[0][b])
            check_greedy(x[b], kept[1][b], candidate[b])


@pytest.mark.gpu
def test_real_numbers_on_a_gpu(dtype):
    for tokens, d, keep in ((60, 300, 60), (577, 1024, 144)):
        x = torch.randn(2, tokens, d).to(dtype) + 0.5
        kept = ops.diverse_tokens(x.cuda(), keep).cpu()
        assert kept.sum(1).tolist() == [keep, keep]
        for b in range(2):
            check_greedy(x[b], kept[b])


def test_a_worse_choice_is_not_greedy():
    """What check_greedy is worth: one token exchanged for any other is refused, whatever the slack."""
    x = torch.randn(40, 300)
    kept = ops.diverse_tokens(x[None], 10)[0]
    refused = 0
    for out, into in itertools.product(kept.nonzero()[:, 0], (~kept).nonzero()[:, 0]):
        other = kept.clone()
        other[out], other[into] = False, True
        try:
            check_greedy(x, other)
        except AssertionError:
            refused += 1
    assert refused == 10 * 30


@pytest.mark.parametrize(("tokens", "keep"), [(2, 1), (50, 17), (200, 64)])
def test_equals_the_algorithm_of_the_paper(tokens, keep, dtype, device):
    """Its code takes a token twice where all others are copies of one taken: so there are none here."""
    while True:
        x = exact((1, tokens, 64), dtype)
        if len(torch.nn.functional.normalize(x[0].float()).unique(dim=0)) == tokens:
            break
    kept = ops.diverse_tokens(x.to(device), keep)
    assert kept[0].nonzero()[:, 0].tolist() == sorted(of_divprune(x[0].double(), keep))


def test_the_lower_of_two_that_are_as_close(dtype, device):
    """Whichever is asked, the distance between two has the same bits."""
    x = torch.randn(300, 2, 70, device=device).to(dtype)
    for isa in ISAS if device.type == "cpu" else ISAS[:1]:
        with _native.force_isa(isa):
            assert ops.diverse_tokens(x, 1).tolist() == [[True, False]] * 300


def test_length_does_not_matter(device):
    """Powers of two change no bit of a cosine."""
    x = torch.randn(2, 90, 40, device=device)
    scale = 2.0 ** torch.randint(-20, 20, (2, 90, 1), device=device)
    assert torch.equal(ops.diverse_tokens(x, 30), ops.diverse_tokens(x * scale, 30))


def test_by_hand(dtype, device):
    x = torch.tensor([[[2, 0], [0, 4], [-1, 0], [0, 2], [0, 0.5], [0, 0]]], dtype=dtype, device=device)
    order = [0, 2, 1, 5, 3, 4]  # 0 and 2 are opposite, to 1 and 5 nothing is closer than a right angle, 3 and 4 copy 1
    for keep in range(7):
        assert ops.diverse_tokens(x, keep)[0].nonzero()[:, 0].tolist() == sorted(order[:keep])


@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_for_every_thread_count(isa, threads, dtype):
    x = torch.randn(3, 400, 300).to(dtype)
    candidate = some_candidates(x)
    with _native.force_isa(isa):
        torch.set_num_threads(1)
        one = ops.diverse_tokens(x, 130, candidate=candidate)
        torch.set_num_threads(threads)
        assert torch.equal(one, ops.diverse_tokens(x, 130, candidate=candidate))


def gram(x):
    """What the kernel makes of x: [B, T, T] and [B, T], to be compared bit by bit."""
    batch, tokens, _ = x.shape
    scratch = [x.new_empty(shape, dtype=torch.float32) for shape in ((batch, tokens, tokens), *[(batch, tokens)] * 2)]
    _native.diverse_tokens(x, 1, None, None, *scratch, x.new_empty((batch, tokens), dtype=torch.bool))
    return scratch[0].view(torch.int32), scratch[1].view(torch.int32)


@pytest.mark.parametrize("isa", ISAS)
def test_products_do_not_depend_on_place_or_company(isa, dtype, device):
    """Wherever a pair of tokens lies, whatever the batch and T, its product has the same bits, either way round."""
    if device.type == "cuda" and isa != ISAS[0]:
        pytest.skip("instruction sets are the CPU's")
    x = torch.randn(1, 40, 700, device=device).to(dtype)
    with _native.force_isa(isa):
        products, scale = gram(x)
        assert torch.equal(products, products.mT)
        for before, behind in ((1, 0), (7, 500), (352, 3), (130, 130)):
            among = torch.randn(3, before + 40 + behind, 700, device=device).to(dtype)
            among[1, before : before + 40] = x[0]
            wider, scales = gram(among)
            assert torch.equal(wider[1, before : before + 40, before : before + 40], products[0])
            assert torch.equal(scales[1, before : before + 40], scale[0])
            assert torch.equal(wider, wider.mT)


def test_other_samples_and_padding_do_not_matter(dtype, device):
    lengths = [5, 64, 130, 99]
    keep = torch.tensor([2, 30, 40, 99], device=device)
    samples = [torch.randn(1, length, 100, device=device).to(dtype) for length in lengths]
    alone = [ops.diverse_tokens(x, int(k))[0] for x, k in zip(samples, keep, strict=True)]
    for before, filler in itertools.product((0, 3, 100), (0.0, 1.0, NAN, INF)):
        padded = torch.full((4, before + 200, 100), filler, dtype=dtype, device=device)
        candidate = torch.zeros(4, before + 200, dtype=torch.bool, device=device)
        for b, x in enumerate(samples):
            padded[b, before : before + lengths[b]] = x[0]
            candidate[b, before : before + lengths[b]] = True
        kept = ops.diverse_tokens(padded, keep, candidate=candidate)
        assert not bool((kept & ~candidate).any())
        for b, length in enumerate(lengths):
            assert torch.equal(kept[b, before : before + length], alone[b])


def test_samples_in_several_parts(monkeypatch, dtype, device):
    """As where the products of all samples together are too large."""
    x = torch.randn(7, 60, 33, device=device).to(dtype)
    keep, candidate = torch.arange(7, device=device) * 5, some_candidates(x)
    expected = ops.diverse_tokens(x, keep, candidate=candidate), ops.diverse_tokens(x, 20)
    for count in (0, 1, 2, 3, 6):
        monkeypatch.setattr(selection, "_GRAM_BYTES", 4 * 60**2 * count)
        assert torch.equal(ops.diverse_tokens(x, keep, candidate=candidate), expected[0])
        assert torch.equal(ops.diverse_tokens(x, 20), expected[1])


def test_fewer_candidates_than_keep(dtype, device):
    x = exact((3, 20, 16), dtype).to(device)
    candidate = torch.arange(20, device=device) % 10 < torch.tensor([[0], [1], [5]], device=device)
    for keep in (10, 20, 1000):
        assert torch.equal(check(x, keep, candidate), candidate)
    assert torch.equal(check(x, 2, candidate).sum(1).cpu(), torch.tensor([0, 2, 2]))


def test_without_a_direction(dtype, device):
    """NaN, infinity and fp32 squares past 2**126 come last, by position, and no other token minds them."""
    x = exact((1, 30, 16), dtype)
    expected = {keep: ops.diverse_tokens(x, keep) for keep in (1, 8, 30)}
    strange = x[:, :5].clone()
    strange[0, 0, 3], strange[0, 1, 0], strange[0, 2, 15], strange[0, 3] = NAN, INF, -INF, NAN
    strange[0, 4] = INF if dtype == torch.float16 else 2.0**63
    both = torch.cat([strange[:, :3], x, strange[:, 3:]], 1).to(device)
    for isa in ISAS if device.type == "cpu" else ISAS[:1]:
        with _native.force_isa(isa):
            for keep, without in expected.items():
                kept = ops.diverse_tokens(both, keep).cpu()
                assert torch.equal(kept[:, 3:33], without)
                assert int(kept.sum()) == keep
            for more in range(6):
                kept = ops.diverse_tokens(both, 30 + more)[0].cpu()
                assert bool(kept[3:33].all())
                assert kept[[0, 1, 2, 33, 34]].tolist() == [i < more for i in range(5)]
            alone = ops.diverse_tokens(strange.to(device), 3)
            assert alone.tolist() == [[True, True, True, False, False]]


def test_the_longest_that_has_a_direction(device):
    """Squares sum to just below 2**126; at 2**126, nothing that overflows is in the way, either."""
    x = torch.tensor([[[2.0**63 * (1 - 2**-24), 0], [2.0**63, 0], [0, 2**-60], [1, 0]]], device=device)
    assert ops.diverse_tokens(x, 3).tolist() == [[True, False, True, True]]


def test_squares_that_vanish(device):
    """Below 2**-126 a token is one of zeros: as far from its copies as from any other."""
    for tiny in (2.0**-63 * (1 - 2**-24), 1e-22, 1e-45):
        x = torch.tensor([[[1, 0], [1, 0], [tiny, 0], [tiny, 0]]], device=device)
        assert ops.diverse_tokens(x, 3).tolist() == [[True, False, True, True]]
    x = torch.tensor([[[1, 0], [2.0**-63, 0], [0, 2.0**-63], [0, 2.0**-63]]], device=device)
    assert ops.diverse_tokens(x, 2).tolist() == [[True, False, True, False]]


def test_strides(dtype, device):
    wide = exact((12, 50, 20), dtype).to(device)
    for view in (
        wide[2:9, 3:40, 4:],
        wide[::3, ::2],
        wide.transpose(0, 1),
        wide.transpose(1, 2),
        wide[1:, :, 1::2],
        wide[:1].expand(5, 50, 20),
        wide[:, :1].expand(12, 7, 20),
    ):
        candidate = some_candidates(view)[:1].expand(view.shape[:2])
        for keep in some_keeps(view.shape[1]):
            assert torch.equal(ops.diverse_tokens(view, keep), ops.diverse_tokens(view.contiguous(), keep))
            kept = ops.diverse_tokens(view, keep, candidate=candidate)
            assert torch.equal(kept, ops.diverse_tokens(view.contiguous(), keep, candidate=candidate.contiguous()))
    check(wide, torch.tensor([3], device=device).expand(12))


def test_empty(dtype, device):
    assert ops.diverse_tokens(torch.empty(0, 5, 3, dtype=dtype, device=device), 2).shape == (0, 5)
    x = torch.empty(2, 0, 3, dtype=dtype, device=device)
    assert ops.diverse_tokens(x, torch.tensor([1, 2], device=device)).shape == (2, 0)


def test_tokens_with_a_gradient():
    x = torch.randn(2, 9, 8, requires_grad=True)
    kept = ops.diverse_tokens(x * 2, 3)
    assert not kept.requires_grad
    assert torch.equal(kept, ops.diverse_tokens(x.detach(), 3))


def test_opcheck(dtype, device):
    x = torch.randn(3, 10, 8, device=device).to(dtype)
    candidate = some_candidates(x)
    torch.library.opcheck(torch.ops.vlprune.diverse_tokens, (x, 4))
    torch.library.opcheck(torch.ops.vlprune.diverse_tokens, (x, 4, None, candidate))
    torch.library.opcheck(torch.ops.vlprune.diverse_tokens, (x, 0, torch.tensor([1, 2, 3], device=device), candidate))


def test_compile_fullgraph(device):
    x = torch.randn(3, 30, 8, device=device)
    candidate, keep = some_candidates(x), torch.tensor([1, 2, 3], device=device)

    def choose(x, keep, candidate):
        return ops.diverse_tokens(x * -1, keep, candidate=candidate) & ~ops.diverse_tokens(x + 1, 4)

    compiled = torch.compile(choose, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, keep, candidate), choose(x, keep, candidate))


@pytest.mark.gpu
def test_cuda_graph(dtype):
    x = exact((3, 200, 64), dtype).cuda()
    keep, candidate = torch.tensor([7, 60, 200], device="cuda"), some_candidates(x)
    ops.diverse_tokens(x, keep, candidate=candidate)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = ops.diverse_tokens(x, keep, candidate=candidate)
    for _ in range(2):
        kept.zero_()
        graph.replay()
        assert torch.equal(kept, reference.diverse_tokens(x.double(), keep, candidate=candidate))
        x.copy_(exact((3, 200, 64), dtype))
        keep.copy_(torch.tensor([100, 0, 3]))
        candidate.copy_(some_candidates(x))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1023, 1024, 1025, 2047, 2048, 2049, 4095, 4096, 4097, 9000])
def test_every_width_of_block(tokens, dtype):
    """The widths at which the CUDA kernel changes its block or leaves registers."""
    x = with_zeros_and_copies(exact((2, tokens, 64), dtype)).cuda()
    check(x, 33)
    check(x, torch.tensor([5, 40], device="cuda"), some_candidates(x))


@pytest.mark.gpu
def test_a_negative_keep_on_a_gpu():
    kept = ops.diverse_tokens(torch.randn(2, 5, 3, device="cuda"), torch.tensor([-1, 2], device="cuda"))
    assert kept.sum(1).tolist() == [0, 2]


@pytest.mark.large
def test_samples_past_2_31_elements(dtype, device):
    """Tokens far apart in memory."""
    if dtype == torch.float32:
        pytest.skip("the 16-bit types take as many elements in half the memory")
    x = exact((3, 6, 16), dtype).to(device)
    for strides in ((2**30 + 8, 16, 1), (16, (2**31 // 5 + 8) // 8 * 8, 1)):
        storage = torch.empty(2 * strides[0] + 5 * strides[1] + 16, dtype=dtype, device=device)
        assert storage.numel() > 2**31
        check(storage.as_strided(x.shape, strides).copy_(x), 4)


# ---- bad input -------------------------------------------------------------------------------------------------------


def good():
    return {"x": torch.randn(3, 8, 4), "keep": 2, "candidate": torch.rand(3, 8) < 0.5}


BAD = [
    ({"x": [[[1.0]]]}, TypeError, r"x is a list; expected a tensor"),
    ({"x": torch.rand(3, 8, 4).double()}, TypeError, r"x has dtype torch.float64; expected float32, float16 or"),
    ({"x": torch.rand(8, 4)}, ValueError, r"x has shape \[8, 4\]; expected three dimensions \[B, T, d\]"),
    ({"x": torch.rand(3, 8, 0)}, ValueError, r"x has shape \[3, 8, 0\]; expected tokens of at least one number"),
    ({"keep": -1}, ValueError, r"keep is -1; expected keep >= 0"),
    ({"keep": 2.0}, TypeError, r"keep is 2.0; expected an int"),
    ({"keep": None}, TypeError, r"keep is None; expected an int"),
    ({"keep": [1, 2, 3]}, TypeError, r"keep is \[1, 2, 3\]; expected an int"),
    ({"keep": torch.tensor([1, 2])}, ValueError, r"keep has shape \[2\]; expected \[3\], the samples of x"),
    ({"keep": torch.tensor(1)}, ValueError, r"keep has shape \[\]; expected \[3\], the samples of x"),
    ({"keep": torch.tensor([1, 2, -3])}, ValueError, r"keep\[2\] is -3; expected keep >= 0"),
    ({"keep": torch.tensor([1.0, 2, 3])}, TypeError, r"keep has dtype torch.float32; expected int64"),
    ({"keep": torch.ones(3, dtype=torch.int64, device="meta")}, ValueError, r"keep is on meta; expected cpu as x"),
    ({"candidate": torch.rand(3, 8)}, TypeError, r"candidate has dtype torch.float32; expected bool"),
    ({"candidate": torch.rand(8) < 0.5}, ValueError, r"candidate has shape \[8\]; expected \[3, 8\], the tokens of x"),
    ({"candidate": [True]}, TypeError, r"candidate is a list; expected a tensor"),
    (
        {"candidate": torch.ones(3, 8, dtype=torch.bool, device="meta")},
        ValueError,
        r"candidate is on meta; expected cpu as x",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        ops.diverse_tokens(**{**good(), **changes})
