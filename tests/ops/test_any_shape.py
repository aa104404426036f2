"""Shapes and arguments that hypothesis thinks of."""

from __future__ import annotations

import pytest
import torch
from ops import test_leave_one_out as leave_one_out
from ops import test_retrieval_rank as retrieval_rank

from vlprune_ext import _native

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies as st  # noqa: E402

ISAS = _native.build_info()["available_isas"]


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    n=st.integers(1, 40),
    d=st.integers(1, 70),
    g=st.integers(1, 40),
    groups=st.integers(1, 5),
    isa=st.sampled_from(ISAS),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
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
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_retrieval_rank(v, n, m, d, p, isa, dtype):
    positives = torch.randint(0, m, (n, p))
    positives[:, 1:][torch.rand(n, p - 1) < 0.5] = -1
    with _native.force_isa(isa):
        retrieval_rank.check(retrieval_rank.whole((v, n, d), dtype), retrieval_rank.whole((v, m, d), dtype), positives)
