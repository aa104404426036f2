"""`exact=False` on the zoo's CLIP: what racing saves, and what it changes."""

from __future__ import annotations

import pytest
from transformers import CLIPModel

from vlprune_ext import zoo
from vlprune_ext.data import load_data
from vlprune_ext.methods import MoPE


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
