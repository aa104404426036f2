"""match_tokens: the nearest target of each source, beside the whole matrix of cosines."""

from __future__ import annotations

import pytest
import torch
from ops.pruning import INF, ISAS, NAN
from ops.yardstick import assert_as_exact_as

from vlprune_ext import _native, ops, reference

# B, T, d: tokens below, at and past a vector, a tile (48, 16, 8 columns and 9, 6, 4 rows on a CPU, 128 of each on CUDA)
# and a block of targets on a CPU (352 at d = 256); odd and even d, past a chunk of the product's depth (256), too.
SHAPES = [(1, 1, 1), (2, 2, 3), (3, 17, 8), (2, 49, 40), (1, 130, 24), (2, 300, 33), (1, 577, 64), (1, 900, 300)]


def make(shape, dtype=torch.float32, device="cpu"):
    """Keys as a slice of a wider projection."""
    b, t, d = shape
    return torch.randn(b, t, d + 8, device=device).to(dtype)[..., 8:]


def some(key, share):
    return torch.rand(key.shape[:2], device=key.device) < share


def cosines(key, target, source):
    """[B, T, T] fp64 of sources and targets; -inf elsewhere."""
    key = key.double()
    length = key.norm(dim=-1)
    cosine = (
        key @ key.mT / (length[:, :, None] * length[:, None]).where((length > 0)[:, :, None] & (length > 0)[:, None], 1)
    )
    possible = source[:, :, None] & target[:, None] & ~torch.eye(key.shape[1], dtype=torch.bool, device=key.device)
    return cosine.masked_fill(~possible | cosine.isnan(), -torch.inf)


def check(key, target, source=None):
    similarity, match = ops.match_tokens(key, target, source=source)
    naive, _ = reference.match_tokens(key.float(), target, source=source)
    exact, _ = reference.match_tokens(key.double(), target, source=source)
    assert similarity.dtype == torch.float32
    assert match.dtype == torch.int64
    none = exact == -torch.inf
    assert bool((similarity[none] == -torch.inf).all())
    assert bool((match[none] == -1).all())
    # Tensor cores cut off what they add up, instead of rounding.
    units = 64 if key.device.type == "cuda" and key.dtype != torch.float32 else 8
    floor = units * torch.finfo(torch.float32).eps
    assert_as_exact_as(similarity[~none], naive[~none], exact[~none], floor)
    chosen = cosines(key, target, ~target if source is None else source).gather(2, match.clamp(min=0)[..., None])[
        ..., 0
    ]
    assert_as_exact_as(chosen[~none].float(), naive[~none], exact[~none], floor)
    return similarity, match


@pytest.mark.parametrize("share", [0.03, 0.5, 0.95])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference(shape, share, dtype, device):
    key = make(shape, dtype, device)
    check(key, some(key, share))
    check(key, some(key, share), some(key, 0.6))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set(shape, isa, dtype):
    key = make(shape, dtype)
    with _native.force_isa(isa):
        check(key, some(key, 0.5))
        check(key, some(key, 0.5), some(key, 0.5))


def test_as_in_tome(dtype, device):
    """Every other token looks for one of the rest."""
    key = make((2, 20, 16), dtype, device)
    target = (torch.arange(20, device=device) % 2 == 1).expand(2, 20)
    similarity, match = check(key, target)
    assert bool((match[:, 0::2] % 2 == 1).all())
    assert bool((match[:, 1::2] == -1).all())
    unit = torch.nn.functional.normalize(key.double(), dim=-1)
    best = (unit[:, 0::2] @ unit[:, 1::2].mT).max(-1)
    assert torch.equal(match[:, 0::2], 2 * best.indices + 1)
    torch.testing.assert_close(similarity[:, 0::2].double(), best.values, rtol=0, atol=1e-5)


