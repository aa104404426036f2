"""What each choice in MoPE is worth: recall@1 of clip-digits without a quarter and a half of its heads and neurons.

    python scripts/study_mope.py --out results.jsonl [--seeds 0 1 2 3 4] [--only NAME ...]
    python scripts/study_mope.py --out results.jsonl --table

Each seed draws its own calibration scenes. Every result is one line of JSON, written as soon as it is known; what is
there already is not run again, so the study can be stopped, resumed and run in parts. Choices are made on the
validation split; the test split is for the table. Nothing is trained, except under --distill.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

from transformers import CLIPModel

import vlprune_ext as vp
from vlprune_ext.data import load_data

SAMPLES = 256
MORE_SAMPLES = 1024  # for variants that do not look at all of them
KEEP = (0.75, 0.5)
VISION = ("vision",)


def variants() -> dict[str, tuple[type, dict]]:
    """Name -> method and fields. A method in n steps reaches a quarter removed after n / 2 of them."""
    one_shot, stepwise = {"steps": 1}, {"steps": 6}
    layer, kind = {"scope": "layer", "cost": "params"}, {"scope": "kind", "cost": "params"}
    tower = {"scope": "tower", "cost": "flops"}
    table = {
        "random, per layer": (vp.Random, {**one_shot, **layer}),
        "random, per kind": (vp.Random, {**one_shot, **kind}),
        "magnitude, per layer": (vp.Magnitude, {**one_shot, **layer}),
        "magnitude, per kind": (vp.Magnitude, {**one_shot, **kind}),
        "magnitude, per tower": (vp.Magnitude, {**one_shot, **tower}),
        "Taylor, per layer": (vp.Taylor, {**one_shot, **layer}),
        "Taylor, per kind": (vp.Taylor, {**one_shot, **kind}),
        "Taylor, per kind, 6 steps": (vp.Taylor, {**stepwise, **kind}),
        "Taylor, per tower, 6 steps": (vp.Taylor, {**stepwise, **tower}),
        "MoPE by recall@1, per layer (published)": (vp.MoPE, {**one_shot, **layer, "objective": "recall@1"}),
        "MoPE by recall@1, per kind": (vp.MoPE, {**one_shot, **kind, "objective": "recall@1"}),
        "MoPE by cross-entropy, per layer": (vp.MoPE, {**one_shot, **layer}),
        "MoPE by cross-entropy, per layer, 6 steps": (vp.MoPE, {**stepwise, **layer}),
        "MoPE by cross-entropy, per kind": (vp.MoPE, {**one_shot, **kind}),
        "MoPE by cross-entropy, per kind, 6 steps": (vp.MoPE, {**stepwise, **kind}),
        "the same, groups of 32": (vp.MoPE, {**stepwise, **kind, "neurons_per_group": 32}),
        "the same, early stopping, 1,024 scenes": (vp.MoPE, {**stepwise, **kind, "exact": False}),
        "by margin, early stopping, 1,024 scenes": (
            vp.MoPE,
            {**stepwise, **kind, "exact": False, "objective": "margin"},
        ),
        "MoPE, per tower, one-shot": (vp.MoPE, {**one_shot, **tower}),
        "MoPE, per tower, 6 steps (default)": (vp.MoPE, {}),
        "the default, by parameters": (vp.MoPE, {"cost": "params"}),
        "the default, by recall@1": (vp.MoPE, {"objective": "recall@1"}),
        "the default, by margin": (vp.MoPE, {"objective": "margin"}),
        "the default, groups of 32": (vp.MoPE, {"neurons_per_group": 32}),
        "the default, rewired": (vp.MoPE, {"rewire": True}),
        "the default, 12 steps": (vp.MoPE, {"steps": 12}),
        "the default, early stopping, 1,024 scenes": (vp.MoPE, {"exact": False}),
    }
    named = {name: (method, {**fields, "towers": VISION}) for name, (method, fields) in table.items()}
    both = {
        "both towers: random, per layer": (vp.Random, {**one_shot, **layer}),
        "both towers: magnitude, per layer": (vp.Magnitude, {**one_shot, **layer}),
        "both towers: magnitude, per kind": (vp.Magnitude, {**one_shot, **kind}),
        "both towers: magnitude, per tower": (vp.Magnitude, {**one_shot, **tower}),
        "both towers: Taylor, per kind, 6 steps": (vp.Taylor, {**stepwise, **kind}),
        "both towers: Taylor, per tower, 6 steps": (vp.Taylor, {**stepwise, **tower}),
        "both towers: MoPE by recall@1, per layer (published)": (
            vp.MoPE,
            {**one_shot, **layer, "objective": "recall@1"},
        ),
        "both towers: MoPE, per kind, 6 steps": (vp.MoPE, {**stepwise, **kind}),
        "both towers: MoPE, default": (vp.MoPE, {}),
        "both towers: MoPE, one budget for both": (vp.MoPE, {"scope": "model"}),
    }
    return named | both


def remember(method, seen: dict) -> None:
    """Rank the same modules of the same half-pruned model once, whichever variant and keep ratio asks."""
    own = {"keep_heads", "keep_neurons", "keep_layers", "scope", "cost", "steps", "towers"}
    fields = {key: value for key, value in method.describe().items() if key not in own}
    rank = method.importance

    def importance(task):
        key = json.dumps([fields, task.towers, task.kinds, task.plan.units("head"), task.plan.units("neurons")])
        if not getattr(method, "exact", True):  # early stopping depends on where the cut is
            return rank(task)
        if key not in seen:
            seen[key] = rank(task)
        return seen[key]

    method.importance = importance


def recall(model, data) -> float:
    return vp.evaluate(model, data, "recall@1", batch_size=100)["recall@1"]


def run(name: str, seed: int, model, splits: dict, seen: dict) -> list[dict]:
    """One variant at each keep ratio: masked, so that the same model serves all."""
    method_class, fields = variants()[name]
    samples = SAMPLES if fields.get("exact", True) else MORE_SAMPLES
    calibration = load_data("digits", split="calibration", model=model, limit=samples, seed=seed)
    rows = []
    for keep in KEEP:
        steps = fields.get("steps", method_class().steps)
        own = {**fields, "keep_heads": keep, "keep_neurons": keep, "steps": max(1, round(steps * (1 - keep) / 0.5))}
        if method_class is vp.Random:
            own["seed"] = seed
        if method_class is vp.MoPE:
            own["stacked_rows"] = 128
        start = time.perf_counter()
        method = method_class(**own)
        remember(method, seen)
        plan = method.plan(model, calibration)
        seconds = time.perf_counter() - start
        with vp.masked(model, plan):
            scores = {split: recall(model, data) for split, data in splits.items()}
        rows.append(
            {"variant": name, "seed": seed, "keep": keep, **scores, "seconds": round(seconds, 1)}
        )  # less what was remembered
    return rows


def distilled(name: str, seed: int, model, splits: dict, steps: int) -> list[dict]:
    """The same after a short distillation on training scenes."""
    method_class, fields = variants()[name]
    fields = {**fields, "keep_heads": 0.5, "keep_neurons": 0.5} | ({"seed": seed} if method_class is vp.Random else {})
    student = copy.deepcopy(model)
    calibration = load_data("digits", split="calibration", model=model, limit=SAMPLES, seed=seed)
    train = load_data("digits", split="train", model=model, limit=4000, seed=seed)
    vp.apply(student, method_class(**fields).plan(student, calibration))
    start = time.perf_counter()
    vp.distill(student, model, train, steps=steps, batch_size=128, learning_rate=1e-3, seed=seed)
    scores = {split: recall(student, data) for split, data in splits.items()}
    seconds = round(time.perf_counter() - start, 1)
    return [{"variant": f"{name} + distillation", "seed": seed, "keep": 0.5, **scores, "seconds": seconds}]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(rows: list[dict]) -> str:
    """Mean and spread (standard deviation) over seeds, in Markdown."""
    lines = [
        "| method | seeds | 75%: validation | 75%: test | 50%: validation | 50%: test |",
        "|---|---|---|---|---|---|",
    ]
    names = list(dict.fromkeys(row["variant"] for row in rows))
    for name in names:
        cells = []
        seeds = {row["seed"] for row in rows if row["variant"] == name}
        for keep in KEEP:
            for split in ("validation", "test"):
                values = [row[split] for row in rows if row["variant"] == name and row["keep"] == keep]
                spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "-")
        lines.append(f"| {name} | {len(seeds)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--only", nargs="+", help="names of variants")
    parser.add_argument("--distill", type=int, metavar="STEPS", help="distil what is left for so many steps")
    parser.add_argument("--table", action="store_true", help="print the table of what is there and stop")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(read(arguments.out)))
        return
    model = CLIPModel.from_pretrained(vp.zoo.path("clip-digits")).eval()
    splits = {split: load_data("digits", split=split, model=model, limit=1000) for split in ("validation", "test")}
    if not read(arguments.out):
        dense = {split: recall(model, data) for split, data in splits.items()}
        arguments.out.write_text(
            "".join(
                json.dumps({"variant": "dense", "seed": 0, "keep": keep, **dense, "seconds": 0}) + "\n" for keep in KEEP
            )
        )
    for seed in arguments.seeds:
        seen: dict = {}
        for name in arguments.only or variants():
            label = f"{name} + distillation" if arguments.distill else name
            if any(row["variant"] == label and row["seed"] == seed for row in read(arguments.out)):
                continue
            rows = (
                distilled(name, seed, model, splits, arguments.distill)
                if arguments.distill
                else run(name, seed, model, splits, seen)
            )
            with arguments.out.open("a") as file:
                for row in rows:
                    file.write(json.dumps(row) + "\n")
                    print(row, flush=True)


if __name__ == "__main__":
    main()
