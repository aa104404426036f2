from __future__ import annotations

import pytest
import torch
from ops.yardstick import assert_as_exact_as

from vlprune_ext import _native, ops, reference

ISAS = _native.build_info()["available_isas"]
REDUCTIONS = ["sum", "max"]
FEW = _native.FEW_QUERIES

# B, H, Hkv, Tq, Tk, d: few queries and many; keys below, at and past a vector, a tile (48, 16, 8 on a CPU, 128 on CUDA)
# and a block (336, 128 where queries are few); queries below, at and past a panel (9, 6, 4) and a chunk (144); odd and
# even head sizes, past a chunk of the product's depth (256), too.
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (1, 2, 2, 1, 577, 64),
    (2, 8, 2, 1, 129, 80),
    (1, 4, 1, 3, 17, 8),
    (2, 2, 1, FEW, 131, 40),
    (2, 2, 1, FEW + 1, 65, 1),
    (1, 3, 3, 17, 17, 128),
    (2, 4, 2, 65, 65, 40),
    (1, 2, 2, 65, 577, 8),
    (1, 6, 3, 145, 130, 256),
    (1, 2, 1, 577, 577, 80),
    (1, 1, 1, 300, 337, 64),
    (1, 2, 2, 20, 50, 300),
]


def mask_of(tq, tk, causal, key_mask, device="cpu"):
    visible = torch.ones(tq, tk, dtype=torch.bool, device=device)
    visible = visible.tril(tk - tq) if causal else visible
    return visible[None, None] if key_mask is None else visible & key_mask[:, None, None]


def lse_of(q, k, causal=False, key_mask=None, scale=None):
    """What flash attention would return: [B, H, Tq] fp32, of the exact scores."""
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q.shape[-1] ** -0.5 if scale is None else scale) * (q.double() @ k.transpose(-1, -2))
    return scores.masked_fill(~mask_of(*scores.shape[2:], causal, key_mask, q.device), -torch.inf).logsumexp(-1).float()


def make(shape, dtype=torch.float32, device="cpu"):
    """q and k as views of projections [B, T, H, d]."""
    b, h, hkv, tq, tk, d = shape
    q = torch.randn(b, tq, h, d, device=device).to(dtype).transpose(1, 2)
    return q, torch.randn(b, tk, hkv, d, device=device).to(dtype).transpose(1, 2)


def doubled(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def check(q, k, lse, **options):
    """Plain torch is given the same lse, and q and k in fp32: sums of products are to be fp32, whatever came."""
    actual = ops.attention_importance(q, k, lse, **options)
    naive = reference.attention_importance(q.float(), k.float(), lse, **options)
    exact = reference.attention_importance(
        q.double(), k.double(), lse.double(), **{name: doubled(value) for name, value in options.items()}
    )
    size = exact.abs().max().item() if exact.numel() else 0
    # Tensor cores cut off what they add up, instead of rounding, and the exponential is the fast one.
    units = 64 if q.device.type == "cuda" and q.dtype != torch.float32 else 8
    assert_as_exact_as(actual, naive, exact, units * torch.finfo(torch.float32).eps * size)
    return actual


def weights(q):
    b, h, tq, _ = q.shape
    return {
        "head_weight": torch.randn(b, h, device=q.device),
        "query_weight": torch.rand(b, tq, device=q.device),
    }


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference(shape, reduce, dtype, device):
    q, k = make(shape, dtype, device)
    total = check(q, k, lse_of(q, k), reduce=reduce)
    if reduce == "sum":  # a softmax adds up to 1
        torch.testing.assert_close(total.sum(), torch.tensor(float(q[..., 0].numel()), device=device))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set(shape, reduce, isa, dtype):
    q, k = make(shape, dtype)
    with _native.force_isa(isa):
        check(q, k, lse_of(q, k), reduce=reduce, **weights(q))


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[3] <= s[4]] + [(1, 2, 1, 40, 30, 8)], ids=str)
def test_causal(shape, reduce, dtype, device):
    """Also with more queries than keys, where the first see none."""
    q, k = make(shape, dtype, device)
    check(q, k, lse_of(q, k, causal=True), reduce=reduce, causal=True, **weights(q))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("queries", [5, 200])
