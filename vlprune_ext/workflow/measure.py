"""`evaluate` and `measure`: what a model can do, and what it costs to run."""

from __future__ import annotations

import statistics
import time
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from ..anatomy import describe
from ..anatomy.flops import count_flops
from ..anatomy.patch import evaluation_mode, gradients_only_of
from ..data import Data
from ..objectives import Objective, objective_named
from ..tokens import prune_tokens
from ..tokens.session import tokens_are_pruned


def evaluate(
    model: nn.Module, data: Data, objective: str | Objective | None = None, *, batch_size: int = 32
) -> dict[str, float]:
    """Return the numbers that an objective reports, for instance recall@1.

    Tokens are pruned as the model's plan says.

    Parameters
    ----------
    model : nn.Module
        Dense or pruned.
    data : Data
        Samples to judge it on.
    objective : str or Objective, optional
        By default what suits the model.
    batch_size : int
        Samples run at once.

    Raises
    ------
    ValueError
        An objective that the model or the data does not fit.
    """
    anatomy = describe(model)
    objective = objective_named(objective, anatomy, "report")
    with _as_planned(model):
        return objective.report(anatomy, data, batch_size)


def _as_planned(model: nn.Module) -> AbstractContextManager[object]:
    """Tokens leave as the model's plan says, unless something else prunes them already."""
    return nullcontext() if tokens_are_pruned(model) else prune_tokens(model)


@torch.no_grad()
def measure(model: nn.Module, data: Data, objective: str | Objective | None = None, *, repeats: int = 20) -> dict:
    """Count parameters and FLOPs, and time one sample.

    The sample goes through all towers; tokens are pruned as the model's plan says.

    Parameters
    ----------
    model : nn.Module
        Dense or pruned.
    data : Data
        Its first sample is used.
    objective : str or Objective, optional
        Says which towers run; by default what suits the model.
    repeats : int
        Timed runs.

    Returns
    -------
    dict
        ``params``; ``nonzero``, how many of them are not zero; ``flops``, two per multiply-add; ``latency_ms``, the
        median at batch 1.
    """
    anatomy = describe(model)
    objective = objective_named(objective, anatomy, "report")
    one = data.subset(1)
    towers = objective.runs(anatomy)
    # Where gradients are on, the counter hooks a BLIP-2 model's query tokens, which have none under no_grad.
    with evaluation_mode(model), gradients_only_of(model), _as_planned(model):
        inputs = {tower: objective.batches(anatomy, tower, one, 1)[0] for tower in towers}

        def run() -> None:
            for tower, batch in inputs.items():
                objective.outputs(anatomy, tower, batch)

        flops = count_flops(run)
        seconds = [seconds_of(run, model) for _ in range(repeats + 3)][3:]
    return {
        "params": sum(p.numel() for p in model.parameters()),
        "nonzero": sum(int(p.count_nonzero()) for p in model.parameters()),
        "flops": flops,
        "latency_ms": 1000 * statistics.median(seconds),
    }


def seconds_of(run, model: nn.Module) -> float:
    cuda = next(model.parameters()).is_cuda
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
