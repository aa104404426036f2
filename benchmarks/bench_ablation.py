"""Module-ablation ops beside plain torch, at the shapes of real models.

Run: ``make bench``, or ``pytest benchmarks -o python_files='bench_*.py'`` to only look.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from vlprune_ext import _native, ops, zoo
from vlprune_ext.anatomy import describe
from vlprune_ext.data import load_data
from vlprune_ext.methods import MoPE
from vlprune_ext.objectives import Contrastive
from vlprune_ext.replay import Replay
from vlprune_ext.scoring import candidates, neuron_groups

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
    x = torch.randn(n, groups * g, device=device).to(dtype)
    weight = torch.randn(d, groups * g, device=device).to(dtype)
    base = torch.randn(n, d, device=device).to(dtype)
    out = torch.empty(groups, n, d, dtype=dtype, device=device)
    out_of_torch = torch.empty_like(out)
    every = list(range(groups))

    def baddbmm():
        torch.baddbmm(
            base.expand(groups, n, d),
            x.view(n, groups, g).transpose(0, 1),
            weight.view(d, groups, g).permute(1, 2, 0),
            alpha=-1,
            out=out_of_torch,
        )

    # Into a given output, both: allocating (on a CPU, the page faults of) gigabytes would hide what is compared.
    compare(
        "leave_one_out",
        f"{name}: N={n} D={d} g={g} G={groups}",
        lambda: _native.leave_one_out(x, weight, base, out, every, g),
        baddbmm,
        baseline_name="torch.baddbmm",
        dtype=dtype,
        flops=2 * n * d * g * groups,
        moved=(x.numel() + weight.numel() + base.numel() + out.numel()) * x.element_size(),
        rounds=15 if device.type == "cuda" else 7,
    )


def rank_in_torch(query, gallery, positives):
    scores = query @ gallery.T  # [N, M]
    return (scores > scores.gather(1, positives[:, None])).sum(1)


MEASURE_RSS = """
import sys, torch
from vlprune_ext import ops
n, m, d = map(int, sys.argv[1:])
query, gallery = torch.randn(n, d), torch.randn(m, d)
positives = torch.randint(0, m, (n,))
ops.retrieval_rank(query[:1], gallery[:1], positives[:1] * 0)
def status(key):
    return int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1]) / 1024
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
before = status("VmRSS")
ops.retrieval_rank(query, gallery, positives)
print(status("VmHWM") - before)
"""


def extra_memory_mb(n: int, m: int, d: int, device: torch.device) -> float:
    """What one call needs beyond its inputs, at its peak: by a process's resident memory, or by CUDA's allocator."""
    if device.type == "cpu":
        command = [sys.executable, "-c", MEASURE_RSS, str(n), str(m), str(d)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    query, gallery = torch.randn(n, d, device=device), torch.randn(m, d, device=device)
    positives = torch.randint(0, m, (n,), device=device)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ops.retrieval_rank(query, gallery, positives)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", [(5000, 25000, 512), (1000, 5000, 768)], ids=str)
def test_retrieval_rank(shape, dtype, device, compare):
    n, m, d = shape
    if device.type == "cpu" and dtype != torch.float32:
        pytest.skip("torch takes minutes for this product of 16-bit matrices where the CPU has none of its own")
    query = torch.nn.functional.normalize(torch.randn(n, d, device=device), dim=-1).to(dtype)
    gallery = torch.nn.functional.normalize(torch.randn(m, d, device=device), dim=-1).to(dtype)
    positives = torch.randint(0, m, (n,), device=device)
    memory = extra_memory_mb(n, m, d, device)
    row = compare(
        "retrieval_rank",
        f"N={n} M={m} D={d}",
        lambda: ops.retrieval_rank(query, gallery, positives),
        lambda: rank_in_torch(query, gallery, positives),
        baseline_name="matmul + compare + sum",
        dtype=dtype,
        flops=2 * n * m * d,
        rounds=15 if device.type == "cuda" else 5,
        extra_memory_mb=memory,
        notes=f"{memory:.1f} MB extra",
    )
    assert row["extra_memory_mb"] < 64


# --- scoring a whole tower -------------------------------------------------------------------------------------------


def vit_b16():
    """The vision tower of CLIP ViT-B/16: 12 blocks, width 768, 12 heads, 3,072 neurons, 197 tokens; random weights."""
    config = CLIPConfig(
        vision_config={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "patch_size": 16,
        },
        text_config={"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    )
    torch.manual_seed(0)
    return CLIPModel(config).eval()


def score_naively(anatomy, objective, candidates, batches):
    """One module at a time: a hook zeroes its slice, the whole tower runs. [M, N, E]"""
    results = []
    with torch.no_grad():
        for candidate in candidates:
            drop = candidate.intervention
            site = anatomy.tower(drop.tower).blocks[drop.layer].sites[drop.kind]
            columns = torch.tensor([u * site.width + i for u in drop.units for i in range(site.width)])
            columns = columns.to(site.out.weight.device)
            handle = site.out.register_forward_pre_hook(lambda _, args, _c=columns: (args[0].index_fill(-1, _c, 0),))
            results.append(torch.cat([objective.outputs(anatomy, drop.tower, batch) for batch in batches]))
            handle.remove()
    return torch.stack(results)


def score_by_replay(anatomy, objective, candidates, batches, stacked_rows):
    replay = Replay(
        anatomy, "vision", batches, lambda _, i: objective.outputs(anatomy, "vision", i), stacked_rows=stacked_rows
    )
    results = [None] * len(candidates)
    for positions, outputs in replay.walk([c.intervention for c in candidates]):
        for i, rows in zip(positions or [], outputs, strict=False):
            results[i] = rows
    return torch.stack(results), replay


def test_scoring_a_tower(device, stopwatch, record):
    """All heads and groups of 64 neurons; on a CPU every twelfth of either, in both ways, to end within minutes."""
    anatomy, objective = describe(vit_b16().to(device)), Contrastive()
    groups = neuron_groups(anatomy, ("vision",), 64)
    every = 1 if device.type == "cuda" else 12
    found = candidates(anatomy, ("vision",), ("head", "neurons"), groups)
    chosen = [c for kind in ("head", "neurons") for c in [c for c in found if c.module.kind == kind][::every]]
    images = 32 if device.type == "cuda" else 8
    batches = [{"pixel_values": torch.randn(images, 3, 224, 224, device=device)}]

    score_naively(anatomy, objective, chosen[:1], batches)  # warm up, both
    _, warm = score_by_replay(anatomy, objective, chosen[:8], batches, None)
    naive, by_replay = [], []
    seconds = stopwatch(lambda: naive.append(score_naively(anatomy, objective, chosen, batches)))
    replayed = stopwatch(
        lambda: by_replay.append(score_by_replay(anatomy, objective, chosen, batches, warm.stacked_rows))
    )
    outputs, replay = by_replay[0]
    torch.testing.assert_close(outputs, naive[0], rtol=0, atol=1e-4)
    naive_runs = images * len(anatomy.tower("vision")) * len(chosen)
    record(
        "score a tower",
        f"CLIP ViT-B/16 vision, {len(chosen)} of {len(found)} heads and neuron groups, {images} images",
        dtype="float32",
        **{"ms": replayed * 1e3, "baseline": "hook, whole tower, one by one", "baseline ms": seconds * 1e3},
        ratio=seconds / replayed,
        block_runs=replay.block_runs,
        naive_block_runs=naive_runs,
        notes=f"{naive_runs / replay.block_runs:.2f}x fewer block runs; {replay.stacked_rows} rows stacked",
    )


@pytest.mark.parametrize(("pairs", "scope"), [(1000, "tower"), (1000, "kind"), (4000, "kind")])
def test_early_stopping(pairs, scope, stopwatch, record):
    """`exact=False` on clip-digits: block runs saved, and how much of the removal set is the exact one."""
    model = CLIPModel.from_pretrained(zoo.path("clip-digits")).eval()
    data = load_data("digits", split="calibration", model=model, limit=pairs)
    removed, runs, seconds = {}, {}, {}
    for exact in (True, False):
        method = MoPE(
            exact=exact, scope=scope, steps=1, keep_heads=0.5, keep_neurons=0.5, batch_size=50, stacked_rows=100
        )
        plans = []
        seconds[exact] = stopwatch(lambda method=method, plans=plans: plans.append(method.plan(model, data)))
        removed[exact] = {
            (kind, tower, layer, unit)
            for kind in ("head", "neurons")
            for tower, layers in plans[0].units(kind).items()
            for layer, units in layers.items()
            for unit in (units if kind == "head" else {u // method.neurons_per_group for u in units})
        }
        runs[exact] = method.scores.block_runs
    overlap = len(removed[True] & removed[False]) / len(removed[True])
    record(
        "early stopping",
        f"clip-digits, both towers, scope {scope}, {len(method.scores)} modules, {data.n_images} pairs",
        dtype="float32",
        **{"ms": seconds[False] * 1e3, "baseline": "exact scores", "baseline ms": seconds[True] * 1e3},
        ratio=seconds[True] / seconds[False],
        block_runs=runs[False],
        exact_block_runs=runs[True],
        overlap=overlap,
        notes=f"{runs[True] / runs[False]:.2f}x fewer block runs; {overlap:.1%} of the removal set in common",
    )