def test_causal_on_every_instruction_set(queries, isa):
    q, k = make((2, 2, 1, queries, 400, 24))
    with _native.force_isa(isa):
        for reduce in REDUCTIONS:
            check(q, k, lse_of(q, k, causal=True), reduce=reduce, causal=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("queries", [1, FEW, 70])
def test_key_mask(queries, reduce, causal, device):
    """Padding at either end, holes, and a sample of which nothing was attended."""
    q, k = make((4, 2, 2, queries, 80, 16), torch.float32, device)
    mask = torch.rand(4, 80, device=device) < 0.7
    mask[0, :7] = False
    mask[1, -9:] = False
    mask[3] = False
    lse = lse_of(q, k, causal, mask)
    assert bool((lse[3] == -torch.inf).all())
    out = check(q, k, lse, reduce=reduce, causal=causal, key_mask=mask)
    assert bool((out[~mask] == 0).all())
    assert bool((out[3] == 0).all())


@pytest.mark.parametrize("queries", [1, 30])
def test_masked_scores_may_overflow(queries, device):
    """A key that was not attended may have any score: its p would be infinite."""
    q, k = make((1, 1, 1, queries, 40, 4), torch.float32, device)
    q, k = q.abs(), k.clone()
    k[:, :, 20] = 1e4
    mask = torch.ones(1, 40, dtype=torch.bool, device=device)
    mask[0, 20] = False
    out = check(q, k, lse_of(q, k, key_mask=mask), key_mask=mask)
    assert out[0, 20] == 0


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("queries", [2, 50])
def test_rows_that_saw_no_key_give_nothing(queries, reduce, dtype, device):
    q, k = make((2, 3, 1, queries, 60, 8), dtype, device)
    lse = lse_of(q, k)
    lse[0, :, 1] = -torch.inf
    lse[1] = -torch.inf
    out = check(q, k, lse, reduce=reduce)
    assert bool((out[1] == 0).all())
    for strange in (torch.nan, torch.inf, -torch.inf):  # as the state of padding may be
        q[0, :, 1], q[1] = strange, strange
        assert torch.equal(ops.attention_importance(q, k, lse, reduce=reduce), out)
        causal = ops.attention_importance(q, k, lse, reduce=reduce, causal=True)
        assert bool(causal.isfinite().all())


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("queries", [2, 40])
def test_weights(queries, shared, reduce, device):
    q, k = make((3, 4, 2, queries, 50, 16), torch.float32, device)
    head = torch.randn(1 if shared else 3, 4, device=device)
    query = torch.randn(3, queries, device=device)
    lse = lse_of(q, k)
    check(q, k, lse, head_weight=head, reduce=reduce)
    check(q, k, lse, query_weight=query, reduce=reduce)
    check(q, k, lse, head_weight=-head.abs(), query_weight=query, reduce=reduce)
    nothing = ops.attention_importance(q, k, lse, head_weight=torch.zeros_like(head), reduce=reduce)
    assert bool((nothing == 0).all())


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3, 2])
def test_scale(scale, device):
    q, k = make((1, 2, 1, 20, 30, 8), torch.float32, device)
    check(q, k, lse_of(q, k, scale=scale), scale=scale)


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("isa", ISAS)
def test_exp_within_two_units_in_the_last_place(isa, few):
    """With d = 1, a scale of 1 and lse = 0, out is exp(k): from underflow to overflow, densely near 0."""
    x = torch.cat([torch.linspace(-110, 88.7, 300_001), 3 * torch.randn(100_000)])
    q, lse = torch.ones(1, 1, 1 if few else FEW + 1, 1), torch.full((1, 1, 1 if few else FEW + 1), -torch.inf)
    lse[0, 0, 0] = 0
    with _native.force_isa(isa):
        actual = ops.attention_importance(q, x.view(1, 1, -1, 1), lse, scale=1.0)[0]
        ends = torch.tensor([-torch.inf, -105.0, 0.0, 89.0])
        of_ends = ops.attention_importance(q[:, :, :1], ends.view(1, 1, -1, 1), lse[:, :, :1], scale=1.0)[0]
    exact = x.double().exp()
    unit = (torch.nextafter(exact.float(), torch.tensor(torch.inf)) - exact.float()).double()
    assert ((actual.double() - exact).abs() / unit).max() <= 2
    assert of_ends.tolist() == [0, 0, 1, torch.inf]


