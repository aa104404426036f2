"""`prune`, `compare`, `recover`: a method put to work on a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ..anatomy import describe
from ..anatomy.linears import check_linears
from ..apply_plan import apply
from ..checkpoint.save import save_pruned
from ..data import Data
from ..methods.joint.comp import CoMP
from ..methods.units.structured import Structured
from ..methods.weights.ecoflap import ECoFLaP
from ..objectives import Objective
from ..plan import Plan, Scores
from ..progress import Progress
from .measure import evaluate, measure

Method = Structured | ECoFLaP | CoMP  # what makes a plan


@dataclass
class Result:
    """Hold what `prune` did.

    Parameters
    ----------
    model : nn.Module
        The model, pruned in place.
    plan : Plan
        What was decided; the record that `save` writes has the plan after rounding.
    scores : Scores or None
        The method's scores of the dense model.
    before, after : dict of str to number
        What `evaluate` and `measure` report of the dense and of the pruned model.
    method : dict
        The method's name and fields.
    data : dict
        Name, split and hash of the calibration data, and its number of images.
    """

    model: nn.Module
    plan: Plan
    scores: Scores | None
    before: dict[str, float]
    after: dict[str, float]
    method: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)

    def save(
        self,
        folder: str | os.PathLike,
        *,
        processor: Any = None,
        comparisons: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        """Save the model by `save_pruned`, with all that is known here and what it was compared with."""
        save_pruned(
            self.model,  # type: ignore[arg-type]
            folder,
            processor=processor,
            method=self.method,
            data=self.data,
            before=self.before,
            after=self.after,
            scores=self.scores,
            comparisons=comparisons,
        )


@dataclass
class Training:
    """Say what a model is trained on, and how, while a method prunes it or after.

    Parameters
    ----------
    data : Data
        Training data.
    validation : Data, optional
        What a method that prunes while training decides by, unless it has data of its own.
    steps, batch_size, learning_rate, seed
        Of the training.
    out : path, optional
        A folder for checkpoints, from which an interrupted run resumes.
    """

    data: Data
    validation: Data | None = None
    steps: int = 2000
    batch_size: int = 32
    learning_rate: float = 1e-4
    seed: int = 0
    out: str | os.PathLike | None = None


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
    """Zero the same share of every prunable matrix, in place: an `ECoFLaP` with a uniform coarse stage.

    Parameters
    ----------
    model : nn.Module
        Pruned in place and returned.
    data : Data
        Calibration data.
    sparsity : float
        Share of each matrix that becomes zero, in [0, 1).
    criterion : {"wanda", "magnitude", "ria", "sparsegpt"}
        Importance of a weight.
    pattern : str
        "unstructured", or "n:m" for n zeros in every m consecutive weights.
    progress : callable, optional
        Told (done, total, what).
    **fields
        Others of `ECoFLaP`: scope, towers, objective, batch_size, ...

    Raises
    ------
    ValueError
        What `ECoFLaP` and `apply` raise.
    """
    method = ECoFLaP(sparsity=sparsity, estimator="uniform", criterion=criterion, pattern=pattern, **fields)
    return apply(model, method.plan(model, data, progress=progress), data)


def prune(
    model: nn.Module,
    data: Data,
    method: Method | Plan,
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

    Parameters
    ----------
    model : nn.Module
        Pruned in place.
    data : Data
        Calibration data: what the method may look at.
    method : method or Plan
        What decides; or a plan, which has decided already.
    evaluation : Data, optional
        Data for the numbers before and after; without, only size and speed are measured.
    metric : str or Objective, optional
        Objective of those numbers; by default what suits the model.
    scores : Scores, optional
        Of `ECoFLaP.score`, to measure once for several sparsities; only for a method that has it.
    before : dict, optional
        The dense model's numbers, where another `Result` of the same model and data has them.
    mode : {"remove", "mask"}
        "remove": heads, neurons and layers are physically removed; "mask": their weights are zeroed.
    round_to : int
        MLP widths stay multiples of this.
    progress : callable, optional
        Told (done, total, what).

    Returns
    -------
    Result

    Raises
    ------
    ValueError
        ``scores`` for a method that measures its own; what the method and `apply` raise.
    """
    if scores is not None and not isinstance(method, ECoFLaP):
        raise ValueError(f"scores: given, but {type(method).__name__} measures its own")
    _check_model(model, method)
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
        data=data.origin,
    )


def prune_in_training(
    model: nn.Module,
    training: Training,
    method: CoMP,
    *,
    evaluation: Data | None = None,
    metric: str | Objective | None = None,
    before: dict[str, float] | None = None,
    progress: Progress | None = None,
) -> Result:
    """Train while ``method`` prunes, and measure: the model is pruned in place.

    Parameters
    ----------
    model : nn.Module
        Pruned in place.
    training : Training
        What it is trained on, and what decides where the method has no validation data.
    method : CoMP
        With ``train=True``.
    evaluation, metric, before, progress
        As `prune` takes them.

    Raises
    ------
    ValueError
        No validation data; what `CoMP` raises.
    """
    from ..training.trainer import train  # transformers' Trainer is slow to import

    method.validation = method.validation or training.validation
    if method.validation is None:
        raise ValueError("validation: None, expected data to measure accuracy on: CoMP(validation=load_data(...))")
    _check_model(model, method)
    before = _numbers(model, method.validation, evaluation, metric) if before is None else before
    train(
        model,
        method,
        training.data,
        steps=training.steps,
        batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        out=training.out,
        seed=training.seed,
        progress=progress,
    )
    record: Any = model.vlprune
    plan = Plan.from_dict(record["plans"][-1]["plan"])
    how = {"train_steps": training.steps, "train_batch": training.batch_size, "learning_rate": training.learning_rate}
    return Result(
        model=model,
        plan=plan,
        scores=None,
        before=before,
        after=_numbers(model, method.validation, evaluation, metric),
        method={**plan.method, **how},
        data=method.validation.origin,
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

    Parameters
    ----------
    result : Result
        Of `prune`; its model is trained.
    teacher : nn.Module
        The dense model.
    train : Data
        Training data.
    data : Data
        Calibration data of `prune`.
    steps : int
        Of the training.
    evaluation, metric, progress
        As `prune` takes them.
    seed : int
        Of the training.

    Returns
    -------
    Result
        With the numbers after training.
    """
    from ..training.distillation import distill  # transformers' Trainer is slow to import

    distill(result.model, teacher, train, steps=steps, seed=seed, progress=progress)
    after = _numbers(result.model, data, evaluation, metric)
    return replace(result, after=after, method={**result.method, "distill_steps": steps})


def _check_model(model: nn.Module, method: Method | Plan) -> None:
    """Raise ValueError for projections that cannot be pruned, before anything is measured."""
    anatomy = describe(model)
    if isinstance(method, Plan):
        method.check(anatomy)
        return  # `apply` looks at what it changes
    towers = getattr(method, "towers", None)
    check_linears(anatomy, list(anatomy.towers) if towers is None else [t for t in towers if t in anatomy.towers])


def _numbers(model: nn.Module, data: Data, evaluation: Data | None, metric: str | Objective | None) -> dict[str, float]:
    quality = evaluate(model, evaluation, metric) if evaluation is not None else {}
    return {**quality, **measure(model, evaluation or data)}
