"""compact_tokens: plain indexing of every tensor, bit for bit, and its gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from ops.pruning import ISAS

from vlprune_ext import _native, ops, reference

DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.complex128,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.uint8,
    torch.bool,
)


def some(shape, dtype, device="cpu"):
    """Any bits at all; of bools, both."""
    if dtype == torch.bool:
        return (torch.rand(shape) < 0.5).to(device)
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (count,), dtype=torch.uint8).view(dtype).view(shape).to(device)


def choose(batch, tokens, keep, device="cpu"):
    return torch.rand(batch, tokens).argsort(1)[:, :keep].sort(1).values.to(device)


def raw(tensor):
    """Bits, so that a NaN equals itself."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor).flatten().view(torch.uint8)


def indexed(index, tensor, dim):
    """Plain indexing, row by row."""
    rows = [
        (tensor[0] if tensor.shape[0] == 1 else tensor[b])[(slice(None),) * (dim - 1) + (kept,)]
        for b, kept in enumerate(index)
    ]
    return torch.stack(rows)


def check(index, tensors, dims=None, what="", module=ops):
    before = [raw(tensor.clone()) for tensor in tensors]
    out = module.compact_tokens(index, tensors, dims)
    assert isinstance(out, list)
    assert len(out) == len(tensors)
    places = [1] * len(tensors) if dims is None else [d % t.dim() for d, t in zip(dims, tensors, strict=True)]
    for i, (tensor, result, dim) in enumerate(zip(tensors, out, places, strict=True)):
        expected = indexed(index, tensor, dim)
        assert result.shape == expected.shape, (what, i)
        assert result.dtype == tensor.dtype, (what, i)
        assert result.is_contiguous() or module is reference, (what, i)
        assert torch.equal(raw(result), raw(expected)), (what, i, list(tensor.shape))
        assert torch.equal(raw(tensor), before[i]), f"{what}: tensors[{i}] was written"
    return out


