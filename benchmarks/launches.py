"""Launch each kernel at the shape that its prediction in docs/gpu.md is for, so that a profiler can look at it.

ncu --clock-control none --kernel-name-base demangled --kernel-name regex:vlprune ... python benchmarks/launches.py
"""

from __future__ import annotations

import sys

import torch

from vlprune_ext import _native, ops

BF16 = torch.bfloat16


def launches(device: torch.device) -> None:
    """Run the ops one after another; outputs and inputs of one are gone before the next."""

    def normal(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    weight, scale = normal(4096, 4096) * 0.02, torch.rand(4096, device=device) + 0.1
    torch.ops.vlprune.smallest_mask(weight, scale, 2048, "row")
    torch.ops.vlprune.nm_mask(weight, scale, 2, 4)
    torch.ops.vlprune.prune_smallest_(weight.clone(), scale, 2048, "row")
    torch.ops.vlprune.prune_nm_(weight.clone(), scale, 2, 4)
    torch.ops.vlprune.perturb(weight, 1, 2, 1e-3)
    for shape in ((2048, 4096), (16384, 11008)):
        torch.ops.vlprune.column_norm_sq_(torch.zeros(shape[1], device=device), normal(*shape))
    for tokens in (8192, 576):
        q, k = normal(1, 32, tokens, 128), normal(1, 32, tokens, 128)
        ops.attention_importance(q, k, torch.full((1, 32, tokens), 12.0, device=device))
    for dtype in (BF16, torch.float32):
        query, gallery = (torch.nn.functional.normalize(normal(n, 512), dim=-1).to(dtype) for n in (5000, 25000))
        torch.ops.vlprune.retrieval_rank(query, gallery, torch.arange(5000, device=device))
    x, base, out = normal(640, 4096), normal(640, 4096), torch.empty(32, 640, 4096, dtype=BF16, device=device)
    _native.leave_one_out(x, normal(4096, 4096), base, out, list(range(32)), 128)
    states = normal(1, 576, 4096)
    ops.match_tokens(states, (torch.arange(576, device=device) % 2 == 0)[None])
    ops.diverse_tokens(states, 144)
    index = torch.arange(0, 640, 3, device=device)[None]
    ops.compact_tokens(index, [normal(1, 640, 4096), normal(1, 32, 640, 128), normal(1, 32, 640, 128)], [1, 2, 2])


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("launches.py: no NVIDIA GPU that torch can use")
    launches(torch.device("cuda"))
    torch.cuda.synchronize()
