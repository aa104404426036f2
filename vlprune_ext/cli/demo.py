"""The demonstration: the small trained models pruned, saved, reloaded and measured.

A CLIP loses heads and neurons that MoPE scores by leaving them out; a LLaVA loses weights where ECoFLaP finds that its
loss depends on them least, and, as it came, answers with fewer visual tokens.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.load import load_pruned
from ..checkpoint.models import Loaded, load_model
from ..data import Data, load_data
from ..data.digits import read_digits
from ..data.sources import DIGITS_QUESTIONS
from ..methods import ECoFLaP, FastV, GlobalMagnitude, Magnitude, MoPE, Random, RandomTokens, VisionZip, Wanda
from ..progress import Progress
from ..report.pruning import write_report
from ..report.tokens import write_token_report
from ..report.words import cut_summary, duration, metric, si
from ..training.distillation import distill
from ..workflow.compare import Comparison, compare
from ..workflow.cost import plan_cost
from ..workflow.measure import evaluate, measure
from ..workflow.prune import Result
from ..workflow.token_trials import TokenComparison, compare_tokens

CLIP, LLAVA = "clip-digits", "llava-digits"
SEED = 0
CALIBRATION = 128  # images that are looked at to decide
TEST = 1000  # images of digits that no other split has
TRAIN = 4000  # images to distil on
DISTILL_STEPS = 60
SPARSITIES = (0.6, 0.5, 0.7)  # the first is saved
KEEPS = (0.5, 0.25, 0.11)  # shares of the visual tokens

Working = Callable[[str], AbstractContextManager[Progress]]


@dataclass
class Outcome:
    """A pruned model and the rows it is shown beside."""

    result: Result
    comparisons: dict[str, Any]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for --json."""
        return {
            "before": self.result.before,
            "after": self.result.after,
            "comparisons": self.comparisons,
            "method": self.result.method,
            "data": self.result.data,
            "seconds": self.seconds,
        }


@dataclass
class _Stage:
    """What both halves do: read, save, and say so."""

    model: str
    source: str
    metric: str  # an objective
    shown: str  # of its numbers
    working: Working
    say: Callable[[str], None]

    def read(self, **splits: int) -> tuple[Loaded, dict[str, Data]]:
        """Load the model, and so many images of each split."""
        loaded = load_model(self.model)
        model = loaded.model
        with self.working("reading the data"):
            data = {
                split: load_data(self.source, split, model=model, processor=loaded.processor, limit=limit, seed=SEED)
                for split, limit in splits.items()
            }
        with self.working("measuring the dense model"):
            quality = evaluate(model, data["test"], self.metric)[self.shown]
        self.say(
            f"[bold]{self.model}[/bold]  {si(sum(p.numel() for p in model.parameters()))} parameters; "
            f"{self._name} {metric(self.shown, quality)} on {splits['test']:,} test scenes"
        )
        return loaded, data

    def save(self, out: Path, found: Comparison, loaded: Loaded, test: Data) -> None:
        """Save, load again, and see that nothing has changed."""
        with self.working("saving and loading again"):
            found.save(out, processor=loaded.processor)
            again = evaluate(load_pruned(out), test, self.metric)[self.shown]
        before = found.result.after[self.shown]
        if again != before:
            raise RuntimeError(f"{out}: {self._name} is {again} after loading, {before} before")
        self.say(f"saved to {out}; loaded again, {self._name} is the same")

    @property
    def _name(self) -> str:
        return self.shown.replace("_", " ")


