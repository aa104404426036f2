"""Layer-wise pruning ops beside the published code, at LLaVA-1.5-7B's shapes.

Pruning needs a weight that is whole, so each call has a fresh copy, made before and not timed. A row "with its checks"
is the public op as users call it, launched by Python: it looks at the data for NaNs, on a GPU with a synchronisation.
The others are kernels alone. Scores are random, nearly without ties; how long ours takes depends on them little.
"""

from __future__ import annotations

import pytest
import torch
from timing import bytes_of

from vlprune_ext import _native, ops

SHAPES = [(4096, 4096), (11008, 4096)]
DTYPE = torch.bfloat16


def weight_and_scale(shape, device):
    """The weight of a layer, a scale of its columns, and a place to prune a copy of the weight in."""
    weight = (torch.randn(shape, device=device) * 0.02).to(DTYPE)
    return weight, torch.rand(shape[1], device=device) + 0.1, torch.empty_like(weight)


def smallest_by_sort(weight, scale, k):
    """As Wanda's published code (arXiv 2306.11695) does, with the scale instead of its square."""
    metric = weight.float().abs() * scale
    mask = torch.zeros_like(metric, dtype=torch.bool)
    indices = torch.sort(metric, dim=-1, stable=True)[1][:, :k]
    mask.scatter_(1, indices, True)
    weight[mask] = 0


def nm_by_loop(weight, scale, n, m):
    """As Wanda's published code does: one topk for every m columns."""
    metric = weight.float().abs() * scale
    mask = torch.zeros_like(metric, dtype=torch.bool)
    for ii in range(0, metric.shape[1], m):
        tmp = metric[:, ii : ii + m].float()
        mask.scatter_(1, ii + torch.topk(tmp, n, dim=1, largest=False)[1], True)
    weight[mask] = 0


# what: kernel, public op, published code, its name
PRUNE = {
    "prune_smallest_ row": (
        lambda weight, scale: torch.ops.vlprune.prune_smallest_(weight, scale, weight.shape[1] // 2, "row"),
        lambda weight, scale: ops.prune_smallest_(weight, scale, weight.shape[1] // 2),
        lambda weight, scale: smallest_by_sort(weight, scale, weight.shape[1] // 2),
        "stable sort, scatter, index",
    ),
    "prune_smallest_ matrix": (
        lambda weight, scale: torch.ops.vlprune.prune_smallest_(weight, scale, weight.numel() // 2, "matrix"),
        lambda weight, scale: ops.prune_smallest_(weight, scale, weight.numel() // 2, scope="matrix"),
        lambda weight, scale: smallest_by_sort(weight.view(1, -1), scale.repeat(weight.shape[0]), weight.numel() // 2),
        "stable sort of all, scatter, index",
    ),
    "prune_nm_ 2:4": (
        lambda weight, scale: torch.ops.vlprune.prune_nm_(weight, scale, 2, 4),
        lambda weight, scale: ops.prune_nm_(weight, scale, 2, 4),
        lambda weight, scale: nm_by_loop(weight, scale, 2, 4),
        "topk in a loop",
    ),
}


@pytest.mark.parametrize("checks", [False, True], ids=["kernel", "checks"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("what", PRUNE)
def test_prune(what, shape, checks, device, compare):
    kernel, public, published, name = PRUNE[what]
    if device.type == "cpu" and what == "prune_smallest_ matrix" and shape != SHAPES[0]:
        pytest.skip("sorting 45 million scores takes torch ten seconds a call on a CPU")
    ours = public if checks else kernel

    def make():
        return weight_and_scale(shape, device)

    weight, scale, work = make()
    ours(work.copy_(weight), scale)
    other = weight.clone()
    published(other, scale)
    assert int((work == 0).sum()) == int((other == 0).sum()) >= work.numel() // 2
    compare(
        what + ", with its checks" * checks,
        f"{shape[0]}x{shape[1]}",
        lambda weight, scale, work: ours(work, scale),
        lambda weight, scale, work: published(work, scale),
        inputs=make,
        setup=lambda weight, scale, work: work.copy_(weight),
        graph=not checks,
        baseline_name=name,
        dtype=DTYPE,
        moved=2 * bytes_of(weight),
        rounds=3,
    )


@pytest.mark.parametrize("checks", [False, True], ids=["kernel", "checks"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_perturb(shape, checks, device, compare):
    def make():
        weight, _, z = weight_and_scale(shape, device)
        return weight, z, torch.empty_like(weight), torch.empty_like(weight)

    def published(weight, z, plus, minus):
        z.normal_()
        torch.add(weight, z, alpha=1e-3, out=plus)
        torch.sub(weight, z, alpha=1e-3, out=minus)

    def kernel(weight, z, plus, minus):  # into given tensors: on a CPU, the page faults of new ones would hide it
        _native.perturb(weight, plus, minus, 1, 2, 1e-3)

    compare(
        "perturb" + ", with its checks" * checks,
        f"{shape[0]}x{shape[1]}",
        (lambda weight, z, plus, minus: ops.perturb(weight, 1, 2, 1e-3)) if checks else kernel,
        published,
        inputs=make,
        graph=not checks,
        baseline_name="normal_, w + eps z, w - eps z",
        dtype=DTYPE,
        moved=3 * 2 * shape[0] * shape[1],
        rounds=5,
    )


@pytest.mark.parametrize("checks", [False, True], ids=["kernel", "checks"])
@pytest.mark.parametrize("shape", [(2048, 4096), (16384, 11008)], ids=str)
def test_column_norm_sq(shape, checks, device, compare):
    def make():
        return torch.zeros(shape[1], device=device), torch.randn(shape, device=device).to(DTYPE)

    compare(
        "column_norm_sq_" + ", with its checks" * checks,
        f"x=[{shape[0]}, {shape[1]}]",
        ops.column_norm_sq_ if checks else torch.ops.vlprune.column_norm_sq_,
        lambda acc, x: acc.add_(x.float().pow(2).sum(0)),
        inputs=make,
        graph=not checks,
        baseline_name="x.float().pow(2).sum(0)",
        dtype=DTYPE,
        moved=2 * shape[0] * shape[1],
        rounds=5,
    )
