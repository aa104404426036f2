"""The demonstration: a small trained CLIP scored, pruned, saved, reloaded and measured."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import load_pruned
from .data import load_data
from .distillation import distill
from .methods import Magnitude, MoPE, Random
from .models import load_model
from .pipeline import Result, evaluate, measure, plan_cost, prune
from .replay import Progress
from .report import cut_summary, duration, metric, save_record, si, write_report

MODEL = "clip-digits"
SEED = 0
CALIBRATION = 128  # images that are looked at to decide
TEST = 1000  # images of digits that no other split has
TRAIN = 4000  # images to distil on
DISTILL_STEPS = 60

Working = Callable[[str], AbstractContextManager[Progress]]


@dataclass
class Outcome:
    """The pruning by MoPE and the rows it is shown beside."""

    result: Result
    comparisons: dict[str, Any]
    seconds: float
    cost: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for --json."""
        return {
            "before": self.result.before,
            "after": self.result.after,
            "comparisons": {name: getattr(other, "after", other) for name, other in self.comparisons.items()},
            "method": self.result.method,
            "data": self.result.data,
            "cost": self.cost,
            "seconds": self.seconds,
        }


def run(out: Path, report: Path, *, keep: float, working: Working, say: Callable[[str], None]) -> Outcome:
    """Everything, in order; ``working`` opens a progress bar, ``say`` prints a line."""
    start = time.perf_counter()
    loaded = load_model(MODEL)
    dense = loaded.model
    with working("reading the data"):
        splits = {"calibration": CALIBRATION, "train": TRAIN, "test": TEST}
        data = {
            split: load_data("digits", split, model=dense, processor=loaded.processor, limit=limit, seed=SEED)
            for split, limit in splits.items()
        }
    with working("measuring the dense model"):
        recall = evaluate(dense, data["test"])
    say(
        f"[bold]{MODEL}[/bold]  {si(sum(p.numel() for p in dense.parameters()))} parameters; "
        f"recall@1 {metric('recall@1', recall['recall@1'])} on {TEST:,} test scenes"
    )

    method = MoPE(keep_heads=keep, keep_neurons=keep)
    cost = plan_cost(dense, data["calibration"], neurons_per_group=method.neurons_per_group, steps=method.steps)
    say(
        f"scoring {cost['modules']} modules in {method.steps} rounds: {cost['block_runs']:,} block runs by replay, "
        f"{cost['naive_block_runs']:,} naively"
    )

    comparisons: dict[str, Any] = {}
    for other in (Random(keep_heads=keep, keep_neurons=keep, seed=SEED), Magnitude(keep_heads=keep, keep_neurons=keep)):
        name = type(other).__name__
        with working(f"pruning by {name}") as progress:
            comparisons[name] = prune(
                copy.deepcopy(dense), data["calibration"], other, evaluation=data["test"], progress=progress
            )
    began = time.perf_counter()
    with working("pruning by MoPE") as progress:
        result = prune(copy.deepcopy(dense), data["calibration"], method, evaluation=data["test"], progress=progress)
    say(f"MoPE removed {cut_summary(result.plan)} in {duration(time.perf_counter() - began)}")

    with working("saving and loading again"):
        result.save(out, processor=loaded.processor)
        again = evaluate(load_pruned(out), data["test"])
    if again["recall@1"] != result.after["recall@1"]:
        raise RuntimeError(f"{out}: recall@1 is {again['recall@1']} after loading, {result.after['recall@1']} before")
    say(f"saved to {out}; loaded again, recall@1 is the same")

    began = time.perf_counter()
    with working("distilling") as progress:
        student = distill(
            copy.deepcopy(result.model), dense, data["train"], steps=DISTILL_STEPS, seed=SEED, progress=progress
        )
        comparisons["MoPE, distilled"] = {**evaluate(student, data["test"]), **measure(student, data["test"])}
    say(f"distilled a copy for {DISTILL_STEPS} steps in {duration(time.perf_counter() - began)}")

    save_record(out, result, comparisons)
    title = f"{MODEL}: {keep:.0%} of heads and neurons kept"
    write_report(report, result, comparisons=comparisons, title=title)
    return Outcome(result, comparisons, time.perf_counter() - start, cost)
