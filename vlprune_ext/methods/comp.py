"""CoMP: parameters and tokens pruned together (Collaborative Multi-Mode Pruning, CVPR 2026, arXiv 2604.02956).

A *mode* is something that can be pruned further: parameters or tokens, of vision or language. One stage after another,
the mode that costs the least accuracy for each FLOP saved is pruned a little more, until the model is small enough.
Equation numbers are the paper's; what the paper leaves open, and is ours, is marked [ours].
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from ..anatomy import Anatomy
from ..comp.modes import MODES
from ..comp.scalars import Board, of_stage
from ..comp.stages import CLOSE, Stages
from ..comp.strategy import ModeStrategy
from ..data import Data
from ..objectives import Objective, objective_named
from ..plan import Plan
from ..replay import Progress
from ..surgery import apply

TOKENS = ("threshold", "keep")
JUDGED = ("both", "raised", "trained")


@dataclass(kw_only=True, eq=False)
class CoMP(TrainerCallback, ExportableState):
    """Prune while a model trains, as a callback of transformers' Trainer; or, with ``train=False``, without training.

    >>> trainer = Trainer(model, args, train_dataset=..., callbacks=[vp.CoMP(flops=0.3, validation=validation)])
    >>> trainer.train()  # every `interval` steps one mode; then fine-tuning; at the end the model is smaller

    >>> plan = vp.CoMP(flops=0.7, train=False).plan(model, validation)

    At the end of training the plan is applied: heads and neurons are physically gone. Tokens leave whoever runs the
    model within ``with vp.prune_tokens(model):``. ``history`` tells what happened in each stage, and why; the Trainer's
    log and TensorBoard get its numbers ("comp/..") when a stage is over.

    flops       share of the dense model's FLOPs that is kept, in (0, 1)
    train       False: `plan` prunes at once
    validation  data on which accuracy is measured; for `plan`, what it is given
    calibration data on which units and tokens are scored; None: the validation data
    objective   what accuracy is; None: "retrieval" for a model with two embeddings, else "exact_match"
    modes       names from `comp.modes.MODES`; None: the five of CoMP, as far as the model has them
    interval    training steps of a stage, in which what was chosen fades out [ours: the paper gives no number]
    step        share of the dense FLOPs that a stage saves; one that can save less is shorter in proportion [ours]
    judged      when the accuracy after a stage is measured, eq. (8): "raised", with all that goes gone at once and
                nothing trained yet; "trained", when the stage is over; or the mean of "both" [ours: the paper does not
                say]
    confirm     a mode is tried, by replay, before it is pruned, and passed over if another is then cheaper; False: it
                is pruned whatever it costs by now, as in the paper [ours]
    rho, tau    probability of exploring, and its temperature in stages, eq. (9); rho=0: greedy
    history_weight, horizon  l0 and I_max of eq. (10); history_weight=0: only the last cost counts
    cip         tokens weigh activations, eq. (4); False: they all count alike, eq. (3)
    cit         pruned heads have no say in what tokens are worth, eq. (7); False: eq. (6)
    hold        thresholds of tokens follow when heads go, so that as many tokens stay as before; False: they are where
                they are, and a head that goes may take tokens with it, as in the paper [ours]
    tokens      "threshold": each sample keeps as many tokens as pass; "keep": each block the mean number of that [ours]
    seed        of the exploration
    batch_size  samples run at once where nothing is trained
    """

    flops: float = 0.3
    train: bool = True
    validation: Data | None = field(default=None, repr=False)
    calibration: Data | None = field(default=None, repr=False)
    objective: str | Objective | None = None
    modes: Sequence[str] | None = None
    interval: int = 100
    step: float = 0.05
    judged: str = "both"
    confirm: bool = True
    rho: float = 0.2
    tau: float = 5.0
    history_weight: float = 0.4
    horizon: int = 5
    cip: bool = True
    cit: bool = True
    hold: bool = True
    tokens: str = "threshold"
    seed: int = 0
    batch_size: int = 64
    history: list[dict[str, Any]] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.flops < 1:
            raise ValueError(f"flops: {self.flops}, expected the share to keep, in (0, 1)")
        if not 0 < self.step < 1:
            raise ValueError(f"step: {self.step}, expected a share in (0, 1)")
        for name in ("interval", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}, expected at least 1")
        for name, known in (("tokens", TOKENS), ("judged", JUDGED)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: {getattr(self, name)!r}, expected one of {', '.join(known)}")
        unknown = [name for name in self.modes or () if name not in MODES]
        if unknown or (self.modes is not None and not self.modes):
            raise ValueError(f"modes: {self.modes}, expected some of {', '.join(MODES)}")
        objective_named(self.objective)
        self.strategy(["one"])
        self._stages: Stages | None = None
        self._kept: dict[str, Any] = {}  # the state, once there is no run
        self._board: Board | None = None

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    def describe(self) -> dict[str, Any]:
        """The method's name and fields, as plain data."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        for place in ("validation", "calibration"):
            data = found[place]
            found[place] = None if data is None else {"name": data.name, "split": data.split, "hash": data.hash}
        if isinstance(self.objective, Objective):
            found["objective"] = self.objective.name
        if self.modes is not None:
            found["modes"] = list(self.modes)
        return {"name": self.name, **found}

    def objective_for(self, anatomy: Anatomy) -> Objective:
        """What accuracy is, of a model of this anatomy: `objective`, or what is usual for its kind."""
        usual = "retrieval" if set(anatomy.family.embed) == {"vision", "text"} else "exact_match"
        return objective_named(usual if self.objective is None else self.objective, anatomy)

    # --- what differs between CoMP and its baselines -----------------------------------------------------------------

    def choose(self, strategy: ModeStrategy, among: list[str], spent: float) -> tuple[str, bool]:
        """The mode that is next, and whether it is explored.

        among  modes that can still save FLOPs; spent: the share of all that is to be saved that is saved already
        """
        return strategy.choose(among)

    def strategy(self, modes: Sequence[str]) -> ModeStrategy:
        """Who chooses among some modes."""
        return ModeStrategy(
            modes, rho=self.rho, tau=self.tau, history=self.history_weight, horizon=self.horizon, seed=self.seed
        )

    # --- without training --------------------------------------------------------------------------------------------

    def plan(self, model: nn.Module, data: Data, *, progress: Progress | None = None) -> Plan:
        """What goes, without training; the model is not changed.

        data  the validation data, and what is scored unless the field ``calibration`` says otherwise

        Raises ValueError for ``train=True``, a target that cannot be reached, a model without any of the modes, and an
        accuracy that is not finite.
        """
        if self.train:
            raise ValueError("train: True, expected False for a plan at once; give a Trainer this callback to train")
        run = self._begin(model, self.validation or data)
        goal = round(1000 * (1 - self.flops))
        try:
            while run.open_stage():
                run.soften(0.0)
                run.close_stage(step=len(self.history))
                if progress is not None:
                    progress(min(round(1000 * (1 - run.now.flops / run.dense)), goal), goal, "saved")
            return run.plan()
        finally:
            self.detach()

    def _begin(self, model: nn.Module, validation: Data | None) -> Stages:
        if validation is None:
            raise ValueError("validation: None, expected data to measure accuracy on: CoMP(validation=load_data(...))")
        self.detach()
        self.history = []
        self._stages = Stages(self, model, validation)
        return self._stages

    def detach(self) -> None:
        """Take the hooks off the model; what they masked counts again. Training does so at its end."""
        if self._stages is not None:
            self._stages.patches.undo()
        if self._board is not None:
            self._board.close()
        self._stages = self._board = None

    # --- as a callback -----------------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model = getattr(model, "pruned", model)
        if not self.train:
            raise ValueError("train: False, expected True for a callback of a Trainer; `plan` prunes without training")
        if args.load_best_model_at_end:
            raise ValueError("load_best_model_at_end: True, expected False: the best of the models is a larger one")
        if args.restore_callback_states_from_checkpoint:
            raise ValueError("restore_callback_states_from_checkpoint: True, expected False: CoMP finds its own state")
        run = self._begin(model, self.validation)
        self._board = Board(args, state, control)
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        if saved and saved["attributes"]:
            run.load(saved["attributes"])
        elif state.global_step:
            raise ValueError(f"the checkpoint of step {state.global_step} holds no state of {type(self).__name__}")

    def on_step_begin(self, args, state, control, **kwargs):
        run = self._stages
        if run is None or run.frozen:
            return
        done = state.global_step - run.opened
        if run.mode is None or done >= run.length:
            if run.mode is not None:
                self._close_stage(run, state)
            if not run.open_stage(state.global_step):
                return
            done = 0
        run.soften(1 - (done + 1) / run.length)

    def _close_stage(self, run: Stages, state: TrainerState) -> None:
        run.close_stage(state.global_step)
        thresholds = {name: mode.threshold for name, mode in run.modes.items()}
        found = of_stage(self.history[-1], thresholds, run.strategy.costs)
        state.log_history.append({"step": state.global_step, **found})
        if self._board is not None:
            self._board.write(found, state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        run = self._stages
        if run is None:
            return
        if run.mode is not None:
            self._close_stage(run, state)
        plan, model, self._kept = run.plan(), run.model, run.state()
        left = plan.method["reached"]["flops"]
        if not run.frozen and left > self.flops + CLOSE:
            warnings.warn(
                f"CoMP: training ended with {left:.3f} of the FLOPs left, the target was {self.flops}; train longer, or"
                " with a shorter `interval`",
                stacklevel=2,
            )
        self.detach()
        # No width is rounded up: a neuron that the model was trained without should not come back.
        apply(model, plan, self.calibration or self.validation, round_to=1)

    def state(self) -> dict[str, Any]:
        """What a checkpoint of the Trainer keeps: plain data."""
        return {"args": {}, "attributes": self._stages.state() if self._stages is not None else self._kept}