def test_ties_go_to_the_lower_position(dtype, device):
    """Copies of a few vectors, some of them scaled by a power of two: cosines that are the same to the last bit."""
    few = torch.randn(7, 24)
    for tokens in (40, 700):
        scale = 2.0 ** torch.randint(-2, 3, (2, tokens, 1))
        key = (few[torch.randint(0, 7, (2, tokens))].to(dtype) * scale.to(dtype)).to(device)
        for source in (None, torch.ones(2, tokens, dtype=torch.bool, device=device)):
            target = some(key, 0.5)
            cosine = cosines(key, target, ~target if source is None else source)
            best = cosine.amax(2, keepdim=True)
            first = (cosine >= best - 1e-6).int().argmax(2).masked_fill(best[..., 0] == -torch.inf, -1)
            for isa in ISAS if device.type == "cpu" else ISAS[:1]:
                with _native.force_isa(isa):
                    assert torch.equal(ops.match_tokens(key, target, source=source)[1], first), isa


def test_a_token_does_not_match_itself(dtype, device):
    key = make((3, 200, 16), dtype, device)
    every = torch.ones(3, 200, dtype=torch.bool, device=device)
    _, match = check(key, every, every)
    assert bool((match != torch.arange(200, device=device)).all())
    one = torch.zeros_like(every)
    one[:, 7] = True
    similarity, match = check(key, one, every)
    assert match[:, 7].tolist() == [-1] * 3
    assert similarity[:, 7].tolist() == [-INF] * 3
    assert bool((match[:, :7] == 7).all())


def test_no_target_and_no_source(device):
    key = make((4, 30, 8), torch.float32, device)
    target = some(key, 0.5)
    target[1], target[2] = False, True
    similarity, match = check(key, target)
    assert bool((match[1:3] == -1).all())
    assert bool((similarity[1:3] == -torch.inf).all())
    assert ops.match_tokens(key, target, source=torch.zeros_like(target))[1].eq(-1).all()


def test_zero_vectors(dtype, device):
    key = torch.tensor([[[0.0, 0], [-1, 0], [-0.0, 0], [1, 0], [-1, -1]]], device=device).to(dtype)
    source = torch.tensor([[True, False, False, True, False]], device=device)
    similarity, match = ops.match_tokens(key, ~source)
    assert match.tolist() == [[1, -1, -1, 2, -1]]  # of zero length, 0 with all; and 0 is more than -1
    assert similarity.tolist() == [[0, -INF, -INF, 0, -INF]]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_nan_is_no_similarity(bad, dtype, device):
    key = make((3, 60, 16), dtype, device)
    target = some(key, 0.5)
    target[:, 0], target[:, 1] = True, False
    key[0, 0, 3] = key[0, 1, 5] = bad
    key[2].masked_fill_(target[2, :, None], bad)
    for isa in ISAS if device.type == "cpu" else ISAS[:1]:
        with _native.force_isa(isa):
            similarity, match = ops.match_tokens(key, target)
            assert match[0, 1] == -1, isa
            assert similarity[0, 1] == -torch.inf, isa
            assert bool((match[0] != 0).all()), isa
            assert bool((match[2] == -1).all()), isa
            assert bool((similarity[2] == -torch.inf).all()), isa
            nowhere = target.clone()
            nowhere[0, 0] = False
            without = ops.match_tokens(key, nowhere)
            assert torch.equal(similarity[0, 1:], without[0][0, 1:]), isa
            assert torch.equal(match[0, 1:], without[1][0, 1:]), isa


def test_a_squared_length_beyond_fp32(device):
    key = torch.tensor([[[1e20, 0.0], [1, 0], [1, 1], [1e-30, 0], [1e20, 0]]], device=device)
    target = torch.tensor([[True, False, True, True, False]], device=device)
    similarity, match = ops.match_tokens(key, target)
    assert match.tolist() == [[-1, 2, -1, -1, -1]]  # infinite is no length, 1e-60 is 0
    torch.testing.assert_close(similarity[0, 1].item(), 0.5**0.5)


