"""What each way to spread sparsity is worth: accuracy of the zoo's models after layer-wise pruning, without training.

    python scripts/study_ecoflap.py --out results.jsonl [--models clip-digits llava-digits] [--seeds 0 1 2 3 4]
    python scripts/study_ecoflap.py --out results.jsonl --table
    python scripts/study_ecoflap.py --out cost.jsonl --cost zeroth-order --models llava-digits

Each seed draws its own calibration scenes. Every result is one line of JSON, written as soon as it is known; what is
there already is not computed again, so that the study can be stopped, resumed and run in parts. Settings are chosen by
the accuracy on validation scenes (--choose); the tables hold that on test scenes.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import vlprune_ext as vp
from vlprune_ext.checkpoint.models import load_model

SPARSITIES = (0.5, 0.6, 0.7, "2:4")
SAMPLES = 256  # calibration scenes
EVALUATED = 1000
# model -> data, what is measured
TASKS = {"clip-digits": ("digits", "recall@1"), "llava-digits": ("digits-questions", "exact_match")}

FIRST, ZEROTH = {"estimator": "first-order"}, {"estimator": "zeroth-order"}
# Name -> fields of `vp.ECoFLaP`; "samples": calibration scenes that are scored; "above": max_sparsity - sparsity.
VARIANTS: dict[str, dict[str, Any]] = {
    "magnitude, uniform": {"estimator": "uniform", "criterion": "magnitude"},
    "magnitude, global": {"estimator": "magnitude", "criterion": "magnitude", "scope": "matrix"},
    "Wanda, uniform": {"estimator": "uniform"},
    "Wanda, uniform, DSnoT, 2 exchanges": {"estimator": "uniform", "dsnot": 2},
    "RIA, uniform": {"estimator": "uniform", "criterion": "ria"},
    "SparseGPT, uniform": {"estimator": "uniform", "criterion": "sparsegpt"},
    "Wanda, OWL": {"estimator": "outliers"},
    "Wanda, OWL, by matrix": {"estimator": "outliers", "granularity": "layer"},
    "ECoFLaP, zeroth order": ZEROTH,
    "ECoFLaP, first order": FIRST,
    "the same, zeroth order, by block": {**ZEROTH, "granularity": "block"},
    "the same, first order, by block and |W|": {**FIRST, "granularity": "block", "importance": "weighted"},
    "ECoFLaP, zeroth order, SparseGPT": {**ZEROTH, "criterion": "sparsegpt"},
    "ECoFLaP, first order, SparseGPT": {**FIRST, "criterion": "sparsegpt"},
}
# What the defaults were chosen among, on validation. "1 x 256": draws x samples.
CHOICES: dict[str, dict[str, Any]] = {
    "zeroth order, 1 x 256": ZEROTH,
    "zeroth order, 1 x 64": {**ZEROTH, "samples": 64},
    "zeroth order, 4 x 64": {**ZEROTH, "draws": 4, "samples": 64},
    "zeroth order, 4 x 256": {**ZEROTH, "draws": 4},
    "zeroth order, 1 x 256, by block": {**ZEROTH, "granularity": "block"},
    "zeroth order, 1 x 256, one loss of all": {**ZEROTH, "samples_per_loss": None},
    "zeroth order, 1 x 256, by |W|": {**ZEROTH, "importance": "weighted"},
    "zeroth order, 1 x 256, squared": {**ZEROTH, "importance": "squared"},
    "zeroth order, 1 x 256, avg": {**ZEROTH, "aggregate": "avg"},
    **{f"zeroth order, 1 x 256, + {above}": {**ZEROTH, "above": above} for above in (0.05, 0.15, 0.2, 0.3)},
    "first order": {**FIRST, "importance": "weighted"},
    "first order, by block": {**FIRST, "importance": "weighted", "granularity": "block"},
    "first order, by the norm": FIRST,
    "first order, avg": {**FIRST, "importance": "weighted", "aggregate": "avg"},
    **{f"first order, + {above}": {**FIRST, "importance": "weighted", "above": above} for above in (0.05, 0.15, 0.2)},
}
SCORED = ("estimator", "importance", "draws", "samples", "samples_per_loss")  # what scores depend on


class Task:
    """One model, its splits, and scores that several sparsities share."""

    def __init__(self, name: str, splits: tuple[str, ...]) -> None:
        self.source, self.objective = TASKS[name]
        self.model = load_model(name).model
        self.splits = {split: self.data(split, EVALUATED) for split in splits}
        self.scores: dict[tuple, tuple[vp.Scores, float]] = {}

    def data(self, split: str, limit: int, seed: int = 0) -> vp.Data:
        return vp.load_data(self.source, split, model=self.model, limit=limit, seed=seed)

    def measure(self, model: torch.nn.Module) -> dict[str, float]:
        return {
            split: vp.evaluate(model, data, self.objective, batch_size=100)[self.objective]
            for split, data in self.splits.items()
        }

    def scores_of(self, method: vp.ECoFLaP, samples: int, key: tuple, seed: int) -> tuple[vp.Scores | None, float]:
        """Scores and the seconds they took; for estimators that measure nothing, None."""
        if method.estimator in ("uniform", "magnitude"):
            return None, 0.0
        if key not in self.scores:
            start = time.perf_counter()
            scores = method.score(self.model, self.data("calibration", samples, seed))
            self.scores[key] = scores, time.perf_counter() - start
        return self.scores[key]

    def run(self, fields: dict[str, Any], sparsity: float | str, seed: int) -> dict[str, Any]:
        """Accuracy on each split of one variant at one sparsity, and the seconds of its two stages."""
        fields = dict(fields)
        key = (seed, *(fields.get(name, "default") for name in SCORED))
        above, samples = fields.pop("above", None), fields.pop("samples", SAMPLES)
        if isinstance(sparsity, str):
            fields["pattern"] = sparsity
        else:
            fields["sparsity"] = sparsity
            if above is not None:
                fields["max_sparsity"] = min(1.0, sparsity + above)
        method, calibration = vp.ECoFLaP(**fields), self.data("calibration", SAMPLES, seed)
        scores, seconds = self.scores_of(method, samples, key, seed)
        pruned = copy.deepcopy(self.model)
        plan = method.plan(pruned, calibration, scores=scores)
        start = time.perf_counter()
        vp.apply(pruned, plan, calibration)
        times = {"score_seconds": round(seconds, 1), "apply_seconds": round(time.perf_counter() - start, 1)}
        return {**self.measure(pruned), **times}


def cells(variants: dict[str, dict], names: list[str] | None, seeds: list[int]) -> Iterator[tuple[str, Any, int]]:
    """(variant, sparsity, seed), dense first."""
    yield "dense", 0.0, 0
    for seed in seeds:
        for name in names or variants:
            for sparsity in SPARSITIES:
                fixed = variants[name]["estimator"] == "uniform"
                if fixed or sparsity != "2:4":  # a pattern fixes every sparsity, whatever spreads it
                    yield name, sparsity, seed


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, row: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(row, flush=True)


def key(row: dict) -> tuple:
    return row["model"], row["variant"], row["sparsity"], row["seed"]


def table(rows: list[dict], model: str, split: str) -> str:
    """Accuracy, mean and standard deviation over seeds, in Markdown."""
    rows = [row for row in rows if row["model"] == model and split in row]
    lines = ["| method | seeds | " + " | ".join(map(str, SPARSITIES)) + " |", "|---|---|" + "---|" * len(SPARSITIES)]
    for name in dict.fromkeys(row["variant"] for row in rows):
        cells = []
        for sparsity in SPARSITIES:
            values = [row[split] for row in rows if row["variant"] == name and row["sparsity"] == sparsity]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "-")
        seeds = len({row["seed"] for row in rows if row["variant"] == name})
        lines.append(f"| {name} | {seeds} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cost(name: str, estimator: str) -> dict[str, Any]:
    """Seconds and peak memory (of the process, beyond the loaded model and data) of one coarse stage."""
    task = Task(name, ())
    data = task.data("calibration", SAMPLES)
    method = vp.ECoFLaP(estimator=estimator)
    vp.ECoFLaP(estimator="uniform").plan(task.model, data)  # what is loaded on first use
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    scores = method.score(task.model, data)
    seconds = time.perf_counter() - start
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"model": name, "estimator": estimator, "samples": SAMPLES, "matrices": len(scores),
            "batch_size": method.batch_size, "draws": method.draws,
            "seconds": round(seconds, 1), "extra_mb": round(extra)}  # fmt: skip


def main() -> None:
    """Run what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--only", nargs="+", help="names of variants")
    parser.add_argument("--choose", action="store_true", help="what the defaults were chosen among, on validation")
    parser.add_argument("--table", action="store_true", help="print the tables of what is there and stop")
    parser.add_argument("--cost", metavar="ESTIMATOR", help="time and memory of one coarse stage, in this process")
    given = parser.parse_args()
    variants, split = (CHOICES, "validation") if given.choose else (VARIANTS, "test")
    rows = read(given.out)
    if given.table:
        for name in given.models:
            print(f"{name}\n\n{table(rows, name, split)}\n")
        return
    if given.cost:
        append(given.out, cost(given.models[0], given.cost))
        return
    done = {key(row) for row in rows}
    for name in given.models:
        task = Task(name, (split,))
        for variant, sparsity, seed in cells(variants, given.only, given.seeds):
            row = {"model": name, "variant": variant, "sparsity": sparsity, "seed": seed}
            if key(row) not in done:
                found = task.measure(task.model) if variant == "dense" else task.run(variants[variant], sparsity, seed)
                append(given.out, {**row, **found})


if __name__ == "__main__":
    main()
