"""Shapes and arguments that hypothesis thinks of."""

from __future__ import annotations

import pytest
import torch
from ops import test_attention_importance as attention_importance
from ops import test_column_norm_sq as column_norm_sq
from ops import test_compact_tokens as compact_tokens
from ops import test_diverse_tokens as diverse_tokens
from ops import test_leave_one_out as leave_one_out
from ops import test_match_tokens as match_tokens
from ops import test_merge_tokens as merge_tokens
from ops import test_perturb as perturb
from ops import test_prune_nm as prune_nm
from ops import test_prune_smallest as prune_smallest
from ops import test_retrieval_rank as retrieval_rank
from ops import test_select_tokens as select_tokens
from ops import test_share_smallest as share_smallest
from ops.pruning import KINDS, SCALES, finite_scores

from vlprune_ext import _native, ops

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies as st  # noqa: E402

ISAS = _native.build_info()["available_isas"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    n=st.integers(1, 40),
    d=st.integers(1, 70),
    g=st.integers(1, 40),
    groups=st.integers(1, 5),
    isa=st.sampled_from(ISAS),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_leave_one_out(n, d, g, groups, isa, dtype, data):
    chosen = data.draw(st.none() | st.lists(st.integers(0, groups - 1), max_size=4))
    with _native.force_isa(isa):
        leave_one_out.check(*leave_one_out.make(n, d, g, groups, dtype), g, chosen)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    v=st.integers(1, 3),
    n=st.integers(1, 40),
    m=st.integers(1, 90),
    d=st.integers(1, 40),
    p=st.integers(1, 3),
    isa=st.sampled_from(ISAS),
    dtype=st.sampled_from(DTYPES),
)
def test_retrieval_rank(v, n, m, d, p, isa, dtype):
    positives = torch.randint(0, m, (n, p))
    positives[:, 1:][torch.rand(n, p - 1) < 0.5] = -1
    with _native.force_isa(isa):
        retrieval_rank.check(retrieval_rank.whole((v, n, d), dtype), retrieval_rank.whole((v, m, d), dtype), positives)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    n=st.integers(0, 300),
    columns=st.integers(1, 70),
    offset=st.integers(0, 3),
    weighed=st.booleans(),
    isa=st.sampled_from(ISAS),
    dtype=st.sampled_from(DTYPES),
)
def test_column_norm_sq(n, columns, offset, weighed, isa, dtype):
    acc, x, weight = column_norm_sq.make(n, columns + offset, dtype, weighed=weighed)
    with _native.force_isa(isa):
        column_norm_sq.check(acc[offset:], x[:, offset:], weight)


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(
    out=st.integers(1, 9),
    columns=st.integers(1, 200),
    offset=st.integers(0, 3),
    transposed=st.booleans(),
    kind=st.sampled_from(sorted(KINDS)),
    scale=st.sampled_from(sorted(SCALES)),
    scope=st.sampled_from(prune_smallest.SCOPES),
    isa=st.sampled_from(ISAS),
    threads=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_prune_smallest(out, columns, offset, transposed, kind, scale, scope, isa, threads, dtype, data):
    hypothesis.assume(finite_scores(kind, scale))
    weight = KINDS[kind]((out, columns + offset), dtype)[:, offset:]
    weight = weight.t() if transposed else weight
    k = data.draw(st.integers(0, weight.shape[1] if scope == "row" else weight.numel()))
    torch.set_num_threads(threads)
    with _native.force_isa(isa):
        prune_smallest.check(weight, SCALES[scale](weight.shape[1]), k, scope)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 60)), min_size=1, max_size=4),
    kind=st.sampled_from(sorted(KINDS)),
    isa=st.sampled_from(ISAS),
    data=st.data(),
)
def test_share_smallest(shapes, kind, isa, data):
    weights = [KINDS[kind](shape, data.draw(st.sampled_from(DTYPES))) for shape in shapes]
    scales = [SCALES[data.draw(st.sampled_from(["none", "random"]))](columns) for _, columns in shapes]
    k = data.draw(st.integers(0, sum(weight.numel() for weight in weights)))
    with _native.force_isa(isa):
        share_smallest.check(weights, scales, k)


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(
    out=st.integers(1, 9),
    groups=st.integers(1, 20),
    m=st.integers(2, 20),
    offset=st.integers(0, 3),
    kind=st.sampled_from(sorted(KINDS)),
    scale=st.sampled_from(sorted(SCALES)),
    isa=st.sampled_from(ISAS),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_prune_nm(out, groups, m, offset, kind, scale, isa, dtype, data):
    hypothesis.assume(finite_scores(kind, scale))
    weight = KINDS[kind]((out, groups * m + offset), dtype)[:, offset:]
    n = data.draw(st.integers(1, m - 1))
    with _native.force_isa(isa):
        prune_nm.check(weight, SCALES[scale](groups * m), n, m)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    shape=st.lists(st.integers(1, 12), max_size=4),
    seed=st.integers(0, 2**63 - 1),
    tensor_id=st.integers(0, 2**63 - 1),
    eps=st.floats(1e-6, 1e3),
    isa=st.sampled_from(ISAS),
    dtype=st.sampled_from(DTYPES),
)
def test_perturb(shape, seed, tensor_id, eps, isa, dtype):
    weight = torch.randn(shape).to(dtype)
    with _native.force_isa(isa):
        plus, minus = ops.perturb(weight, seed, tensor_id, eps)
        z = perturb.numbers(weight.numel(), seed, tensor_id)
    last = perturb.number(weight.numel() - 1, seed, tensor_id)
    assert abs(float(z[-1]) - last) < 1e-4
    change = z.view(weight.shape) * eps
    assert torch.equal(prune_smallest.bits(plus), prune_smallest.bits((weight.float() + change).to(dtype)))
    assert torch.equal(prune_smallest.bits(minus), prune_smallest.bits((weight.float() - change).to(dtype)))


