"""`compare`: several methods put to work on one model; the first is kept, the others are measured."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..anatomy import describe
from ..data import Data
from ..methods import title
from ..methods.joint.comp import CoMP
from ..methods.weights.ecoflap import ECoFLaP
from ..objectives import Objective
from ..plan import Plan
from ..progress import Progress
from .prune import Method, Result, Training, prune, prune_in_training, recover

Working = Callable[[str], AbstractContextManager[Progress | None]]


@dataclass
class Comparison:
    """What `compare` found.

    Parameters
    ----------
    result : Result
        Of the first method; its model is the one that was given.
    others : dict of str to dict
        Name -> the numbers of what it is compared with.
    """

    result: Result
    others: dict[str, dict[str, float]] = field(default_factory=dict)

    def save(self, folder: str | os.PathLike, *, processor: Any = None) -> None:
        """Write the pruned model, its scores and what it was compared with, whole or not at all."""
        self.result.save(folder, processor=processor, comparisons=self.others)


def compare(
    model: nn.Module,
    data: Data,
    methods: Mapping[str, Method | Plan],
    *,
    evaluation: Data | None = None,
    metric: str | Objective | None = None,
    training: Training | None = None,
    distill_steps: int = 0,
    mode: str = "remove",
    round_to: int = 8,
    working: Working | None = None,
) -> Comparison:
    """Prune ``model`` in place by the first of some methods, and copies of it by the others; measure all.

    What is the same for several is done once: the dense model's numbers, and a method's scores for all its sparsities.

    Parameters
    ----------
    model : nn.Module
        Pruned in place.
    data : Data
        Calibration data: what the methods may look at.
    methods : mapping of str to method or Plan
        Name -> what decides.
    evaluation, metric, mode, round_to
        As `prune` takes them. Without a metric, what the first CoMP among the methods decides by.
    training : Training, optional
        For methods that prune while the model trains, and for ``distill_steps``.
    distill_steps : int
        Then train the pruned model against the dense one for so many steps; its numbers before are kept, too.
    working : callable, optional
        Name of what is done -> a context that gives what its progress is told to.

    Raises
    ------
    ValueError
        No method; a method that trains, or ``distill_steps``, without ``training``; what `prune` raises.
    """
    if not methods:
        raise ValueError("methods: none given, expected at least one")
    trains = [name for name, method in methods.items() if isinstance(method, CoMP) and method.train]
    if training is None and (trains or distill_steps):
        raise ValueError(f"training: None, expected what {trains[0] if trains else 'distilling'} is trained on")
    if metric is None:  # what CoMP decides by is what its user wants to see
        judges = (m.objective_for(describe(model)) for m in methods.values() if isinstance(m, CoMP))
        metric = next(judges, None)
    show: Working = working or (lambda _: nullcontext(None))
    dense = copy.deepcopy(model) if distill_steps else None
    shared: dict[str, Any] = {"evaluation": evaluation, "metric": metric, "before": None}
    scores: dict[type, Any] = {}  # of a method: the same for every sparsity

    def pruned(subject: nn.Module, name: str) -> Result:
        method = methods[name]
        if name in trains:
            assert training is not None
            assert isinstance(method, CoMP)
            method.calibration = data
            with show(f"training with {name}") as progress:
                done = prune_in_training(subject, training, method, **shared, progress=progress)
        else:
            shared_scores = scores.get(type(method))
            with show(f"pruning by {name}") as progress:
                done = prune(
                    subject,
                    data,
                    method,
                    **shared,
                    scores=shared_scores,
                    mode=mode,
                    round_to=round_to,
                    progress=progress,
                )
            if isinstance(method, ECoFLaP):
                scores[type(method)] = done.scores
        shared["before"] = done.before
        return done

    first, *others = methods
    found = {name: pruned(copy.deepcopy(model), name).after for name in others}
    result = pruned(model, first)
    if dense is not None:
        assert training is not None
        found[f"{title(result.method['name'])}, before distillation"] = result.after
        with show("distilling") as progress:
            result = recover(
                result,
                dense,
                training.data,
                data,
                steps=distill_steps,
                seed=training.seed,
                evaluation=evaluation,
                metric=metric,
                progress=progress,
            )
    return Comparison(result, found)
