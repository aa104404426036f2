"""`prune`, `prune_in_training`, `recover`, `evaluate`, `measure`, `plan_cost`: the methods put to work on a model."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from .anatomy import Anatomy, describe
from .checkpoint import save_pruned
from .data import Data
from .flops import count_flops
from .methods.comp import CoMP
from .methods.ecoflap import ECoFLaP
from .methods.structured import Structured
from .objectives import LMLoss, Objective, objective_named
from .patch import Patches, evaluation_mode, gradients_only_of
from .plan import Plan, Scores
from .replay import Progress
from .scoring import candidates, check_kinds, neuron_groups
from .surgery import apply
from .tokens import prune_tokens
from .tokens.session import tokens_are_pruned


@dataclass
class Result:
    """What `prune` did.

    model          the model, pruned in place
    plan           what went; `applied` in the record of `save_pruned` is after rounding
    scores         the method's scores before anything went
    before, after  what `evaluate` and `measure` say
    method, data   the method's fields; name, split and hash of the calibration data
    """

    model: nn.Module
    plan: Plan
    scores: Scores | None
    before: dict[str, float]
    after: dict[str, float]
    method: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)

    def save(self, folder: str | os.PathLike, *, processor: Any = None) -> None:
        """`save_pruned` with all that is known here."""
        save_pruned(
            self.model,  # type: ignore[arg-type]
            folder,
            processor=processor,
            method=self.method,
            data=self.data,
            before=self.before,
            after=self.after,
        )


def default_objective(anatomy: Anatomy) -> Objective:
    """Retrieval for a model that embeds images and texts, the language-model loss for one that predicts tokens."""
    return objective_named("retrieval" if len(anatomy.family.embed) == 2 else "lm_loss")


def evaluate(
    model: nn.Module, data: Data, objective: str | Objective | None = None, *, batch_size: int = 32
) -> dict[str, float]:
    """The numbers an objective reports, for instance recall@1; None picks what suits the model.

    Tokens leave as the model's plan says.
    """
    anatomy = describe(model)
    objective = default_objective(anatomy) if objective is None else objective_named(objective)
    with _as_planned(model):
        return objective.report(anatomy, data, batch_size)


def _as_planned(model: nn.Module) -> AbstractContextManager[object]:
    """Tokens leave as the model's plan says, unless something else prunes them already."""
    return nullcontext() if tokens_are_pruned(model) else prune_tokens(model)


@torch.no_grad()
def measure(model: nn.Module, data: Data, objective: str | Objective | None = None, *, repeats: int = 20) -> dict:
    """Parameters, and how many are not zero; FLOPs (two per multiply-add) and latency (median, batch 1) of one sample.

    The sample goes through all towers; tokens leave as the model's plan says.
    """
    anatomy = describe(model)
    objective = default_objective(anatomy) if objective is None else objective_named(objective)
    one = data.subset(1)
    towers = objective.towers(anatomy)[:1] if isinstance(objective, LMLoss) else objective.towers(anatomy)
    # Where gradients are on, the counter hooks a BLIP-2 model's query tokens, which have none under no_grad.
    with evaluation_mode(model), gradients_only_of(model), _as_planned(model):
        inputs = {tower: objective.batches(anatomy, tower, one, 1)[0] for tower in towers}

        def run() -> None:
            for tower, batch in inputs.items():
                objective.outputs(anatomy, tower, batch)

        flops = count_flops(run)
        seconds = [_timed(run, model) for _ in range(repeats + 3)][3:]
    return {
        "params": sum(p.numel() for p in model.parameters()),
        "nonzero": sum(int(p.count_nonzero()) for p in model.parameters()),
        "flops": flops,
        "latency_ms": 1000 * statistics.median(seconds),
    }


def _timed(run, model: nn.Module) -> float:
    cuda = next(model.parameters()).is_cuda
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def prune_weights(
    model: nn.Module,
    data: Data,
    sparsity: float = 0.5,
    *,
    criterion: str = "wanda",
    pattern: str = "unstructured",
    progress: Progress | None = None,
    **fields: Any,
) -> nn.Module:
    """Zero the same share of every prunable matrix, in place; an `ECoFLaP` with a uniform coarse stage.

    criterion  "wanda", "magnitude", "ria" or "sparsegpt"
    pattern    "unstructured" or "n:m", n zeros in every m
    fields     of `ECoFLaP`: scope, towers, objective, batch_size, ...
    """
    method = ECoFLaP(sparsity=sparsity, estimator="uniform", criterion=criterion, pattern=pattern, **fields)
    return apply(model, method.plan(model, data, progress=progress), data)


def prune(
    model: nn.Module,
    data: Data,
    method: Structured | ECoFLaP | CoMP | Plan,
    *,
    evaluation: Data | None = None,
    metric: str | Objective | None = None,
    scores: Scores | None = None,
    before: dict[str, float] | None = None,
    mode: str = "remove",
    round_to: int = 8,
    progress: Progress | None = None,
) -> Result:
    """Plan, apply and measure: the model is pruned in place.

    data        calibration data: what the method may look at
    method      what decides; or a plan, which has decided already
    evaluation  data for the numbers before and after; None measures size and speed only
    metric      objective whose numbers those are; None: what suits the model
    scores      of `ECoFLaP.score`, to measure once for several sparsities; only for a method that has it
    before      the numbers before, where another `Result` of the same model and data has them; None measures
    mode        "remove": heads, neurons and layers are physically gone; "mask": their weights are zeroed
    round_to    MLP widths stay multiples of this
    """
    if scores is not None and not isinstance(method, ECoFLaP):
        raise ValueError(f"scores: given, but {type(method).__name__} measures its own")
    before = _numbers(model, data, evaluation, metric) if before is None else before
    if isinstance(method, Plan):
        plan = method
    elif isinstance(method, ECoFLaP):
        plan = method.plan(model, data, scores=scores, progress=progress)
    else:
        plan = method.plan(model, data, progress=progress)
    apply(model, plan, data, mode=mode, round_to=round_to)
    return Result(
        model=model,
        plan=plan,
        scores=None if isinstance(method, Plan | CoMP) else method.scores,
        before=before,
        after=_numbers(model, data, evaluation, metric),
        method=plan.method,
        data={"name": data.name, "split": data.split, "hash": data.hash, "samples": data.n_images},
    )


