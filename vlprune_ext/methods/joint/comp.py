"""CoMP: parameters and tokens pruned together (Collaborative Multi-Mode Pruning, CVPR 2026, arXiv 2604.02956).

A *mode* is something that can be pruned further: parameters or tokens, of vision or language. One stage after another,
the mode that costs the least accuracy for each FLOP saved is pruned a little more, until the model is small enough.
Equation numbers are the paper's; what the paper leaves open, and is ours, is marked [ours].
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from ...apply_plan import apply
from ...comp.scalars import Board, of_stage
from ...comp.settings import Settings
from ...comp.stages import CLOSE, Stages
from ...data import Data
from ...plan import Plan
from ...progress import Progress


@dataclass(kw_only=True, eq=False)
class CoMP(Settings, TrainerCallback, ExportableState):
    """Prune while a model trains, as a callback of transformers' Trainer; or, with ``train=False``, without training.

    >>> trainer = Trainer(model, args, train_dataset=..., callbacks=[vp.CoMP(flops=0.3, validation=validation)])
    >>> trainer.train()  # every `interval` steps one mode; then fine-tuning; at the end the model is smaller

    >>> plan = vp.CoMP(flops=0.7, train=False).plan(model, validation)

    At the end of training the plan is applied: heads and neurons are physically gone. Tokens leave whoever runs the
    model within ``with vp.prune_tokens(model):``. ``history`` tells what happened in each stage, and why; the Trainer's
    log and TensorBoard get its numbers ("comp/..") when a stage is over.

    Fields: those of `Settings`.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._stages: Stages | None = None
        self._past: list[dict[str, Any]] = []  # the history, once there is no run
        self._kept: dict[str, Any] = {}  # the state, once there is no run
        self._board: Board | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """What happened in each stage so far, or in the last run."""
        return self._stages.history if self._stages is not None else self._past

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
        self._past = []
        self._stages = Stages(self, model, validation)
        return self._stages

    def detach(self) -> None:
        """Take the hooks off the model; what they masked counts again. Training does so at its end."""
        if self._stages is not None:
            self._past = self._stages.history
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
