"""Module-ablation ops beside plain torch, at the shapes of real models.

Run: ``make bench``, or ``pytest benchmarks -o python_files='bench_*.py'`` to only look.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from vlprune_ext import _native, ops

# name: images (or sequences) x tokens, D, g, G
LEAVE_ONE_OUT = {
    "ViT-B/16 heads, 8 images": (8 * 197, 768, 64, 12),
    "ViT-B/16 neurons, 8 images": (8 * 197, 768, 64, 48),
    "CLIP ViT-L/14 heads, 8 images": (8 * 257, 1024, 64, 16),
    "CLIP ViT-L/14 neurons, 4 images": (4 * 257, 1024, 128, 32),
    "LLaVA-1.5-7B heads, 1 sequence": (640, 4096, 128, 32),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", LEAVE_ONE_OUT)
def test_leave_one_out(name, dtype, device, compare):
    n, d, g, groups = LEAVE_ONE_OUT[name]
    if device.type == "cpu" and dtype == torch.float16:
        pytest.skip("torch takes minutes for these products of fp16 matrices where the CPU has none of its own")
    every = list(range(groups))

    def make():
        x = torch.randn(n, groups * g, device=device).to(dtype)
        weight = torch.randn(d, groups * g, device=device).to(dtype)
        base = torch.randn(n, d, device=device).to(dtype)
        return x, weight, base, torch.empty(groups, n, d, dtype=dtype, device=device)

    def baddbmm(x, weight, base, out):
        torch.baddbmm(
            base.expand(groups, n, d),
            x.view(n, groups, g).transpose(0, 1),
            weight.view(d, groups, g).permute(1, 2, 0),
            alpha=-1,
            out=out,
        )

    # Into a given output, both: allocating (on a CPU, the page faults of) gigabytes would hide what is compared.
    compare(
        "leave_one_out",
        f"{name}: N={n} D={d} g={g} G={groups}",
        lambda x, weight, base, out: _native.leave_one_out(x, weight, base, out, every, g),
        baddbmm,
        inputs=make,
        baseline_name="torch.baddbmm",
        dtype=dtype,
        flops=2 * n * d * g * groups,
        moved=(n * groups * g + d * groups * g + n * d + groups * n * d) * dtype.itemsize,
    )


def rank_in_torch(query, gallery, positives):
    scores = query @ gallery.T  # [N, M]
    return (scores > scores.gather(1, positives[:, None])).sum(1)


MEASURE_RSS = """
import sys, torch
from vlprune_ext import ops
n, m, d = map(int, sys.argv[1:4])
dtype = getattr(torch, sys.argv[4])
query, gallery = torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype)
positives = torch.randint(0, m, (n,))
ops.retrieval_rank(query[:1], gallery[:1], positives[:1] * 0)
def status(key):
    return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1]) / 1024
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
before = status("VmRSS")
ops.retrieval_rank(query, gallery, positives)
print(status("VmHWM") - before)
"""


def extra_memory_mb(n: int, m: int, d: int, dtype: torch.dtype, device: torch.device) -> float:
    """What one call needs beyond its inputs, at its peak: by a process's resident memory, or by CUDA's allocator."""
    if device.type == "cpu":
        command = [sys.executable, "-c", MEASURE_RSS, str(n), str(m), str(d), str(dtype).removeprefix("torch.")]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    query, gallery = (torch.randn(rows, d, device=device).to(dtype) for rows in (n, m))
    positives = torch.randint(0, m, (n,), device=device)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ops.retrieval_rank(query, gallery, positives)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


# MiB. In fp32 a GPU holds both sides split into two bf16 parts, and a list; else a few numbers a query are held.
MOST_MEMORY = {("cuda", torch.float32): 64, ("cuda", torch.bfloat16): 4, ("cuda", torch.float16): 4}
MOST_ON_A_CPU = 64  # of resident memory, which counts by pages and threads' stacks


@pytest.mark.parametrize("checks", [False, True], ids=["kernel", "checks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", [(5000, 25000, 512), (1000, 5000, 768)], ids=str)
def test_retrieval_rank(shape, dtype, checks, device, compare):
    n, m, d = shape
    if device.type == "cpu" and dtype != torch.float32:
        pytest.skip("torch takes minutes for this product of 16-bit matrices where the CPU has none of its own")

    def make():
        query, gallery = (
            torch.nn.functional.normalize(torch.randn(rows, d, device=device), dim=-1).to(dtype) for rows in (n, m)
        )
        return query, gallery, torch.randint(0, m, (n,), device=device)

    memory = extra_memory_mb(n, m, d, dtype, device)
    compare(
        "retrieval_rank" + ", with its checks" * checks,
        f"N={n} M={m} D={d}",
        ops.retrieval_rank if checks else torch.ops.vlprune.retrieval_rank,
        rank_in_torch,
        inputs=make,
        graph=not checks,
        baseline_name="matmul + compare + sum",
        dtype=dtype,
        flops=2 * n * m * d,
        rounds=5,
        extra_memory_mb=memory,
        notes=f"{memory:.1f} MB extra",
    )
    assert memory < MOST_MEMORY.get((device.type, dtype), MOST_ON_A_CPU)
