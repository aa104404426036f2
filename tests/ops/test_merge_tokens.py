"""merge_tokens: means of what merges, to the last bit those of plain sums one after another, and their gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from ops.pruning import INF, ISAS, NAN
from ops.test_compact_tokens import choose, raw, some
from ops.yardstick import assert_as_exact_as

from vlprune_ext import _native, ops, reference

SIZES = {
    "none": lambda shape: None,
    "counts": lambda shape: torch.randint(1, 9, shape).float(),
    "any": lambda shape: torch.rand(shape) * 3,
    "some zero": lambda shape: torch.randint(0, 3, shape).float(),
    "zero": torch.zeros,
}
MATCHES = {
    "kept": lambda index, tokens: index.gather(1, torch.randint(0, index.shape[1], (index.shape[0], tokens))),
    "one": lambda index, tokens: index[:, -1:].expand(index.shape[0], tokens),
    "any": lambda index, tokens: torch.randint(-3, tokens + 3, (index.shape[0], tokens)),
    "none": lambda index, tokens: torch.full((index.shape[0], tokens), -1),
    "far": lambda index, tokens: torch.tensor([-(2**63), 2**32, 2**63 - 1, -1])[torch.arange(tokens) % 4].expand(
        index.shape[0], tokens
    ),
}


def numbers(shape, dtype, device="cpu"):
    return torch.randn(shape).to(dtype).to(device)


def layer_state(batch, tokens, device="cpu"):
    """Tensors of every dtype, and their token dimensions."""
    rows = [
        (numbers((batch, tokens, 48), torch.float32, device), 1),
        (numbers((batch, tokens, 37), torch.bfloat16, device), 1),
        (numbers((1, tokens, 16), torch.float16, device), 1),
        (numbers((batch, tokens), torch.float32, device), 1),
        (numbers((batch, 3, tokens, 16), torch.bfloat16, device), 2),
        (numbers((1, 2, tokens, 5), torch.float16, device), -2),
    ]
    return [tensor for tensor, _ in rows], [dim for _, dim in rows]


def check(index, match, tensors, size=None, dims=None, what=""):
    before = [raw(tensor.clone()) for tensor in tensors]
    out, total = ops.merge_tokens(index, match, tensors, size=size, dims=dims)
    expected, expected_total = reference.merge_tokens(index, match, tensors, size=size, dims=dims)
    assert isinstance(out, list)
    assert len(out) == len(tensors)
    assert total.dtype == torch.float32
    assert torch.equal(raw(total), raw(expected_total)), what
    for i, (tensor, result, mean) in enumerate(zip(tensors, out, expected, strict=True)):
        assert result.shape == mean.shape, (what, i)
        assert result.dtype == tensor.dtype, (what, i)
        assert result.is_contiguous(), (what, i)
        assert torch.equal(raw(result), raw(mean)), (what, i, list(tensor.shape))
        assert torch.equal(raw(tensor), before[i]), f"{what}: tensors[{i}] was written"
    return out, total


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("into", MATCHES)
def test_equals_reference(into, kind, device):
    for batch, tokens in itertools.product((1, 3), (1, 2, 63, 100)):
        tensors, dims = layer_state(batch, tokens, device)
        size = SIZES[kind]((batch, tokens))
        size = None if size is None else size.to(device)
        for keep in sorted({1, (tokens + 2) // 3, tokens}):
            index = choose(batch, tokens, keep)
            match = MATCHES[into](index, tokens).to(device)
            check(index.to(device), match, tensors, size, dims, f"{batch} {tokens} {keep}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_instruction_set_and_thread_count(isa, threads):
    torch.set_num_threads(threads)
    tensors, dims = layer_state(3, 150)
    tensors.append(numbers((3, 150, 5000), torch.bfloat16))
    index = choose(3, 150, 41)
    with _native.force_isa(isa):
        for into in MATCHES:
            check(index, MATCHES[into](index, 150), tensors, SIZES["some zero"]((3, 150)), [*dims, 1], into)


def test_as_exact_as_plain_torch(dtype, device):
    x = numbers((2, 300, 40), dtype, device)
    size = SIZES["any"]((2, 300)).to(device)
    index = choose(2, 300, 20)
    match = MATCHES["kept"](index, 300).to(device)
    index = index.to(device)
    (actual,), total = ops.merge_tokens(index, match, [x], size=size)
    belongs = (match[:, None] == index[..., None]) & torch.ones_like(match).scatter(1, index, 0).bool()[:, None]
    weight = (belongs | (index[..., None] == torch.arange(300, device=device))) * size[:, None]  # [B, K, T]
    naive = (weight @ x.float() / weight.sum(2, keepdim=True)).to(dtype)
    exact = weight.double() @ x.double() / weight.double().sum(2, keepdim=True)
    assert_as_exact_as(actual, naive, exact, torch.finfo(dtype).eps)
    torch.testing.assert_close(total, weight.sum(2))


def test_what_is_given_nothing_stays_as_it_is(dtype, device):
    """Every bit pattern, NaN and infinity among them, whatever its size."""
    x = some((2, 50, 24), dtype, device)
    index = choose(2, 50, 20, device)
    for kind in SIZES:
        size = SIZES[kind]((2, 50))
        size = None if size is None else size.to(device)
        (out,), total = ops.merge_tokens(index, torch.full((2, 50), -1, device=device), [x], size=size)
        assert torch.equal(raw(out), raw(ops.compact_tokens(index, [x])[0]))
        of_kept = torch.ones(2, 20, device=device) if size is None else size.gather(1, index)
        assert torch.equal(total, of_kept)


def test_a_token_of_size_0_gives_nothing(dtype, device):
    x = torch.tensor([[[NAN, INF], [1, 2], [NAN, -INF], [5, 4]]], device=device).to(dtype)
    size = torch.tensor([[0.0, 3, 0, 1]], device=device)
    index, match = torch.tensor([[0]], device=device), torch.zeros(1, 4, dtype=torch.int64, device=device)
    (out,), total = ops.merge_tokens(index, match, [x], size=size)
    assert out.tolist() == [[[2, 2.5]]]
    assert total.tolist() == [[4]]


def test_sums_are_fp32(device):
    """Where a sum of fp16 would be infinite, and one of bf16 would stand still."""
    x = torch.full((1, 600, 8), 60000.0, dtype=torch.float16, device=device)
    ones = torch.ones(1, 600, 8, dtype=torch.bfloat16, device=device)
    index, match = torch.tensor([[7]], device=device), torch.full((1, 600), 7, device=device)
    (of_half, of_bfloat), total = ops.merge_tokens(index, match, [x, ones])
    assert bool((of_half == 60000).all())
    assert bool((of_bfloat == 1).all())
    assert total.item() == 600


def test_one_after_another(device):
    """Merging in two steps by the sizes of the first is merging in one."""
    x = numbers((1, 9, 6), torch.float32, device)
    position = torch.arange(9, device=device)
    (x1,), size1 = ops.merge_tokens(position[None, ::2], (position // 2 * 2)[None], [x])
    index, match = torch.tensor([[1, 4]], device=device), torch.tensor([[1, -1, 1, 4, -1]], device=device)
    (x2,), size2 = ops.merge_tokens(index, match, [x1], size=size1)
    assert size2.tolist() == [[6, 3]]
    torch.testing.assert_close(x2[0, 0], x[0, :6].mean(0))
    torch.testing.assert_close(x2[0, 1], x[0, 6:].mean(0))


@pytest.mark.parametrize("tokens", [31, 32, 33, 511, 512, 513, 1100])
def test_long_lists(tokens, dtype, device):
    """Into one and into a few, across the parts in which CUDA lists tokens."""
    x = numbers((2, tokens, 8), dtype, device)
    for keep, into in itertools.product((1, 3, tokens // 2), ("kept", "one")):
        index = choose(2, tokens, keep)
        check(index.to(device), MATCHES[into](index, tokens).to(device), [x], what=f"{keep} {into}")


@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 9, 15, 16, 17, 255, 256, 257, 1030, 2047, 2048, 2049, 5000])
def test_every_width_of_a_run(width, dtype, device):
    """From those that share a vector to those that take several blocks; then from an odd address on."""
    memory = numbers((2 * 9 * width + 64,), dtype, device)
    index = choose(2, 9, 5)
    match = MATCHES["kept"](index, 9).to(device)
    for start in (0, 1, 2, 4, 8):
        tensor = memory[start : start + 2 * 9 * width].view(2, 9, width)
        check(index.to(device), match, [tensor, tensor[:, :, : width // 2 + 1]], what=str(start))


def test_more_tensors_than_a_launch_takes(device):
    index = choose(2, 20, 7)
    match = MATCHES["kept"](index, 20).to(device)
    for count in (0, 31, 32, 33, 70):
        kinds = itertools.cycle([(torch.float32, (2, 20)), (torch.float16, (1, 20)), (torch.bfloat16, (2, 20, 24))])
        tensors = [numbers(shape, kind, device) for kind, shape in itertools.islice(kinds, count)]
        check(index.to(device), match, tensors, what=str(count))


def test_rows_of_a_cache(dtype, device):
    keys, values = numbers((2, 4, 60, 16), dtype, device), numbers((2, 4, 60, 16), dtype, device)
    index = choose(8, 60, 25)
    match = MATCHES["kept"](index, 60).to(device)
    check(index.to(device), match, [keys.flatten(0, 1), values.flatten(0, 1)])


def test_strides(dtype, device):
    index = choose(2, 20, 7)
    match = MATCHES["kept"](index, 20).to(device)
    index = index.to(device)
    wide = numbers((4, 44, 6, 50), dtype, device)
    views = {
        "slices": (wide[1:3, 3:23, 1:5, 7:30], 1),
        "every other": (wide[::2, ::2, :, ::3][:, :20], 1),
        "heads behind": (wide[:2, :20].transpose(1, 2), 2),
        "heads behind, part": (wide[:2, :20, 1:4, :16].transpose(1, 2), 2),
        "tokens last": (wide[:2, :, 0, :20], 2),
        "reversed": (wide[:2, :20].permute(0, 3, 2, 1), 3),
        "uneven before": (wide[:2, :3, :4, 5:25].transpose(1, 2), 3),
        "transposed behind": (wide[:2, :20].transpose(2, 3), 1),
        "expanded batch": (wide[:1, :20].expand(2, 20, 6, 50), 1),
        "expanded tokens": (wide[:2, :1].expand(2, 20, 6, 50), 1),
    }
    for name, (tensor, dim) in views.items():
        check(index, match, [tensor], None, [dim], name)
    tensors, dims = zip(*views.values(), strict=True)
    size = torch.rand(20, 2, device=device).t()
    check(index.t().contiguous().t(), match.t().contiguous().t(), tensors, size, dims, "all together")


def test_a_sample_does_not_depend_on_its_neighbours(dtype, device):
    """Alone; then beside others and among padding: the same bits."""
    x, size = numbers((1, 70, 33), dtype, device), torch.rand(1, 70, device=device)
    index = choose(1, 70, 20)
    match = MATCHES["kept"](index, 70).to(device)
    index = index.to(device)
    (alone,), total = ops.merge_tokens(index, match, [x], size=size)
    padded = torch.full((3, 101, 33), NAN, dtype=dtype, device=device)
    sizes, matches = torch.ones(3, 101, device=device), torch.full((3, 101), -1, device=device)
    matches[0] = 11
    padded[1, 11:81], sizes[1, 11:81], matches[1, 11:81] = x[0], size[0], match[0] + 11
    (among,), totals = ops.merge_tokens((index + 11).expand(3, 20), matches, [padded], size=sizes)
    assert torch.equal(among[1], alone[0])
    assert torch.equal(totals[1], total[0])


def test_empty(device):
    index, match = (
        torch.zeros(2, 0, dtype=torch.int64, device=device),
        torch.zeros(2, 5, dtype=torch.int64, device=device),
    )
    out, total = ops.merge_tokens(index, match, [torch.ones(2, 5, 3, device=device)])
    assert (out[0].shape, total.shape) == ((2, 0, 3), (2, 0))
    index = torch.tensor([[0, 3], [1, 2]], device=device)
    out, total = ops.merge_tokens(index, match, [])
    assert out == []
    assert total.tolist() == [[4, 1], [1, 1]]
    assert ops.merge_tokens(index, match, [torch.ones(2, 5, 0, device=device)])[0][0].shape == (2, 2, 0)
    out, total = ops.merge_tokens(index[:0], match[:0], [torch.ones(0, 5, 2, device=device)])
    assert (out[0].shape, total.shape) == ((0, 2, 2), (0, 2))


def test_after_match_tokens(dtype, device):
    """ToMe's step: a half looks for its nearest in the other, and the closest of it merge."""
    x = numbers((2, 40, 16), dtype, device)
    target = (torch.arange(40, device=device) % 2 == 1).expand(2, 40)
    similarity, match = ops.match_tokens(x, target)
    index = ops.select_tokens(-similarity, 30)  # -inf, those of no match, come first
    (out,), size = ops.merge_tokens(index, match, [x])
    assert size.sum(1).tolist() == [40, 40]
    torch.testing.assert_close((out.double() * size[..., None]).sum(1), x.double().sum(1), rtol=0, atol=0.1)
    gone = torch.ones(2, 40, dtype=torch.bool, device=device).scatter(1, index, False)
    assert bool((gone <= ~target).all())
    least = similarity.masked_fill(~gone, torch.inf).amin(1)
    assert bool((least >= similarity.masked_fill(gone, -torch.inf).amax(1)).all())


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SIZES)
def test_gradient_equals_that_of_plain_torch(kind, dtype, device):
    """Among tensors that have none, an output that is not used, a shared batch."""
    index = choose(3, 20, 7)
    match = MATCHES["any"](index, 20).to(device)
    index, size = index.to(device), SIZES[kind]((3, 20))
    size = torch.ones(3, 20, device=device) if size is None else size.to(device)
    leaves = [numbers(shape, dtype, device) for shape in ((3, 20, 6), (1, 20, 6), (3, 4, 20, 6), (3, 20))]
    dims = [1, 1, 2, 1]

    dropped = torch.ones_like(match).scatter(1, index, 0).bool()
    weight = ((match[:, None] == index[..., None]) & dropped[:, None]).double() * size[:, None]
    weight = weight.scatter_add(2, index[..., None], size.double().gather(1, index)[..., None])
    whole = weight.sum(2, keepdim=True)
    itself = torch.zeros_like(weight).scatter(2, index[..., None], 1.0)
    share = torch.where(whole > 0, weight / whole, itself)  # [B, K, T]

    def plain(tensors):
        return [
            torch.einsum("bkt,bt...->bk...", share, x.movedim(dim, 1).double().expand(3, *x.movedim(dim, 1).shape[1:]))
            .movedim(1, dim)
            .to(dtype)
            for x, dim in zip(tensors, dims, strict=True)
        ]

    def grads(of):
        inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        out = of(inputs)
        sum((tensor.double().square() * (i + 1)).sum() for i, tensor in enumerate(out[:3])).backward()
        return [leaf.grad for leaf in inputs]

    def merged(inputs):
        out, total = ops.merge_tokens(index, match, [*inputs, leaves[0].clone()], size=size, dims=[*dims, 1])
        assert [tensor.requires_grad for tensor in out] == [True] * 4 + [False]
        assert not total.requires_grad
        return out

    ours, theirs = grads(merged), grads(plain)
    assert ours[3] is None
    assert theirs[3] is None
    for mine, other in zip(ours[:3], theirs[:3], strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, other, rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


def test_gradient_of_nothing(device):
    for tokens in (0, 5):
        x = torch.ones(2, tokens, 3, device=device, requires_grad=True)
        index, match = (torch.zeros(2, n, dtype=torch.int64, device=device) for n in (0, tokens))
        ops.merge_tokens(index, match, [x])[0][0].sum().backward()
        assert torch.equal(x.grad, torch.zeros_like(x))


# ---- torch's machinery -----------------------------------------------------------------------------------------------


def good(device="cpu"):
    return {
        "index": torch.tensor([[0, 2], [1, 4]], device=device),
        "match": torch.tensor([[0, 0, 2, 2, -1], [1, 1, 1, 4, 4]], device=device),
        "tensors": [torch.rand(2, 5, 3, device=device), torch.rand(1, 2, 5, device=device).bfloat16()],
        "size": torch.rand(2, 5, device=device),
        "dims": [1, 2],
    }


def test_opcheck(device):
    arguments = good(device)
    torch.library.opcheck(torch.ops.vlprune.merge_tokens, tuple(arguments.values()))
    index, match, tensors = arguments["index"], arguments["match"], arguments["tensors"]
    torch.library.opcheck(torch.ops.vlprune.merge_tokens, (index, match, [tensors[0].requires_grad_()], None, None))


def test_compile_fullgraph(device):
    arguments = good(device)
    hidden = arguments["tensors"][0]

    def merge(hidden, index, match, size):
        out, total = ops.merge_tokens(index, match, [hidden * 2], size=size)
        return out[0] + 1, total

    compiled = torch.compile(merge, fullgraph=True, backend="aot_eager")
    ones = []
    for run in (compiled, merge):
        mine = hidden.clone().requires_grad_()
        out, total = run(mine, arguments["index"], arguments["match"], arguments["size"])
        out.square().sum().backward()
        ones.append((out, total, mine.grad))
    for of_compiled, of_eager in zip(*ones, strict=True):
        assert torch.equal(of_compiled, of_eager)


@pytest.mark.gpu
def test_cuda_graph():
    tensors, dims = layer_state(2, 100, "cuda")
    index = choose(2, 100, 40)
    match, size = MATCHES["kept"](index, 100).cuda(), torch.rand(2, 100, device="cuda")
    index = index.cuda()
    ops.merge_tokens(index, match, tensors, size=size, dims=dims)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, total = ops.merge_tokens(index, match, tensors * 7, size=size, dims=dims * 7)  # more than a launch takes
    for _ in range(2):
        for tensor in (*out, total):
            tensor.zero_()
        graph.replay()
        expected, expected_total = ops.merge_tokens(index, match, tensors, size=size, dims=dims)
        assert torch.equal(total, expected_total)
        for result, mean in zip(out, expected * 7, strict=True):
            assert torch.equal(result, mean)
        index.copy_(choose(2, 100, 40))
        match.copy_(MATCHES["kept"](index.cpu(), 100))
        for tensor in tensors:
            tensor.normal_()


@pytest.mark.gpu
def test_same_bits_as_on_the_cpu():
    tensors, dims = layer_state(2, 600)
    index, size = choose(2, 600, 50), torch.rand(2, 600)
    match = MATCHES["kept"](index, 600)
    here, total = ops.merge_tokens(index, match, tensors, size=size, dims=dims)
    there, total_there = ops.merge_tokens(
        index.cuda(), match.cuda(), [tensor.cuda() for tensor in tensors], size=size.cuda(), dims=dims
    )
    assert torch.equal(total, total_there.cpu())
    for of_cpu, of_gpu in zip(here, there, strict=True):
        assert torch.equal(of_cpu, of_gpu.cpu())


@pytest.mark.large
def test_tokens_past_2_31_bytes(device):
    near = numbers((1, 3, 8), torch.bfloat16, device)
    far = torch.empty(2**31 + 8, dtype=torch.bfloat16, device=device).as_strided((1, 3, 8), (0, 2**30, 1)).copy_(near)
    index, match = torch.tensor([[2]], device=device), torch.tensor([[2, 2, 2]], device=device)
    assert torch.equal(ops.merge_tokens(index, match, [far])[0][0], ops.merge_tokens(index, match, [near])[0][0])


# ---- bad input -------------------------------------------------------------------------------------------------------


def with_tensor(tensor):
    return {"tensors": [torch.rand(2, 5, 3), tensor]}


BAD = [
    ({"index": [[1]]}, TypeError, r"index is a list; expected a tensor"),
    ({"index": torch.zeros(2, 2).int()}, TypeError, r"index has dtype torch.int32; expected int64"),
    ({"index": torch.tensor([1, 2])}, ValueError, r"index has shape \[2\]; expected two dimensions \[B, K\]"),
    ({"index": torch.tensor([[0, 2], [1, 5]])}, ValueError, r"index\[1, 1\] is 5; expected 0 <= index < 5"),
    ({"index": torch.tensor([[0, 2], [4, 1]])}, ValueError, r"index\[1, 1\] is 1 behind 4; expected ascending"),
    ({"index": torch.tensor([[0, 2], [1, 1]])}, ValueError, r"index\[1, 1\] is 1 behind 1; expected ascending"),
    ({"index": torch.arange(12).view(2, 6)}, ValueError, r"index has shape \[2, 6\]; expected at most 5 tokens"),
    ({"match": None}, TypeError, r"match is a NoneType; expected a tensor"),
    ({"match": torch.zeros(2, 5)}, TypeError, r"match has dtype torch.float32; expected int64"),
    ({"match": torch.tensor([1, 2])}, ValueError, r"match has shape \[2\]; expected two dimensions \[B, T\]"),
    (
        {"match": torch.zeros(2, 6, dtype=torch.int64)},
        ValueError,
        r"match has shape \[2, 6\]; expected \[2, 5\], the tokens of tensors",
    ),
    (
        {"match": torch.zeros(2, 5, dtype=torch.int64, device="meta")},
        ValueError,
        r"match is on meta; expected cpu as index",
    ),
    ({"tensors": torch.rand(2, 5)}, TypeError, r"tensors is a Tensor; expected a sequence of tensors"),
    ({"tensors": [torch.rand(2, 5), None]}, TypeError, r"tensors\[1\] is a NoneType; expected a tensor"),
    (with_tensor(torch.ones(2, 1, 5).int()), TypeError, r"tensors\[1\] has dtype torch.int32; expected float32, float"),
    (with_tensor(torch.rand(2, 4, 6)), ValueError, r"tensors\[1\] has shape \[2, 4, 6\], 6 tokens in dimension 2; exp"),
    (with_tensor(torch.rand(3, 4, 5)), ValueError, r"tensors\[1\] has shape \[3, 4, 5\]; expected a batch of 2 as"),
    (with_tensor(torch.ones(2, 4, 5, device="meta")), ValueError, r"tensors\[1\] is on meta; expected cpu as index"),
    ({"size": [1.0]}, TypeError, r"size is a list; expected a tensor"),
    ({"size": torch.ones(2, 5).double()}, TypeError, r"size has dtype torch.float64; expected float32"),
    ({"size": torch.ones(2, 4)}, ValueError, r"size has shape \[2, 4\]; expected \[2, 5\], the tokens of match"),
    ({"size": torch.tensor([[1.0] * 5, [1, 1, -1, 1, 1]])}, ValueError, r"size\[1, 2\] is -1.0; expected a finite"),
    ({"size": torch.tensor([[1.0] * 5, [1, 1, 1, NAN, 1]])}, ValueError, r"size\[1, 3\] is nan; expected a finite"),
    ({"size": torch.tensor([[1.0] * 5, [INF, 1, 1, 1, 1]])}, ValueError, r"size\[1, 0\] is inf; expected a finite"),
    ({"dims": [1]}, ValueError, r"dims has 1 entries; expected 2, one for each of tensors"),
    ({"dims": [1, 2.0]}, TypeError, r"dims\[1\] is 2.0; expected an int"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input(changes, error, message):
    arguments = {**good(), **changes}
    index, match, tensors = arguments.pop("index"), arguments.pop("match"), arguments.pop("tensors")
    with pytest.raises(error, match=message):
        ops.merge_tokens(index, match, tensors, **arguments)