@hypothesis.settings(max_examples=80, deadline=None, derandomize=True)
@hypothesis.given(
    b=st.integers(1, 3),
    hkv=st.integers(1, 3),
    group=st.integers(1, 3),
    tq=st.integers(1, 60),
    tk=st.integers(1, 90),
    d=st.integers(1, 40),
    offset=st.integers(0, 3),
    causal=st.booleans(),
    masked=st.booleans(),
    weighed=st.booleans(),
    reduce=st.sampled_from(attention_importance.REDUCTIONS),
    isa=st.sampled_from(ISAS),
    dtype=st.sampled_from(DTYPES),
)
def test_attention_importance(b, hkv, group, tq, tk, d, offset, causal, masked, weighed, reduce, isa, dtype):
    q, k = attention_importance.make((b, hkv * group, hkv, tq, tk, d + offset), dtype)
    q, k = q[..., offset:], k[..., offset:]
    mask = torch.rand(b, tk) < 0.6 if masked else None
    lse = attention_importance.lse_of(q, k, causal, mask)
    weigh = attention_importance.weights(q) if weighed else {}
    with _native.force_isa(isa):
        attention_importance.check(q, k, lse, reduce=reduce, causal=causal, key_mask=mask, **weigh)


@hypothesis.settings(max_examples=80, deadline=None, derandomize=True)
@hypothesis.given(
    batch=st.integers(1, 4),
    tokens=st.integers(1, 200),
    offset=st.integers(0, 3),
    transposed=st.booleans(),
    kind=st.sampled_from(sorted(select_tokens.SCORES)),
    protect=st.sampled_from(sorted(select_tokens.PROTECT)),
    isa=st.sampled_from(ISAS),
    threads=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_select_tokens(batch, tokens, offset, transposed, kind, protect, isa, threads, dtype, data):
    score = select_tokens.SCORES[kind]((batch, tokens + offset), dtype)[:, offset:]
    score = score.t() if transposed else score
    keep = data.draw(st.integers(1, score.shape[1]))
    torch.set_num_threads(threads)
    with _native.force_isa(isa):
        select_tokens.check(score, keep, select_tokens.PROTECT[protect](score.shape, keep), f"{kind} {protect}")


@hypothesis.settings(max_examples=80, deadline=None, derandomize=True)
@hypothesis.given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 60),
    d=st.integers(1, 70),
    offset=st.integers(0, 3),
    candidates=st.booleans(),
    isa=st.sampled_from(ISAS),
    threads=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_diverse_tokens(batch, tokens, d, offset, candidates, isa, threads, dtype, data):
    some = torch.cat([torch.full((batch, tokens, offset), torch.nan), diverse_tokens.exact((batch, tokens, d))], 2)
    x = diverse_tokens.with_zeros_and_copies(some.to(dtype))[..., offset:]
    keep = data.draw(st.integers(0, tokens) | st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
    torch.set_num_threads(threads)
    with _native.force_isa(isa):
        diverse_tokens.check(
            x,
            torch.tensor(keep) if isinstance(keep, list) else keep,
            diverse_tokens.some_candidates(x) if candidates else None,
        )


def strided_tensors(data, batch, tokens, dtypes, make=compact_tokens.some):
    """Some tensors and their token dimensions: of up to five dimensions, in any order in memory and of any stride."""
    tensors, dims = [], []
    for _ in range(data.draw(st.integers(1, 4))):
        dtype = data.draw(st.sampled_from(dtypes))
        sizes = data.draw(st.lists(st.integers(1, 5), max_size=3))
        dim = data.draw(st.integers(1, len(sizes) + 1))
        shape = [data.draw(st.sampled_from([1, batch])), *sizes]
        shape.insert(dim, tokens)
        steps = [data.draw(st.integers(1, 2)) for _ in shape]
        order = data.draw(st.permutations(range(len(shape))))
        whole = make([shape[place] * steps[place] for place in order], dtype)
        strided = whole[tuple(slice(None, None, steps[place]) for place in order)]
        tensors.append(strided.permute([order.index(place) for place in range(len(shape))]))
        dims.append(dim)
    return tensors, dims


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 20),
    isa=st.sampled_from(ISAS),
    threads=st.integers(1, 3),
    data=st.data(),
)
def test_compact_tokens(batch, tokens, isa, threads, data):
    tensors, dims = strided_tensors(data, batch, tokens, compact_tokens.DTYPES)
    torch.set_num_threads(threads)
    with _native.force_isa(isa):
        compact_tokens.check(compact_tokens.choose(batch, tokens, data.draw(st.integers(0, tokens))), tensors, dims)