def layer_state(batch, tokens, dtype, device="cpu", width=48, heads=3, d=16):
    """Tensors and token dimensions of a decoder layer."""
    return {
        "hidden": (some((batch, tokens, width), dtype, device), 1),
        "position ids": (torch.arange(tokens, device=device).expand(batch, tokens).contiguous(), 1),
        "shared position ids": (torch.arange(tokens, device=device)[None], 1),
        "mask": (some((batch, tokens), torch.bool, device), 1),
        "cos": (some((1, tokens, d), dtype, device), 1),
        "sin": (some((batch, tokens, d), dtype, device), 1),
        "keys": (some((batch, heads, tokens, d), dtype, device), 2),
        "values": (some((batch, heads, tokens, d), dtype, device), -2),
        "4-D mask, rows": (some((batch, 1, tokens, tokens), dtype, device), 2),
        "4-D mask, columns": (some((1, 1, tokens, tokens), dtype, device), 3),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_equals_indexing(dtype, device):
    for batch, tokens in itertools.product((1, 3), (1, 2, 63)):
        tensors, dims = zip(*layer_state(batch, tokens, dtype, device).values(), strict=True)
        for keep in sorted({1, (tokens + 1) // 2, tokens}):
            check(choose(batch, tokens, keep, device), tensors, dims, f"{batch} {tokens} {keep}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_instruction_set_and_thread_count(isa, threads):
    torch.set_num_threads(threads)
    tensors, dims = zip(*layer_state(2, 90, torch.bfloat16, width=700).values(), strict=True)
    with _native.force_isa(isa):
        check(choose(2, 90, 41), tensors, dims)


@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 12, 13, 16, 17, 255, 256, 257, 1030, 4096, 5000])
def test_every_width_of_a_run(width, device):
    """Bytes: from those that share a vector to those that take several blocks; then from an odd address on."""
    memory = some((2 * 9 * width + 64,), torch.uint8, device)
    for start in (0, 1, 2, 4, 8, 16):
        tensor = memory[start : start + 2 * 9 * width].view(2, 9, width)
        check(choose(2, 9, 5, device), [tensor, tensor[:, :, : width // 2 + 1]], what=str(start))


def test_more_tensors_than_a_launch_takes(device):
    index = choose(2, 20, 7, device)
    for count in (31, 32, 33, 64, 65, 100):
        kinds = itertools.cycle([(torch.bool, (2, 20)), (torch.int64, (1, 20)), (torch.bfloat16, (2, 20, 24))])
        check(index, [some(shape, dtype, device) for dtype, shape in itertools.islice(kinds, count)], what=str(count))


def test_a_layer_much_wider_than_the_others(device):
    """Tensors of very different sizes in one launch, the second half of them empty."""
    index = choose(1, 70, 33, device)
    shapes = [(1, 70), (1, 70, 9000), (1, 70, 0), (1, 0, 70, 4), (1, 70, 1), (1, 40, 70, 2)]
    check(index, [some(shape, torch.float32, device) for shape in shapes], [1, 1, 1, 2, 1, 2])


def test_strides(dtype, device):
    index = choose(2, 20, 7, device)
    wide = some((4, 44, 6, 50), dtype, device)
    views = {
        "slices": (wide[1:3, 3:23, 1:5, 7:30], 1),
        "every other": (wide[::2, ::2, :, ::3][:, :20], 1),
        "one run of all": (wide[:2, :20], 1),
        "heads behind": (wide[:2, :20].transpose(1, 2), 2),
        "heads behind, part": (wide[:2, :20, 1:4, :16].transpose(1, 2), 2),
        "channels first": (wide[:2, 0, :, :20].transpose(1, 2), 1),
        "tokens last": (wide[:2, :, 0, :20], 2),
        "tokens last, transposed": (wide[:2, :20, 0].transpose(1, 2), 2),
        "reversed": (wide[:2, :20].permute(0, 3, 2, 1), 3),
        "uneven before": (wide[:2, :3, :4, 5:25].transpose(1, 2), 3),
        "uneven between": (wide.permute(0, 2, 1, 3)[:2, 0:4:3, :4, 5:25], 3),
        "uneven behind": (wide[:2, :20, :4, ::2], 1),
        "transposed behind": (wide[:2, :20].transpose(2, 3), 1),
        "expanded batch": (wide[:1, :20].expand(2, 20, 6, 50), 1),
        "expanded tokens": (wide[:2, :1].expand(2, 20, 6, 50), 1),
        "expanded behind": (wide[:2, :20, :, :1].expand(2, 20, 6, 50), 1),
        "expanded between": (wide[:2, :1, 0, :20].expand(2, 9, 20), 2),
    }
    for name, (tensor, dim) in views.items():
        check(index, [tensor], [dim], name)
    tensors, dims = zip(*views.values(), strict=True)
    check(index, tensors, dims)
    check(index.t().contiguous().t(), tensors, dims, "a strided index")


def test_any_order_and_repeats(device):
    index = torch.tensor([[4, 0, 0], [1, 4, 2]], device=device)
    check(index, [some((2, 5, 3), torch.float32, device)])


def test_conjugate_view(device):
    tensor = torch.randn(1, 5, 3, dtype=torch.complex64, device=device)
    index = torch.tensor([[1, 3]], device=device)
    assert torch.equal(ops.compact_tokens(index, [tensor.conj()])[0], tensor[:, [1, 3]].conj())


def test_empty(device):
    none = torch.empty(2, 0, dtype=torch.int64, device=device)
    tensors = [torch.ones(2, 5, 3, device=device), torch.ones(1, 4, 5, device=device), torch.ones(2, 5, device=device)]
    assert [out.shape for out in ops.compact_tokens(none, tensors, [1, 2, 1])] == [(2, 0, 3), (2, 4, 0), (2, 0)]
    index = torch.zeros(2, 3, dtype=torch.int64, device=device)
    assert ops.compact_tokens(index, []) == []
    assert ops.compact_tokens(index, [torch.empty(2, 5, 0, device=device)])[0].shape == (2, 3, 0)
    of_no_batch = ops.compact_tokens(index[:0], [torch.empty(0, 5, 2, device=device), torch.ones(1, 5, device=device)])
    assert [out.shape for out in of_no_batch] == [(0, 3, 2), (0, 3)]
    assert ops.compact_tokens(none, [torch.empty(2, 0, 3, device=device)])[0].shape == (2, 0, 3)


def test_reference_equals_indexing(device):
    for batch in (1, 3):
        tensors, dims = zip(*layer_state(batch, 20, torch.float32, device).values(), strict=True)
        check(choose(batch, 20, 7, device), tensors, dims, module=reference)


# ---- gradients -------------------------------------------------------------------------------------------------------


def test_gradcheck(device):
    index = choose(2, 5, 3, device)
    shapes = [((2, 5), 1), ((2, 5, 3), 1), ((2, 2, 5, 2), 2), ((1, 5, 2), 1), ((2, 3, 5), -1)]
    tensors = [torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True) for shape, _ in shapes]
    dims = [dim for _, dim in shapes]

    def run(*tensors):
        return tuple(ops.compact_tokens(index, tensors, dims))

    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


def test_gradient_equals_that_of_indexing(dtype, device):
    """Among tensors that have none, an output that is not used, a shared batch."""
    index = choose(3, 20, 7, device)
    leaves = [torch.randn(shape, device=device).to(dtype) for shape in ((3, 20, 6), (1, 20, 6), (3, 4, 20, 6), (3, 20))]
    others = [torch.arange(20, device=device)[None], torch.rand(3, 20, device=device) < 0.5, leaves[0].clone()]
    dims = [1, 1, 2, 1, 1, 1, 1]

    def grads(of):
        inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        out = of(index, [*inputs, *others], dims)
        assert [tensor.requires_grad for tensor in out] == [True] * 4 + [False] * 3
        loss = sum((tensor.float().square() * (i + 1)).sum() for i, tensor in enumerate(out[:3]))
        loss.backward()
        return [leaf.grad for leaf in inputs]

    def each(index, tensors, dims):
        return [indexed(index, tensor, dim) for tensor, dim in zip(tensors, dims, strict=True)]

    ours, plain = grads(ops.compact_tokens), grads(each)
    assert ours[3] is None
    assert plain[3] is None
    for i in range(3):
        assert ours[i].dtype == dtype
        torch.testing.assert_close(ours[i], plain[i], rtol=3 * torch.finfo(dtype).eps, atol=0)


def test_no_graph_without_need():
    tensor = torch.randn(1, 5, 3, requires_grad=True)
    index = torch.tensor([[1, 3]])
    with torch.no_grad():
        assert not ops.compact_tokens(index, [tensor])[0].requires_grad
    assert ops.compact_tokens(index, [tensor])[0].requires_grad


# ---- torch's machinery -----------------------------------------------------------------------------------------------


def test_opcheck(device):
    index = choose(2, 10, 4, device)
    hidden, keys = torch.randn(2, 10, 3, device=device), torch.randn(1, 2, 10, 3, device=device)
    ids = torch.arange(10, device=device)[None]
    torch.library.opcheck(torch.ops.vlprune.compact_tokens, (index, [hidden, ids], None))
    tensors = [hidden.requires_grad_(), ids, keys.requires_grad_()]
    torch.library.opcheck(torch.ops.vlprune.compact_tokens, (index, tensors, [1, 1, -2]))


def test_compile_fullgraph(device):
    index = choose(2, 10, 4, device)
    hidden, keys = torch.randn(2, 10, 3, device=device), torch.randn(2, 2, 10, 3, device=device)

    def compact(index, hidden, keys):
        kept = ops.compact_tokens(index, [hidden * 2, keys], [1, 2])
        return kept[0] + 1, kept[1]

    compiled = torch.compile(compact, fullgraph=True, backend="aot_eager")
    ones = []
    for run in (compiled, compact):
        mine, yours = hidden.clone().requires_grad_(), keys.clone().requires_grad_()
        out = run(index, mine, yours)
        (out[0].sum() + out[1].square().sum()).backward()
        ones.append((out[0], out[1], mine.grad, yours.grad))
    for of_compiled, of_eager in zip(*ones, strict=True):
        assert torch.equal(of_compiled, of_eager)


def test_after_select_tokens(dtype, device):
    """The two together, compiled, as a forward pass runs them."""
    score, hidden = torch.rand(2, 30, device=device).to(dtype), torch.randn(2, 30, 8, device=device).to(dtype)

    def prune(score, hidden):
        return ops.compact_tokens(ops.select_tokens(score, 12), [hidden])[0]

    kept = torch.compile(prune, fullgraph=True, backend="aot_eager")(score, hidden)
    assert torch.equal(kept, hidden.gather(1, reference.select_tokens(score, 12)[:, :, None].expand(2, 12, 8)))


@pytest.mark.gpu
def test_cuda_graph(dtype):
    index = choose(2, 100, 40, "cuda")
    tensors, dims = zip(*layer_state(2, 100, dtype, "cuda").values(), strict=True)
    ops.compact_tokens(index, tensors, dims)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.compact_tokens(index, tensors * 4, dims * 4)  # more than a launch takes
    for _ in range(2):
        for tensor in out:
            tensor.zero_()
        graph.replay()
        for tensor, result, dim in zip(tensors * 4, out, dims * 4, strict=True):
            assert torch.equal(raw(result), raw(indexed(index, tensor, dim % tensor.dim())))
        index.copy_(choose(2, 100, 40))
        for tensor in tensors:
            tensor.copy_(tensor.flip(0) if tensor.dtype == torch.bool else -tensor)


@pytest.mark.large
def test_sizes_past_2_31(device):
    """Tokens far apart in the source, and rows of one result beyond 2**31 bytes."""
    far = torch.empty(2**31 + 10, dtype=torch.uint8, device=device).as_strided((1, 3, 5), (0, 2**30, 1))
    far.copy_(some((1, 3, 5), torch.uint8))
    index = torch.tensor([[0, 2]], device=device)
    assert torch.equal(ops.compact_tokens(index, [far])[0], far[:, [0, 2]])
    row = some((1, 2, 1 << 20), torch.uint8, device)
    repeated = torch.ones(1, 2**11 + 1, dtype=torch.int64, device=device)
    repeated[0, -1] = 0
    out = ops.compact_tokens(repeated, [row])[0]
    assert out.numel() > 2**31
    assert torch.equal(out[:, -2:], row.flip(1))
    assert bool((out[0, :-1, 7] == row[0, 1, 7]).all())


# ---- bad input -------------------------------------------------------------------------------------------------------


def good():
    return {
        "index": torch.tensor([[0, 2], [1, 4]]),
        "tensors": [torch.rand(2, 5, 3), torch.rand(1, 2, 5)],
        "dims": [1, 2],
    }


def with_tensor(tensor):
    return {"tensors": [torch.rand(2, 5, 3), tensor]}


BAD = [
    ({"index": [[1]]}, TypeError, r"index is a list; expected a tensor"),
    ({"index": torch.zeros(2, 2).int()}, TypeError, r"index has dtype torch.int32; expected int64"),
    ({"index": torch.tensor([1, 2])}, ValueError, r"index has shape \[2\]; expected two dimensions \[B, K\]"),
    ({"tensors": torch.rand(2, 5)}, TypeError, r"tensors is a Tensor; expected a sequence of tensors"),
    ({"tensors": iter([])}, TypeError, r"tensors is a list_iterator; expected a sequence of tensors"),
    ({"tensors": [torch.rand(2, 5), None]}, TypeError, r"tensors\[1\] is a NoneType; expected a tensor"),
    (with_tensor(torch.rand(2)), ValueError, r"tensors\[1\] has shape \[2\]; expected \[B, .., T, ..\]"),
    (with_tensor(torch.rand(3, 4, 5)), ValueError, r"tensors\[1\] has shape \[3, 4, 5\]; expected a batch of 2 as"),
    (
        with_tensor(torch.rand(2, 4, 6)),
        ValueError,
        r"tensors\[1\] has shape \[2, 4, 6\], 6 tokens in dimension 2; expected 5 as tensors\[0\]",
    ),
    (with_tensor(torch.ones(2, 4, 5, device="meta")), ValueError, r"tensors\[1\] is on meta; expected cpu as index"),
    ({"dims": [1]}, ValueError, r"dims has 1 entries; expected 2, one for each of tensors"),
    (
        {"dims": [1, 0]},
        ValueError,
        r"dims\[1\] is 0; expected a dimension of tensors\[1\] \[1, 2, 5\] behind its batch",
    ),
    ({"dims": [1, 3]}, ValueError, r"dims\[1\] is 3; expected .* 1 <= dim < 3"),
    ({"dims": [1, -3]}, ValueError, r"dims\[1\] is -3; expected"),
    ({"dims": [1, -4]}, ValueError, r"dims\[1\] is -4; expected"),
    ({"dims": [1, 2.0]}, TypeError, r"dims\[1\] is 2.0; expected an int"),
    ({"dims": torch.tensor([1, 2])}, TypeError, r"dims is a Tensor; expected None or a sequence of int"),
    ({"index": torch.tensor([[0, 2], [1, 5]])}, ValueError, r"index\[1, 1\] is 5; expected 0 <= index < 5"),
    ({"index": torch.tensor([[0, -1], [1, 4]])}, ValueError, r"index\[0, 1\] is -1; expected 0 <= index < 5"),
    ({"index": torch.tensor([[2**62, 0], [1, 4]])}, ValueError, r"index\[0, 0\] is 4611686018427387904; expected"),
    (
        {"tensors": [torch.rand(2, 0, 3)], "dims": [1]},
        ValueError,
        r"tensors\[0\] has shape \[2, 0, 3\]; expected at least one token",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        ops.compact_tokens(**{**good(), **changes})


def test_a_bad_index_under_compile():
    def compact(index, tensor):
        return ops.compact_tokens(index, [tensor])[0]

    compiled = torch.compile(compact, fullgraph=True, backend="aot_eager")
    compiled(torch.tensor([[0, 4]]), torch.rand(1, 5, 3))
    with pytest.raises(ValueError, match=r"index\[0, 1\] is 5; expected 0 <= index < 5"):
        compiled(torch.tensor([[0, 5]]), torch.rand(1, 5, 3))