def run_clip(out: Path, report: Path, *, keep: float, working: Working, say: Callable[[str], None]) -> Outcome:
    """Remove heads and neurons of the CLIP; ``working`` opens a progress bar, ``say`` prints a line."""
    start = time.perf_counter()
    stage = _Stage(CLIP, "digits", "retrieval", "recall@1", working, say)
    loaded, data = stage.read(calibration=CALIBRATION, train=TRAIN, test=TEST)
    dense, calibration, test = loaded.model, data["calibration"], data["test"]

    method = MoPE(keep_heads=keep, keep_neurons=keep)
    cost = plan_cost(dense, calibration, neurons_per_group=method.neurons_per_group, steps=method.steps)
    say(
        f"scoring {cost['modules']} modules in {method.steps} rounds: {cost['block_runs']:,} block runs by replay, "
        f"{cost['naive_block_runs']:,} naively"
    )
    shares: dict[str, Any] = {"keep_heads": keep, "keep_neurons": keep}
    ways = {"MoPE": method, "Random": Random(**shares, seed=SEED), "Magnitude": Magnitude(**shares)}
    began = time.perf_counter()
    found = compare(copy.deepcopy(dense), calibration, ways, evaluation=test, working=working)
    result, comparisons = found.result, found.others
    say(
        f"MoPE removed {cut_summary(result.plan)}; with what it is compared with, in"
        f" {duration(time.perf_counter() - began)}"
    )

    began = time.perf_counter()
    with working("distilling") as progress:
        student = distill(
            copy.deepcopy(result.model), dense, data["train"], steps=DISTILL_STEPS, seed=SEED, progress=progress
        )
        comparisons["MoPE, distilled"] = {**evaluate(student, test), **measure(student, test)}
    say(f"distilled a copy for {DISTILL_STEPS} steps in {duration(time.perf_counter() - began)}")
    stage.save(out, found, loaded, test)

    write_report(report, result, comparisons=comparisons, title=f"{CLIP}: {keep:.0%} of heads and neurons kept")
    return Outcome(result, comparisons, time.perf_counter() - start)


def run_llava(out: Path, report: Path, *, working: Working, say: Callable[[str], None]) -> Outcome:
    """Zero weights of the LLaVA, at several sparsities."""
    start = time.perf_counter()
    stage = _Stage(LLAVA, DIGITS_QUESTIONS, "exact_match", "exact_match", working, say)
    loaded, data = stage.read(calibration=CALIBRATION, test=TEST)
    calibration, test = data["calibration"], data["test"]
    began = time.perf_counter()
    ways = {
        f"{method.__name__} {sparsity:g}": method(sparsity=sparsity, seed=SEED)
        for method in (ECoFLaP, Wanda, GlobalMagnitude)
        for sparsity in SPARSITIES
    }
    found = compare(
        copy.deepcopy(loaded.model), calibration, ways, evaluation=test, metric=stage.metric, working=working
    )
    result, comparisons = found.result, found.others
    scores = result.scores
    assert scores is not None
    say(
        f"ECoFLaP perturbed each of {len(scores)} matrices, without gradients: {scores.block_runs:,} block runs by"
        f" replay; {len(ways)} models in {duration(time.perf_counter() - began)}"
    )
    stage.save(out, found, loaded, test)
    write_report(report, result, comparisons=comparisons, title=f"{LLAVA}: {SPARSITIES[0]:.0%} of the weights zeroed")
    return Outcome(result, comparisons, time.perf_counter() - start)


def run_tokens(report: Path, *, working: Working, say: Callable[[str], None]) -> TokenComparison:
    """Answer questions by the dense LLaVA with fewer visual tokens."""
    start = time.perf_counter()
    loaded = load_model(LLAVA)
    data = load_data(DIGITS_QUESTIONS, "test", model=loaded.model, processor=loaded.processor, limit=TEST, seed=SEED)
    record = read_digits(DIGITS_QUESTIONS, "test", 1, SEED)[0][0]
    methods = {method.__name__: [method(keep=keep) for keep in KEEPS] for method in (FastV, VisionZip, RandomTokens)}
    with working("answering with fewer visual tokens") as progress:
        found = compare_tokens(loaded, record.open(), record.question, methods, data=data, progress=progress)
    write_token_report(report, found, title=f"{LLAVA}: fewer visual tokens")
    said = ", ".join(f"{name} {metric(found.metric, several[1].quality)}" for name, several in found.judged.items())
    say(
        f"right answers with a quarter of the visual tokens: {said}; with all {metric(found.metric, found.dense)} "
        f"({duration(time.perf_counter() - start)})"
    )
    return found
