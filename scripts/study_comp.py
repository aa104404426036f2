"""What pruning parameters and tokens together is worth: the zoo's models, trained while they are pruned.

    python scripts/study_comp.py --out results.jsonl [--shard 0/2] [--models blip-digits] [--methods CoMP] [--keep dir]
    python scripts/study_comp.py --out results.jsonl --table

Every method trains for the same number of steps on the same scenes of a seed, from the shipped model. Modes are chosen
by accuracy on validation scenes; the tables hold accuracy on test scenes, which nothing else looks at. Every result is
one line of JSON, written as soon as it is known; what is there already is not computed again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

import vlprune_ext as vp
from vlprune_ext.checkpoint.models import load_model
from vlprune_ext.methods import JOINT, CoMP

SOURCES = {"blip-digits": "digits-questions", "clip-digits": "digits", "llava-digits": "digits-questions"}
METRICS = {"blip-digits": "exact_match", "clip-digits": "recall@1", "llava-digits": "exact_match"}
ABLATIONS: dict[str, dict[str, Any]] = {
    "CoMP, CIP off": {"cip": False},
    "CoMP, CIT off": {"cit": False},
    "CoMP, greedy": {"rho": 0.0, "history_weight": 0.0},
    "CoMP, no exploration": {"rho": 0.0},
    "CoMP, no history": {"history_weight": 0.0},
    "CoMP, modes pruned untried": {"confirm": False},
    "CoMP, thresholds not held": {"hold": False},
}
NAMES = {method.__name__: method for method in JOINT.values()}
STEPS, INTERVAL, BATCH, RATE = 200, 10, 32, 3e-4
SCENES = {"train": 4000, "calibration": 64, "validation": 256, "test": 1000}


class Job(NamedTuple):
    """One training."""

    model: str
    method: str
    cut: float  # share of the FLOPs that is to be saved
    seed: int


def jobs(seeds: list[int]) -> list[Job]:
    """All that the tables hold, what matters most first."""
    found = [Job("blip-digits", method, 0.7, seed) for seed in seeds for method in NAMES]
    found += [Job("blip-digits", method, 0.8, seed) for seed in seeds for method in ("CoMP", *ABLATIONS)]
    three = ("CoMP", "ParametersOnly", "TokensOnly", "JointSimultaneous")
    found += [Job(model, m, 0.7, seed) for model in ("llava-digits", "clip-digits") for seed in seeds for m in three]
    return found + [Job("blip-digits", method, cut, seed) for cut in (0.85, 0.5) for seed in seeds for method in NAMES]


def build(job: Job, **data: vp.Data) -> CoMP:
    """The method of a job."""
    fields = {"flops": round(1 - job.cut, 4), "interval": INTERVAL, "seed": job.seed, "objective": METRICS[job.model]}
    if job.method in NAMES:
        return NAMES[job.method](**fields, **data)
    return CoMP(**fields, **ABLATIONS[job.method], **data)


class Test(TrainerCallback):
    """Accuracy on test scenes under the masks, just before what is masked is removed.

    Removal changes nothing with CIT. Without, heads that are gone have a say in what tokens are worth as long as they
    are only masked, and a model that was trained with that is tested with that.
    """

    def __init__(self, method: CoMP, data: vp.Data, metric: str) -> None:
        self.method, self.data, self.metric, self.found = method, data, metric, 0.0

    def on_train_end(self, args, state, control, model=None, **kwargs):
        stages = self.method._stages
        stages.plan()  # tokens as many as when pruning ended
        with stages.masks.hardened():
            self.found = vp.evaluate(stages.model, self.data, self.metric)[self.metric]


def run(job: Job, folder: Path | None) -> dict[str, Any]:
    """Train, prune, and test."""
    loaded = load_model(job.model, device="cpu")
    model = loaded.model
    scenes = {
        split: vp.load_data(
            SOURCES[job.model],
            split,
            model=model,
            processor=loaded.processor,
            limit=limit,
            seed=job.seed if split == "train" else 0,
        )
        for split, limit in SCENES.items()
    }
    method = build(job, validation=scenes["validation"], calibration=scenes["calibration"])
    test = Test(method, scenes["test"], METRICS[job.model])
    started = time.perf_counter()
    fields: dict[str, Any] = {"steps": STEPS, "batch_size": BATCH, "learning_rate": RATE, "seed": job.seed}
    try:
        vp.train(model, method, scenes["train"], callbacks=[test], **fields)
    except ValueError as error:  # a target out of reach
        return {**job._asdict(), "error": str(error)}
    reached = model.vlprune["plans"][-1]["plan"]["method"]["reached"]
    if folder is not None:
        vp.save_pruned(model, folder / f"{job.model}-{job.method}-{job.cut:g}-{job.seed}".replace(", ", "-"))
    return {
        **job._asdict(),
        "test": test.found,
        "validation": reached["accuracy"],
        "flops": round(reached["flops"], 4),
        "seconds": round(time.perf_counter() - started, 1),
        "modes": [entry["mode"] for entry in method.history],
    }


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def cell(rows: list[dict], model: str, method: str, cut: float) -> str:
    """Mean and standard deviation over seeds, and the mean share of the FLOPs that is left."""
    found = [row for row in rows if (row["model"], row["method"], row["cut"]) == (model, method, cut)]
    values = [row["test"] for row in found if "test" in row]
    if not values:
        return "out of reach" if found else "-"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    left = statistics.mean(row["flops"] for row in found if "flops" in row)
    return f"{statistics.mean(values):.3f}{spread} ({left:.2f}, {len(values)})"


def table(rows: list[dict]) -> str:
    """Accuracy on test scenes ± its standard deviation over seeds (share of FLOPs left, seeds), in Markdown."""
    columns = [("blip-digits", 0.5), ("blip-digits", 0.7), ("blip-digits", 0.85), ("clip-digits", 0.7)]
    columns.append(("llava-digits", 0.7))
    lines = ["| method | " + " | ".join(f"{model}, cut {cut:g}" for model, cut in columns) + " |"]
    lines.append("|---|" + "---|" * len(columns))
    lines += [
        f"| {method} | " + " | ".join(cell(rows, model, method, cut) for model, cut in columns) + " |"
        for method in NAMES
    ]
    lines += ["", "| method | blip-digits, cut 0.8 |", "|---|---|"]
    lines += [f"| {method} | {cell(rows, 'blip-digits', method, 0.8)} |" for method in ("CoMP", *ABLATIONS)]
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=list(SOURCES), choices=list(SOURCES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cuts", type=float, nargs="+", help="only these")
    parser.add_argument("--methods", nargs="+", choices=[*NAMES, *ABLATIONS], help="only these")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th job, from the i-th on")
    parser.add_argument("--keep", type=Path, help="save the pruned models here")
    parser.add_argument("--table", action="store_true", help="print the tables of what is there and stop")
    given = parser.parse_args()
    if given.table:
        print(table(read(given.out)))
        return
    place, count = map(int, given.shard.split("/"))
    for number, job in enumerate(jobs(given.seeds)):
        wanted = (
            job.model in given.models
            and (given.cuts is None or job.cut in given.cuts)
            and (given.methods is None or job.method in given.methods)
        )
        done = any(all(row[key] == value for key, value in job._asdict().items()) for row in read(given.out))
        if number % count != place or not wanted or done:
            continue
        torch.manual_seed(job.seed)
        row = run(job, given.keep)
        with given.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps({key: value for key, value in row.items() if key != "modes"}), flush=True)


if __name__ == "__main__":
    main()