@hypothesis.settings(max_examples=80, deadline=None, derandomize=True)
@hypothesis.given(
    b=st.integers(1, 3),
    t=st.integers(1, 90),
    d=st.integers(1, 40),
    offset=st.integers(0, 3),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    both=st.booleans(),
    isa=st.sampled_from(ISAS),
    threads=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
)
def test_match_tokens(b, t, d, offset, share, both, isa, threads, dtype):
    key = match_tokens.make((b, t + offset, d + offset), dtype)[:, offset:, offset:]
    torch.set_num_threads(threads)
    with _native.force_isa(isa):
        match_tokens.check(key, match_tokens.some(key, share), match_tokens.some(key, 0.5) if both else None)


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 20),
    into=st.sampled_from(sorted(merge_tokens.MATCHES)),
    kind=st.sampled_from(sorted(merge_tokens.SIZES)),
    isa=st.sampled_from(ISAS),
    threads=st.integers(1, 3),
    data=st.data(),
)
def test_merge_tokens(batch, tokens, into, kind, isa, threads, data):
    tensors, dims = strided_tensors(data, batch, tokens, DTYPES, merge_tokens.numbers)
    index = compact_tokens.choose(batch, tokens, data.draw(st.integers(1, tokens)))
    torch.set_num_threads(threads)
    with _native.force_isa(isa):
        match, size = merge_tokens.MATCHES[into](index, tokens), merge_tokens.SIZES[kind]((batch, tokens))
        merge_tokens.check(index, match, tensors, size, dims, f"{into} {kind}")
