"""What each way to spread sparsity is worth: accuracy of the zoo's models after layer-wise pruning, without training.

    python scripts/study_ecoflap.py --out results.jsonl [--models clip-digits llava-digits] [--seeds 0 1 2 3 4]
    python scripts/study_ecoflap.py --out results.jsonl --table

Each seed draws its own calibration scenes. Every result is one line of JSON, written as soon as it is known; what is
there already is not computed again, so that the study can be stopped, resumed and run in parts.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import vlprune_ext as vp
from vlprune_ext.models import load_model

SPARSITIES = (0.5, 0.6, 0.7, "2:4")
SAMPLES = 256  # calibration scenes
EVALUATED = 1000
# model -> data, what is measured
TASKS = {"clip-digits": ("digits", "recall@1"), "llava-digits": ("digits-questions", "exact_match")}


def variants() -> dict[str, dict[str, Any]]:
    """Name -> fields of `vp.ECoFLaP`."""
    return {
        "magnitude, uniform": {"estimator": "uniform", "criterion": "magnitude"},
        "Wanda, uniform": {"estimator": "uniform"},
        "RIA, uniform": {"estimator": "uniform", "criterion": "ria"},
        "SparseGPT, uniform": {"estimator": "uniform", "criterion": "sparsegpt"},
        "Wanda, OWL": {"estimator": "outliers"},
        "ECoFLaP, first order": {"estimator": "first-order"},
        "ECoFLaP, zeroth order": {},
        "ECoFLaP, first order, + 0.2": {"estimator": "first-order", "above": 0.2},
        "ECoFLaP, zeroth order, + 0.2": {"above": 0.2},
        "ECoFLaP, zeroth order, 1 draw": {"draws": 1},
        "ECoFLaP, zeroth order, one loss of all samples": {"samples_per_loss": None},
        "SparseGPT, first order": {"estimator": "first-order", "criterion": "sparsegpt"},
    }


def run(model: torch.nn.Module, name: str, sparsity: float | str, calibration, splits, objective: str) -> dict:
    """One variant at one sparsity: seconds to plan and apply, and what is left on each split."""
    fields = variants()[name]
    above = fields.pop("above", 0.1)
    if isinstance(sparsity, str):
        fields["pattern"] = sparsity
    else:
        fields |= {"sparsity": sparsity, "max_sparsity": min(1.0, sparsity + above)}
    pruned = copy.deepcopy(model)
    method = vp.ECoFLaP(**fields)
    start = time.perf_counter()
    plan = method.plan(pruned, calibration)
    planned = time.perf_counter()
    vp.apply(pruned, plan, calibration)
    seconds = {"plan_seconds": round(planned - start, 1), "apply_seconds": round(time.perf_counter() - planned, 1)}
    found = {split: vp.evaluate(pruned, data, objective, batch_size=100)[objective] for split, data in splits.items()}
    return {**found, **seconds, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}


def key(row: dict) -> tuple:
    return row["model"], row["variant"], row["sparsity"], row["seed"]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(rows: list[dict], model: str) -> str:
    """Test accuracy, mean and standard deviation over seeds, in Markdown."""
    rows = [row for row in rows if row["model"] == model]
    lines = ["| method | seeds | " + " | ".join(map(str, SPARSITIES)) + " |", "|---|---|" + "---|" * len(SPARSITIES)]
    for name in dict.fromkeys(row["variant"] for row in rows):
        cells = []
        for sparsity in SPARSITIES:
            values = [row["test"] for row in rows if row["variant"] == name and row["sparsity"] == sparsity]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "-")
        seeds = len({row["seed"] for row in rows if row["variant"] == name})
        lines.append(f"| {name} | {seeds} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--only", nargs="+", help="names of variants")
    parser.add_argument("--table", action="store_true", help="print the tables of what is there and stop")
    given = parser.parse_args()
    rows = read(given.out)
    if given.table:
        for name in given.models:
            print(f"{name}\n\n{table(rows, name)}\n")
        return
    done = {key(row) for row in rows}
    for name in given.models:
        source, objective = TASKS[name]
        loaded = load_model(name)
        splits = {
            split: vp.load_data(source, split, model=loaded.model, limit=EVALUATED) for split in ("validation", "test")
        }
        dense = {
            split: vp.evaluate(loaded.model, data, objective, batch_size=100)[objective]
            for split, data in splits.items()
        }
        wanted = given.only or list(variants())
        cells = [("dense", 0.0, 0)] + [(v, s, seed) for seed in given.seeds for v in wanted for s in SPARSITIES]
        for variant, sparsity, seed in cells:
            row = {"model": name, "variant": variant, "sparsity": sparsity, "seed": seed}
            if key(row) in done or (sparsity == "2:4" and variants().get(variant, {}).get("estimator") != "uniform"):
                continue  # a pattern fixes every sparsity, whatever spreads it
            if variant == "dense":
                row |= dense
            else:
                calibration = vp.load_data(source, "calibration", model=loaded.model, limit=SAMPLES, seed=seed)
                row |= run(loaded.model, variant, sparsity, calibration, splits, objective)
            with given.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)


if __name__ == "__main__":
    main()