def test_a_sample_does_not_depend_on_its_neighbours(dtype, device):
    """Alone; then beside others, among padding, at other addresses: the same bits."""
    for tokens, d in ((50, 24), (200, 33), (300, 300)):
        key = make((1, tokens, d), dtype, device)
        target, source = some(key, 0.4), some(key, 0.7)
        similarity, match = ops.match_tokens(key, target, source=source)
        padded = torch.full((3, tokens + 37, d), NAN, dtype=dtype, device=device)
        crowd, seekers = torch.zeros(2, 3, tokens + 37, dtype=torch.bool, device=device)
        padded[0], crowd[0], seekers[2] = 1, True, True
        inside = slice(20, 20 + tokens)
        padded[1, inside], crowd[1, inside], seekers[1, inside] = key[0], target[0], source[0]
        among = ops.match_tokens(padded, crowd, source=seekers)
        assert torch.equal(among[0][1, inside], similarity[0])
        assert torch.equal(among[1][1, inside] - 20, match[0].where(match[0] >= 0, -21))
        by_default, default = ops.match_tokens(padded, crowd), ops.match_tokens(key, target)
        assert torch.equal(by_default[0][1, inside], default[0][0])


@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_for_every_thread_count(isa, threads, dtype):
    key = make((3, 400, 300), dtype)
    target, source = some(key, 0.5), some(key, 0.5)
    with _native.force_isa(isa):
        torch.set_num_threads(1)
        one = ops.match_tokens(key, target, source=source)
        torch.set_num_threads(threads)
        for _ in range(3):
            several = ops.match_tokens(key, target, source=source)
            assert torch.equal(one[0], several[0])
            assert torch.equal(one[1], several[1])


def test_same_bits_on_every_run(dtype, device):
    key = make((2, 700, 72), dtype, device)
    target = some(key, 0.5)
    first = ops.match_tokens(key, target)
    for _ in range(3):
        again = ops.match_tokens(key, target)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


def test_strides(dtype, device):
    wide = torch.randn(3, 70, 4, 40, device=device).to(dtype)
    for key in (
        wide[:2, :60, 1, 4:37],
        wide[:2, ::2, 2, :],
        wide[:2, :60, :, 5].transpose(1, 2),
        wide[:1, :60, 0].expand(2, 60, 40),
        wide[:, :2].permute(1, 0, 2, 3).flatten(2),
        wide[:2, :1, 0].expand(2, 9, 40),
    ):
        target, source = some(key, 0.5), some(key, 0.5)
        expected = check(key, target, source)
        for actual in (
            ops.match_tokens(key.contiguous(), target, source=source),
            ops.match_tokens(key, target.t().contiguous().t(), source=source.t().contiguous().t()),
        ):
            assert torch.equal(actual[0], expected[0])
            assert torch.equal(actual[1], expected[1])


def test_empty(device):
    key = make((2, 5, 4), torch.float32, device)
    target = some(key, 0.5)
    for of in (ops, reference):
        assert [out.shape for out in of.match_tokens(key[:, :0], target[:, :0])] == [(2, 0)] * 2
        assert [out.shape for out in of.match_tokens(key[:0], target[:0])] == [(0, 5)] * 2


def test_no_gradient():
    key = make((1, 5, 4)).requires_grad_()
    assert not ops.match_tokens(key, some(key, 0.5))[0].requires_grad


# ---- torch's machinery -----------------------------------------------------------------------------------------------


def test_opcheck(dtype, device):
    key = make((2, 30, 8), dtype, device)
    torch.library.opcheck(torch.ops.vlprune.match_tokens, (key, some(key, 0.5)))
    torch.library.opcheck(torch.ops.vlprune.match_tokens, (key, some(key, 0.5), some(key, 0.5)))


def test_compile_fullgraph(device):
    key = make((2, 30, 8), torch.float32, device)
    target = some(key, 0.5)

    def match(key, target):
        similarity, match = ops.match_tokens(key * 2, target)
        return similarity + 1, match

    compiled = torch.compile(match, fullgraph=True, backend="aot_eager")
    for of_compiled, of_eager in zip(compiled(key, target), match(key, target), strict=True):
        assert torch.equal(of_compiled, of_eager)


