"""Scoring every head and neuron group of a tower: replay beside one whole run a module."""

from __future__ import annotations

import torch
from transformers import CLIPConfig, CLIPModel

from vlprune_ext.anatomy import describe
from vlprune_ext.objectives import Contrastive
from vlprune_ext.replay import Replay
from vlprune_ext.units.candidates import candidates, neuron_groups


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