@pytest.mark.parametrize("causal", [False, True])
def test_lse_of_torchs_flash_attention(causal):
    q, k = make((2, 4, 4, 130, 130, 32))
    _, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, torch.randn_like(k), 0.0, causal)
    scores = (q @ k.transpose(-1, -2)) * 32**-0.5
    attention = scores.masked_fill(~mask_of(130, 130, causal, None), -torch.inf).softmax(-1)
    assert not lse.is_contiguous()  # torch returns it as a view of [B, Tq, H]
    torch.testing.assert_close(ops.attention_importance(q, k, lse, causal=causal), attention.sum((1, 2)))
    largest = ops.attention_importance(q, k, lse, reduce="max", causal=causal)
    torch.testing.assert_close(largest, attention.amax(1).sum(1))


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
def test_lse_of_torchs_flash_attention_on_a_gpu(causal):
    q, k = make((2, 4, 4, 130, 130, 32), torch.bfloat16, "cuda")
    lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, torch.randn_like(k), 0.0, causal)[1]
    check(q, k, lse_of(q, k, causal), causal=causal)
    scores = (q.float() @ k.float().transpose(-1, -2)) * 32**-0.5
    attention = scores.masked_fill(~mask_of(130, 130, causal, None, q.device), -torch.inf).softmax(-1)
    actual = ops.attention_importance(q, k, lse, causal=causal)
    torch.testing.assert_close(actual, attention.sum((1, 2)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("queries", [3, 300])
def test_same_bits_for_every_thread_count(queries, isa, threads, dtype):
    q, k = make((2, 2, 1, queries, 500, 16), dtype)
    lse = lse_of(q, k, causal=True)
    with _native.force_isa(isa):
        for reduce in REDUCTIONS:
            torch.set_num_threads(1)
            one = ops.attention_importance(q, k, lse, causal=True, reduce=reduce)
            torch.set_num_threads(threads)
            assert torch.equal(one, ops.attention_importance(q, k, lse, causal=True, reduce=reduce))


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("queries", [1, 150])
def test_same_bits_on_every_run(queries, reduce, dtype, device):
    q, k = make((2, 4, 2, queries, 400, 40), dtype, device)
    lse = lse_of(q, k)
    first = ops.attention_importance(q, k, lse, reduce=reduce)
    for _ in range(3):
        assert torch.equal(first, ops.attention_importance(q, k, lse, reduce=reduce))


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("queries", [1, 160])
def test_a_sample_does_not_depend_on_its_neighbours(queries, reduce, dtype, device):
    q, k = make((3, 2, 1, queries, 350, 24), dtype, device)
    lse = lse_of(q, k)
    before = ops.attention_importance(q, k, lse, reduce=reduce)
    k[0], lse[2] = torch.nan, torch.inf
    after = ops.attention_importance(q, k, lse, reduce=reduce)
    assert torch.equal(before[1], after[1])
    alone = ops.attention_importance(q[1:2], k[1:2], lse[1:2], reduce=reduce)
    assert torch.equal(before[1], alone[0])


@pytest.mark.parametrize("queries", [2, 30])
def test_strides(queries, dtype, device):
    """Slices of one fused projection, heads before tokens and after, one head for all, a last dimension apart."""
    fused = torch.randn(2, queries + 33, 3, 4, 24, device=device).to(dtype)
    q, k = fused[:, :queries, 0].transpose(1, 2), fused[:, queries:, 1].transpose(1, 2)
    lse = lse_of(q, k)
    expected = check(q, k, lse)
    assert torch.equal(expected, ops.attention_importance(q.contiguous(), k.contiguous(), lse))
    check(q[..., 1:], k[..., 1:], lse)  # rows at odd addresses
    check(q, k[:, :1].expand(2, 4, 33, 24), lse)
    check(q[:1].expand(2, 4, queries, 24), k, lse)
    apart = torch.randn(2, 4, 24, 33, device=device).to(dtype).transpose(-1, -2)
    check(q, apart, lse_of(q, apart))
    check(
        q, k, lse.transpose(1, 2).contiguous().transpose(1, 2), query_weight=torch.rand(queries, 2, device=device).t()
    )


def test_empty(device):
    q, k = make((2, 2, 1, 5, 6, 4), torch.float32, device)
    lse = lse_of(q, k)
    assert ops.attention_importance(q[:, :, :0], k, lse[:, :, :0]).tolist() == [[0.0] * 6] * 2
    assert ops.attention_importance(q, k[:, :, :0], lse).shape == (2, 0)
    assert ops.attention_importance(q[:0], k[:0], lse[:0]).shape == (0, 6)


def test_no_gradient():
    q, k = make((1, 2, 1, 4, 5, 8))
    lse = lse_of(q, k)
    assert not ops.attention_importance(q.requires_grad_(), k.requires_grad_(), lse.requires_grad_()).requires_grad


@pytest.mark.parametrize("queries", [1, 30])
def test_opcheck(queries, dtype, device):
    q, k = make((2, 4, 2, queries, 40, 16), dtype, device)
    lse, mask = lse_of(q, k), torch.ones(2, 40, dtype=torch.bool, device=device)
    op = torch.ops.vlprune.attention_importance
    torch.library.opcheck(op, (q, k, lse, None, None, "sum", False, None, 0.25))
    weigh = weights(q)
    torch.library.opcheck(op, (q, k, lse, weigh["head_weight"], weigh["query_weight"], "max", True, mask, 0.25))


def test_compile_fullgraph(device):
    q, k = make((2, 4, 2, 30, 40, 16), torch.float32, device)
    lse = lse_of(q, k)

    def kept(q, k, lse):
        return ops.attention_importance(q * 1, k, lse, reduce="max").topk(5).indices

    compiled = torch.compile(kept, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, lse), kept(q, k, lse))


@pytest.mark.gpu
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("queries", [1, 200])
def test_cuda_graph(queries, reduce, dtype):
    q, k = make((2, 4, 2, queries, 300, 64), dtype, "cuda")
    lse, mask = lse_of(q, k), torch.rand(2, 300, device="cuda") < 0.5
    ops.attention_importance(q, k, lse, reduce=reduce, key_mask=mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.attention_importance(q, k, lse, reduce=reduce, key_mask=mask)
    k.mul_(0.5)
    lse.copy_(lse_of(q, k))
    graph.replay()
    assert torch.equal(out, ops.attention_importance(q, k, lse, reduce=reduce, key_mask=mask))


@pytest.mark.gpu
def test_another_stream(dtype):
    q, k = make((1, 4, 4, 200, 300, 64), dtype, "cuda")
    lse = lse_of(q, k)
    expected = ops.attention_importance(q, k, lse)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        actual = ops.attention_importance(q, k, lse)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(actual, expected)


@pytest.mark.large
@pytest.mark.parametrize("queries", [1, 12])
@pytest.mark.parametrize("far", [0, 1, 2], ids=["sample", "head", "token"])
def test_keys_past_2_31_elements(far, queries, device):
    """The last sample, head or token starts past 2^31 elements; what lies between is never looked at."""
    q, k = make((2, 2, 2, queries, 3, 8), torch.float16, device)
    lse = lse_of(q, k)
    strides = list(k.contiguous().stride())
    strides[far] = 2**31 // (k.shape[far] - 1) + 8
    last = sum((size - 1) * stride for size, stride in zip(k.shape, strides, strict=True))
    apart = torch.empty(last + 1, dtype=k.dtype, device=device).as_strided(k.shape, strides).copy_(k)
    assert torch.equal(ops.attention_importance(q, apart, lse), ops.attention_importance(q, k, lse))


def bad(**changes):
    q, k = make((2, 4, 2, 3, 5, 8))
    return {"q": q, "k": k, "lse": torch.zeros(2, 4, 3), **changes}


BAD = [
    (bad(q=torch.randn(4, 3, 8)), ValueError, r"q has shape \[4, 3, 8\]; expected four dimensions \[B, H, Tq, d\]"),
    (bad(k=torch.randn(2, 5, 8)), ValueError, r"k has shape \[2, 5, 8\]; expected four dimensions \[B, Hkv, Tk, d\]"),
    (bad(k=torch.randn(1, 2, 5, 8)), ValueError, r"k has shape \[1, 2, 5, 8\]; expected \[2, Hkv, Tk, 8\]"),
    (bad(k=torch.randn(2, 2, 5, 7)), ValueError, r"k has shape \[2, 2, 5, 7\]; expected \[2, Hkv, Tk, 8\]"),
    (
        bad(k=torch.randn(2, 3, 5, 8)),
        ValueError,
        r"k has shape \[2, 3, 5, 8\]; expected a number of heads that divides",
    ),
    (
        bad(k=torch.randn(2, 0, 5, 8)),
        ValueError,
        r"k has shape \[2, 0, 5, 8\]; expected a number of heads that divides",
    ),
    (bad(q=torch.randn(2, 0, 3, 8)), ValueError, r"q has shape \[2, 0, 3, 8\]; expected at least one head"),
    (bad(q=torch.randn(2, 4, 3, 8).double()), TypeError, r"q has dtype torch.float64; expected float32, float16 or"),
    (bad(k=torch.randn(2, 2, 5, 8).half()), TypeError, r"k has dtype torch.float16; expected torch.float32 as q"),
    (bad(k=torch.randn(2, 2, 5, 8, device="meta")), ValueError, r"k is on meta; expected cpu as q"),
    (bad(k=None), TypeError, r"k is a NoneType; expected a tensor"),
    (
        bad(lse=torch.zeros(2, 4, 5)),
        ValueError,
        r"lse has shape \[2, 4, 5\]; expected \[2, 4, 3\], one for each row of q",
    ),
    (bad(lse=torch.zeros(2, 4, 3).double()), TypeError, r"lse has dtype torch.float64; expected float32"),
    (bad(lse=torch.zeros(2, 4, 3, device="meta")), ValueError, r"lse is on meta; expected cpu as q"),
    (bad(lse=0.0), TypeError, r"lse is a float; expected a tensor"),
    (
        bad(head_weight=torch.ones(4)),
        ValueError,
        r"head_weight has shape \[4\]; expected \[2, 4\] or \[1, 4\], the heads of q",
    ),
    (bad(head_weight=torch.ones(1, 4).half()), TypeError, r"head_weight has dtype torch.float16; expected float32"),
    (bad(head_weight=[1.0] * 4), TypeError, r"head_weight is a list; expected a tensor"),
    (
        bad(query_weight=torch.ones(1, 3)),
        ValueError,
        r"query_weight has shape \[1, 3\]; expected \[2, 3\], the queries",
    ),
    (bad(query_weight=torch.ones(2, 3).long()), TypeError, r"query_weight has dtype torch.int64; expected float32"),
    (bad(key_mask=torch.ones(2, 5)), TypeError, r"key_mask has dtype torch.float32; expected bool"),
    (
        bad(key_mask=torch.ones(2, 3, dtype=torch.bool)),
        ValueError,
        r"key_mask has shape \[2, 3\]; expected \[2, 5\], the keys",
    ),
    (
        bad(key_mask=torch.ones(2, 5, dtype=torch.bool, device="meta")),
        ValueError,
        r"key_mask is on meta; expected cpu as q",
    ),
    (bad(reduce="mean"), ValueError, r"reduce is 'mean'; expected 'sum' or 'max'"),
    (bad(reduce=None), TypeError, r"reduce is None; expected 'sum' or 'max'"),
    (bad(causal=1), TypeError, r"causal is 1; expected a bool"),
    (bad(scale="1"), TypeError, r"scale is '1'; expected a number"),
    (bad(scale=float("nan")), ValueError, r"scale is nan; expected a finite number"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.attention_importance(**arguments)