def prune_in_training(
    model: nn.Module,
    train: Data,
    method: CoMP,
    *,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 1e-4,
    evaluation: Data | None = None,
    metric: str | Objective | None = None,
    before: dict[str, float] | None = None,
    out: str | os.PathLike | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """Train while ``method`` prunes, and measure: the model is pruned in place.

    train                       what it is trained on; ``method.validation`` is what decides
    evaluation, metric, before  as `prune` takes them
    out                         a folder for checkpoints, from which a run that was cut goes on
    """
    from .comp.training import train as run  # transformers' Trainer is slow to import

    if method.validation is None:
        raise ValueError("validation: None, expected data to measure accuracy on: CoMP(validation=load_data(...))")
    before = _numbers(model, method.validation, evaluation, metric) if before is None else before
    run(
        model,
        method,
        train,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        out=out,
        seed=seed,
        progress=progress,
    )
    record: Any = model.vlprune
    plan = Plan.from_dict(record["plans"][-1]["plan"])
    data = method.validation
    return Result(
        model=model,
        plan=plan,
        scores=None,
        before=before,
        after=_numbers(model, method.validation, evaluation, metric),
        method={**plan.method, "train_steps": steps, "train_batch": batch_size, "learning_rate": learning_rate},
        data={"name": data.name, "split": data.split, "hash": data.hash, "samples": data.n_images},
    )


def recover(
    result: Result,
    teacher: nn.Module,
    train: Data,
    data: Data,
    *,
    steps: int,
    evaluation: Data | None = None,
    metric: str | Objective | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """Train the pruned model against the one it was pruned from, in place, and measure again.

    train                     what it is trained on
    data, evaluation, metric  those of `prune`
    """
    from .distillation import distill  # transformers' Trainer is slow to import

    distill(result.model, teacher, train, steps=steps, seed=seed, progress=progress)
    after = _numbers(result.model, data, evaluation, metric)
    return replace(result, after=after, method={**result.method, "distill_steps": steps})


def _numbers(model: nn.Module, data: Data, evaluation: Data | None, metric: str | Objective | None) -> dict[str, float]:
    quality = evaluate(model, evaluation, metric) if evaluation is not None else {}
    return {**quality, **measure(model, evaluation or data)}


@torch.no_grad()
def plan_cost(
    model: nn.Module,
    data: Data,
    *,
    modules: Sequence[str] = ("head", "neurons"),
    towers: Sequence[str] | None = None,
    objective: str | Objective | None = None,
    neurons_per_group: int = 64,
    steps: int = 1,
    batch_size: int = 32,
) -> dict:
    """What a scoring job will cost, before it starts: an upper bound, since later steps score what is left.

    Returns ``{"towers": {tower: {...}}, ...totals}`` with modules, block_runs (by replay), naive_block_runs, flops,
    stream_bytes (the residual streams held), seconds (from timing one batch).
    """
    anatomy = describe(model)
    objective = objective_named(objective, anatomy)
    kinds = check_kinds(modules)
    towers = tuple(towers) if towers is not None else objective.towers(anatomy)
    groups = neuron_groups(anatomy, towers, neurons_per_group) if "neurons" in kinds else {}
    result = {}
    for tower in towers:
        depth = anatomy.tower(tower).depth
        found = [c.intervention for c in candidates(anatomy, (tower,), kinds, groups)]
        batches = objective.batches(anatomy, tower, data, batch_size)
        rows = sum(len(next(iter(batch.values()))) for batch in batches)
        runs = depth + sum(max(0, depth - i.layer - (i.kind == "layer")) for i in found)
        per_row, stream, seconds = _one_batch(anatomy, objective, tower, batches[0])
        result[tower] = {
            "modules": len(found),
            "block_runs": rows * runs * steps,
            "naive_block_runs": rows * depth * (1 + len(found)) * steps,
            "flops": rows * runs * steps * per_row // depth,
            "stream_bytes": rows * stream,
            "seconds": rows * runs * steps * seconds / depth,
        }
    summed = ("modules", "block_runs", "naive_block_runs", "flops", "seconds")
    totals = {key: sum(t[key] for t in result.values()) for key in summed}
    return {"towers": result, **totals, "stream_bytes": max(t["stream_bytes"] for t in result.values())}


def _one_batch(anatomy: Anatomy, objective: Objective, tower: str, batch: dict) -> tuple[int, int, float]:
    """FLOPs, residual-stream bytes and seconds of one row."""
    rows = len(next(iter(batch.values())))
    sizes: list[int] = []
    with evaluation_mode(anatomy.model), Patches() as patches:
        block = anatomy.tower(tower).blocks[0].module
        patches.hook(block, lambda _, __, out: sizes.append(out.numel() * out.element_size()))
        flops = count_flops(lambda: objective.outputs(anatomy, tower, batch))
        seconds = min(_timed(lambda: objective.outputs(anatomy, tower, batch), anatomy.model) for _ in range(2))
    return flops // rows, sizes[0] // rows, seconds / rows
