"""Token-pruning ops beside plain torch and beside the attention they look at, at the shapes of real models.

Run: ``make bench``, or ``pytest benchmarks -o python_files='bench_*.py'`` to only look.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from timing import bytes_of

from vlprune_ext import _native, ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# name: H, Hkv, d
MODELS = {"LLaVA-1.5-7B": (32, 32, 128), "Qwen2.5-VL-7B": (28, 4, 128)}


def make(h, hkv, tq, tk, d, dtype, device):
    """Views of projections [1, T, H, d]."""
    q = torch.randn(1, tq, h, d, device=device).to(dtype).transpose(1, 2)
    k, v = (torch.randn(1, tk, hkv, d, device=device).to(dtype).transpose(1, 2) for _ in range(2))
    return q, k, v


def flash(q, k, v):
    """Output and log-sum-exp of SDPA's flash forward, whose kernels know no groups of heads."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]


def lse_in_torch(q, k):
    """Head by head, where flash attention does not take the dtype or the heads."""
    group = q.shape[1] // k.shape[1]
    heads = [(q[:, h].float() @ k[:, h // group].float().mT * q.shape[-1] ** -0.5) for h in range(q.shape[1])]
    return torch.stack([scores.logsumexp(-1) for scores in heads], 1)


def map_in_torch(q, k, reduce):
    if q.shape[1] != k.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    attention = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return attention.sum((1, 2)) if reduce == "sum" else attention.amax(1).sum(1)


def skip_what_torch_takes_minutes_for(dtype, device):
    if device.type == "cpu" and dtype != torch.float32:
        pytest.skip("torch takes minutes for this product of 16-bit matrices where the CPU has none of its own")


MEASURE_RSS = """
import sys, torch
from vlprune_ext import ops
h, t, d = map(int, sys.argv[1:4])
dtype = getattr(torch, sys.argv[5])
q, k = torch.randn(1, h, t, d).to(dtype), torch.randn(1, h, t, d).to(dtype)
lse = torch.full((1, h, t), float(t)).log()
ops.attention_importance(q[:, :, :1], k[:, :, :1], lse[:, :, :1])
def status(key):
    return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1]) / 1024
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
before = status("VmRSS")
ops.attention_importance(q, k, lse, reduce=sys.argv[4])
print(status("VmHWM") - before)
"""


def extra_memory_mb(h: int, t: int, d: int, reduce: str, dtype: torch.dtype, device: torch.device) -> float:
    """What one call needs beyond its inputs, at its peak: by a process's resident memory, or by CUDA's allocator."""
    if device.type == "cpu":
        sizes = [str(value) for value in (h, t, d, reduce, str(dtype).removeprefix("torch."))]
        command = [sys.executable, "-c", MEASURE_RSS, *sizes]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    q, k, _ = make(h, h, t, t, d, dtype, device)
    lse = torch.zeros(1, h, t, device=device)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ops.attention_importance(q, k, lse, reduce=reduce)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("tokens", [576, 2048, 8192])
def test_attention_importance(tokens, reduce, dtype, device, compare):
    """Beside the eager map; at 8192 tokens on a CPU alone, where the map is 8.6 GB."""
    skip_what_torch_takes_minutes_for(dtype, device)
    name = "LLaVA-1.5-7B"
    h, hkv, d = MODELS[name]

    def inputs():
        q, k, v = make(h, hkv, tokens, tokens, d, dtype, device)
        in_torch = device.type == "cuda" and dtype == torch.float32
        return q, k, lse_in_torch(q, k) if in_torch else flash(q, k, v)[1]

    extra = {}
    if tokens == 8192:
        memory, map_mb = extra_memory_mb(h, tokens, d, reduce, dtype, device), dtype.itemsize * h * tokens**2 / 2**20
        extra = {"extra_memory_mb": memory, "notes": f"{memory:.1f} MB extra; the map: {map_mb:.0f}"}
        assert memory < 0.01 * map_mb
    alone = device.type == "cpu" and tokens == 8192
    compare(
        f"attention_importance, {reduce}",
        f"{name}: H={h} T={tokens} d={d}",
        lambda q, k, lse: ops.attention_importance(q, k, lse, reduce=reduce),
        None if alone else lambda q, k, lse: map_in_torch(q, k, reduce),
        inputs=inputs,
        baseline_name="" if alone else "softmax(q @ k.T), reduced",
        dtype=dtype,
        flops=2 * h * tokens**2 * d,
        moved=2 * h * tokens * d * dtype.itemsize + 4 * h * tokens,
        rounds=2 if alone else 5,
        **extra,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("tokens", [576, 2048, 8192])
def test_attention_importance_beside_flash(tokens, dtype, device, compare):
    """What the attention itself costs: with the log-sum-exp in hand, half its products and none of its output."""
    skip_what_torch_takes_minutes_for(dtype, device)
    if device.type == "cuda" and dtype == torch.float32:
        pytest.skip("flash attention takes 16-bit numbers on a GPU")
    name = "LLaVA-1.5-7B"
    h, hkv, d = MODELS[name]

    def inputs():
        q, k, v = make(h, hkv, tokens, tokens, d, dtype, device)
        return q, k, v, flash(q, k, v)[1]

    compare(
        "attention_importance beside attention",
        f"{name}: H={h} T={tokens} d={d}",
        lambda q, k, v, lse: ops.attention_importance(q, k, lse),
        lambda q, k, v, lse: flash(q, k, v),
        inputs=inputs,
        baseline_name="SDPA flash forward",
        dtype=dtype,
        flops=2 * h * tokens**2 * d,
        rounds=2 if tokens == 8192 else 5,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("tokens", [576, 2048, 8192])
@pytest.mark.parametrize("name", MODELS)
def test_attention_importance_of_one_row(name, tokens, dtype, device, compare):
    """The last query: bound by reading k."""
    h, hkv, d = MODELS[name]

    def inputs():
        q, k, _ = make(h, hkv, 1, tokens, d, dtype, device)
        return q, k, lse_in_torch(q, k)

    compare(
        "attention_importance, one row",
        f"{name}: H={h} Hkv={hkv} Tk={tokens} d={d}",
        ops.attention_importance,
        lambda q, k, lse: map_in_torch(q, k, "sum"),
        inputs=inputs,
        baseline_name="softmax(q @ k.T), summed",
        dtype=dtype,
        flops=2 * h * tokens * d,
        moved=hkv * tokens * d * dtype.itemsize,
        rounds=15,
    )


# ---- select_tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [576, 2048])
def test_select_tokens(tokens, device, compare):
    keep = tokens // 4

    def scores():
        return (torch.randn(8, tokens, device=device).softmax(-1),)

    def topk_and_sort(score):
        return score.topk(keep, dim=1).indices.sort(dim=1).values

    (score,) = scores()
    ours, theirs = (
        score.gather(1, index).sort(1).values for index in (ops.select_tokens(score, keep), topk_and_sort(score))
    )
    assert torch.equal(ours, theirs)  # among equal scores topk may choose others
    compare(
        "select_tokens",
        f"score=[8, {tokens}], keep={keep}",
        lambda score: ops.select_tokens(score, keep),
        topk_and_sort,
        inputs=scores,
        baseline_name="topk, sort",
        moved=8 * tokens * 4 + 8 * keep * 8,
        rounds=25,
    )


# ---- diverse_tokens -------------------------------------------------------------------------------------------------

VISUAL = {"LLaVA-1.5-7B": (576, 4096, (64, 144)), "LLaVA-NeXT-7B": (2880, 4096, (320,))}  # T, d, keep


def greedy_in_torch(x, keep):
    """[T, d]: as the public code of DivPrune does it, a few torch ops for each token that is kept."""
    unit = x / x.norm(dim=1, keepdim=True)
    distance = 1.0 - unit @ unit.T
    chosen = torch.empty(keep, dtype=torch.long, device=x.device)
    for i in range(keep):
        if i == 0:
            least = distance.topk(2, dim=0, largest=False).values[1]
        else:
            least = distance.index_select(0, chosen[:i]).amin(0)
        chosen[i] = least.argmax()
    return chosen


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("name", "keep"), [(name, keep) for name, (_, _, keeps) in VISUAL.items() for keep in keeps])
def test_diverse_tokens(name, keep, dtype, device, compare):
    skip_what_torch_takes_minutes_for(dtype, device)
    tokens, d, _ = VISUAL[name]

    def features():  # whose cosines are exact in fp32
        return ((torch.randint(0, 2, (1, tokens, d), device=device) * 2 - 1).to(dtype),)

    (x,) = features()
    if dtype == torch.float32:
        assert ops.diverse_tokens(x, keep)[0].nonzero()[:, 0].equal(greedy_in_torch(x[0], keep).sort().values)
    compare(
        "diverse_tokens",
        f"{name}: T={tokens} d={d} keep={keep}",
        lambda x: ops.diverse_tokens(x, keep),
        lambda x: greedy_in_torch(x[0], keep),
        inputs=features,
        baseline_name="cosines, a greedy loop in Python",
        dtype=dtype,
        flops=tokens**2 * d,  # half of all products: the others are the same
        moved=bytes_of(x) + 4 * tokens**2,
        rounds=5,
    )


# ---- compact_tokens -------------------------------------------------------------------------------------------------

TOKENS, KEEP = 640, 208


def layer_state(device):
    """[1, .., T, ..] and the token dimension of each: what a decoder layer of LLaVA-1.5-7B hands on."""
    heads, d = 32, 128
    rows = {
        "hidden": (torch.randn(1, TOKENS, heads * d, device=device).to(torch.bfloat16), 1),
        "cos": (torch.randn(1, TOKENS, d, device=device).to(torch.bfloat16), 1),
        "sin": (torch.randn(1, TOKENS, d, device=device).to(torch.bfloat16), 1),
        "position ids": (torch.arange(TOKENS, device=device)[None], 1),
        "mask": (torch.ones(1, TOKENS, dtype=torch.bool, device=device), 1),
        "keys": (torch.randn(1, heads, TOKENS, d, device=device).to(torch.bfloat16), 2),
        "values": (torch.randn(1, heads, TOKENS, d, device=device).to(torch.bfloat16), 2),
    }
    return [tensor for tensor, _ in rows.values()], [dim for _, dim in rows.values()]


@pytest.mark.parametrize("beside", ["gather", "index_select", "copy"])
def test_compact_tokens(beside, device, compare):
    dims = layer_state(device)[1]

    def inputs():
        tensors, _ = layer_state(device)
        index = torch.rand(1, TOKENS, device=device).argsort(1)[:, :KEEP].sort(1).values
        kept = ops.compact_tokens(index, tensors, dims)
        places = [
            index.view([1] * dim + [KEEP] + [1] * (result.dim() - dim - 1)).expand(result.shape)
            for result, dim in zip(kept, dims, strict=True)
        ]
        return index, tensors, places, kept, [torch.empty_like(tensor) for tensor in kept]

    def gather(index, tensors, places, kept, into):
        return [tensor.gather(dim, place) for tensor, dim, place in zip(tensors, dims, places, strict=True)]

    def index_select(index, tensors, places, kept, into):  # works for a batch of one only
        return [tensor.index_select(dim, index[0]) for tensor, dim in zip(tensors, dims, strict=True)]

    def copy(index, tensors, places, kept, into):
        for result, other in zip(kept, into, strict=True):
            other.copy_(result)

    def compact(index, tensors, places, kept, into):
        if beside == "copy":  # both into given tensors: on a CPU, the page faults of new ones would hide the difference
            _native.compact_tokens(index, tensors, into, dims)
        else:
            return ops.compact_tokens(index, tensors, dims)

    baseline = {"gather": gather, "index_select": index_select, "copy": copy}[beside]
    given = inputs()
    if beside != "copy":
        for ours, theirs in zip(given[3], baseline(*given), strict=True):
            assert torch.equal(ours, theirs)
    compare(
        "compact_tokens / copy" if beside == "copy" else f"compact_tokens, {beside}",
        f"layer of {TOKENS} tokens, keep={KEEP}",
        compact,
        baseline,
        inputs=inputs,
        baseline_name={"copy": "copy_ of what is kept"}.get(beside, f"{beside}, one a tensor"),
        dtype=torch.bfloat16,
        moved=2 * bytes_of(given[3]),
        rounds=9,
    )


# ---- match_tokens ---------------------------------------------------------------------------------------------------

# name: B, T, d, targets
MATCHED = {
    "ToMe, mean of 16 heads' keys": (1, 576, 64, 288),
    "VisionZip, keys of CLIP ViT-L/14": (1, 576, 1024, 10),
    "hidden states of CLIP ViT-L/14": (1, 576, 1024, 288),
    "hidden states of LLaVA-1.5-7B": (1, 576, 4096, 288),
    "rows of a KV cache": (32, 2048, 128, 1024),
}


def alternating(batch, tokens, count, device):
    """[B, T] bool: as many, evenly spaced."""
    target = torch.zeros(batch, tokens, dtype=torch.bool, device=device)
    target[:, torch.arange(count, device=device) * tokens // count] = True
    return target


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", MATCHED)
def test_match_tokens(name, dtype, device, compare):
    """Beside the product of unit vectors, of targets and sources that lie side by side already, and its maximum."""
    batch, tokens, d, count = MATCHED[name]
    if batch > 1:
        skip_what_torch_takes_minutes_for(dtype, device)
    target = alternating(batch, tokens, count, device)

    def inputs():
        key = torch.randn(batch, tokens, d, device=device).to(dtype)
        return key, key[target].view(batch, count, d), key[~target].view(batch, tokens - count, d)

    def product_and_max(key, targets, sources):
        unit = torch.nn.functional.normalize(sources, dim=-1)
        return (unit @ torch.nn.functional.normalize(targets, dim=-1).mT).max(-1)

    given = inputs()
    ours, theirs = ops.match_tokens(given[0], target)[0][~target].view(batch, -1), product_and_max(*given).values
    torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=8 * torch.finfo(dtype).eps)
    compare(
        "match_tokens",
        f"{name}: {batch} x [{tokens}, {d}], {count} targets",
        lambda key, targets, sources: ops.match_tokens(key, target),
        product_and_max,
        inputs=inputs,
        baseline_name="normalize, @, max",
        dtype=dtype,
        flops=2 * batch * count * (tokens - count) * d,
    )


# ---- merge_tokens ---------------------------------------------------------------------------------------------------

# name: B, T, width, kept
MERGED = {
    "hidden states of CLIP ViT-L/14": (1, 576, 1024, 64),
    "hidden states of LLaVA-1.5-7B": (1, 576, 4096, 64),
    "rows of a KV cache": (32, 2048, 128, 1024),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", MERGED)
def test_merge_tokens(name, dtype, device, compare):
    """Beside index_add_ of fp32 numbers, of which it is known where each goes, and a division."""
    batch, tokens, width, keep = MERGED[name]

    def rows():
        return (torch.randn(batch, tokens, width, device=device).to(dtype),)

    index = alternating(batch, tokens, keep, device).nonzero()[:, 1].view(batch, keep)
    goal = torch.randint(0, keep, (batch, tokens), device=device)
    goal.scatter_(1, index, torch.arange(keep, device=device).expand_as(index))
    match, flat = index.gather(1, goal), (goal + torch.arange(batch, device=device)[:, None] * keep).flatten()
    ones = torch.ones(batch * tokens, device=device)

    def index_add(x):
        total = ones.new_zeros(batch * keep).index_add_(0, flat, ones)
        sums = ones.new_zeros(batch * keep, width).index_add_(0, flat, x.view(-1, width).float())
        return (sums / total[:, None]).to(dtype).view(batch, keep, width)

    (x,) = rows()
    (ours,), _ = ops.merge_tokens(index, match, [x])
    torch.testing.assert_close(ours, index_add(x), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    compare(
        "merge_tokens",
        f"{name}: {batch} x [{tokens}, {width}], keep={keep}",
        lambda x: ops.merge_tokens(index, match, [x]),
        index_add,
        inputs=rows,
        baseline_name="index_add_, /",
        dtype=dtype,
        moved=bytes_of(x, ours),
        rounds=9,
    )