@pytest.mark.gpu
def test_cuda_graph(dtype):
    key = make((3, 577, 64), dtype, "cuda").contiguous()
    target, source = some(key, 0.1), some(key, 0.6)
    ops.match_tokens(key, target, source=source)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.match_tokens(key, target, source=source)
    for share in (0.1, 0.9):  # the host does not know how many there are
        target.copy_(some(key, share))
        key.normal_()
        graph.replay()
        for replayed, eager in zip(out, ops.match_tokens(key, target, source=source), strict=True):
            assert torch.equal(replayed, eager)


@pytest.mark.gpu
def test_another_stream(dtype):
    key = make((2, 300, 64), dtype, "cuda")
    target = some(key, 0.5)
    expected = ops.match_tokens(key, target)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        actual = ops.match_tokens(key, target)
    stream.synchronize()
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [127, 128, 129, 511, 512, 513, 2500])
def test_widths_of_tiles_and_lists(tokens, dtype):
    """And batches of which a block takes several tiles."""
    for batch, share in ((1, 0.5), (40, 0.3)):
        key = make((batch, tokens, 40), dtype, "cuda")
        check(key, some(key, share), some(key, 0.8))


@pytest.mark.gpu
def test_no_matrix_in_memory():
    key = make((1, 16384, 64), torch.bfloat16, "cuda")
    target = some(key, 0.5)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ops.match_tokens(key, target)
    assert torch.cuda.max_memory_allocated() - before < 3 * key.numel() * key.element_size()


@pytest.mark.large
def test_tokens_past_2_31_elements(dtype, device):
    if dtype == torch.float32:
        pytest.skip("the 16-bit types take as many elements in half the memory")
    near = make((1, 3, 8), dtype, device)
    far = torch.empty(2**31 + 8, dtype=dtype, device=device).as_strided((1, 3, 8), (0, 2**30, 1)).copy_(near)
    target = torch.tensor([[True, False, True]], device=device)
    for actual, expected in zip(ops.match_tokens(far, target), ops.match_tokens(near, target), strict=True):
        assert torch.equal(actual, expected)


# ---- bad input -------------------------------------------------------------------------------------------------------


def good():
    return {"key": torch.rand(2, 5, 3), "target": torch.rand(2, 5) < 0.5, "source": None}


BAD = [
    ({"key": [[1.0]]}, TypeError, r"key is a list; expected a tensor"),
    ({"key": torch.rand(2, 5, 3).double()}, TypeError, r"key has dtype torch.float64; expected float32, float16 or"),
    ({"key": torch.rand(2, 5)}, ValueError, r"key has shape \[2, 5\]; expected three dimensions \[B, T, d\]"),
    ({"key": torch.rand(2, 5, 0)}, ValueError, r"key has shape \[2, 5, 0\]; expected vectors of at least one number"),
    ({"target": None}, TypeError, r"target is a NoneType; expected a tensor"),
    ({"target": torch.rand(2, 5)}, TypeError, r"target has dtype torch.float32; expected bool"),
    ({"target": torch.rand(5) < 1}, ValueError, r"target has shape \[5\]; expected \[2, 5\], the tokens of key"),
    (
        {"target": torch.ones(2, 5, dtype=torch.bool, device="meta")},
        ValueError,
        r"target is on meta; expected cpu as key",
    ),
    ({"source": [True]}, TypeError, r"source is a list; expected a tensor"),
    ({"source": torch.ones(2, 5).int()}, TypeError, r"source has dtype torch.int32; expected bool"),
    ({"source": torch.rand(2, 4) < 1}, ValueError, r"source has shape \[2, 4\]; expected \[2, 5\], the tokens of key"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        ops.match_tokens(**{**good(), **changes})
