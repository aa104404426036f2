"""CoMP: joint pruning of parameters and tokens (Collaborative Multi-Mode Pruning, CVPR 2026, arXiv 2604.02956).

A *mode* is a kind of pruning: parameters or tokens, of vision or language. In each stage the mode that loses the least
accuracy per FLOP saved is pruned further, until the FLOPs target is met. Equation numbers are the paper's; what the
paper leaves open, and is ours, is marked [ours].
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
    """Prune parameters and tokens jointly, stage by stage, by the mode that loses the least accuracy per FLOP.

    A callback of transformers' Trainer, which prunes while the model trains; or, with ``train=False``, pruning without
    training.

    >>> trainer = Trainer(model, args, train_dataset=..., callbacks=[vp.CoMP(flops=0.3, validation=validation)])
    >>> trainer.train()  # one mode every `interval` steps; then fine-tuning; at the end the model is smaller

    >>> plan = vp.CoMP(flops=0.7, train=False).plan(model, validation)

    At the end of training the plan is applied: heads and neurons are removed physically. Tokens are pruned whenever the
    model runs within ``with vp.prune_tokens(model):``. After each stage its numbers go to the Trainer's log and
    TensorBoard ("comp/..").

    Source: CoMP (CVPR 2026, arXiv 2604.02956). ``confirm=False, hold=False`` is the paper's; it gives no number for
    ``interval``. `Settings` tells what else is ours.

    Parameters
    ----------
    flops : float
        Share of the dense model's FLOPs that is kept, in (0, 1).
    train : bool
        True: a callback. False: `plan` prunes without training.
    validation : Data, optional
        Data on which accuracy and FLOPs are measured. Required by a callback; `plan` takes it as an argument.
    calibration : Data, optional
        Data on which units and tokens are scored. None: the validation data.
    objective : str or Objective, optional
        What accuracy is. None: "retrieval" for a dual encoder, else "exact_match".
    modes : sequence of str, optional
        Names of `comp.modes.MODES`. None: parameters of vision, language and cross-attention, tokens of vision and
        language, as far as the model has them.
    interval : int
        Training steps of a stage, during which the soft mask falls from 1 to 0.
    step : float
        Share of the dense FLOPs that a stage saves, in (0, 1).
    judged : {"both", "raised", "trained"}
        When accuracy is measured for a stage's cost, eq. (8): before training, after it, or the mean of both.
    confirm : bool
        Evaluate a mode, by replay, before it is pruned, and pass it over if another is then cheaper.
    rho, tau : float
        Probability of exploring, and its temperature in stages, eq. (9); ``rho=0``: greedy.
    history_weight, horizon : float, int
        l0 and I_max of the cost history, eq. (10).
    cip : bool
        Weight activations by token importance, eq. (4), not eq. (3).
    cit : bool
        Ignore pruned heads in token importance, eq. (7), not eq. (6).
    hold : bool
        Let token thresholds follow when heads are pruned, so that as many tokens are kept as before.
    tokens : {"threshold", "keep"}
        Drop tokens in the end by threshold, sample by sample, or the mean number of that in each block.
    seed : int
        Seed of the exploration.
    batch_size : int
        Samples run at once where nothing is trained.

    Attributes
    ----------
    history : list of dict
        What was pruned in each stage, and why.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._stages: Stages | None = None
        self._past: list[dict[str, Any]] = []  # the history, once the run is over
        self._kept: dict[str, Any] = {}  # the state, once the run is over
        self._board: Board | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """Records of the stages closed so far, or of those of the last run."""
        return self._stages.history if self._stages is not None else self._past

    # --- without training --------------------------------------------------------------------------------------------

    def plan(self, model: nn.Module, data: Data, *, progress: Progress | None = None) -> Plan:
        """Plan the pruning without training; the model is not changed.

        Parameters
        ----------
        model : nn.Module
            A transformers model of one of the supported families.
        data : Data
            Validation data, unless the field ``validation`` is set; units and tokens are scored on it too, unless the
            field ``calibration`` is.
        progress : Progress, optional
            Called after each stage.

        Returns
        -------
        Plan
            Heads and neurons to remove, and the tokens' thresholds or shares.

        Raises
        ------
        ValueError
            ``train=True``, a target that cannot be reached, a model without any of the modes, or an accuracy that is
            not finite.
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
        """Start the stages on a model: install the masks and measure the dense model."""
        if validation is None:
            raise ValueError("validation: None, expected data to measure accuracy on: CoMP(validation=load_data(...))")
        self.detach()
        self._past = []
        self._stages = Stages(self, model, validation)
        return self._stages

    def detach(self) -> None:
        """Remove all hooks, and with them all masks, from the model. The end of training does so."""
        if self._stages is not None:
            self._past = self._stages.history
            self._stages.patches.undo()
        if self._board is not None:
            self._board.close()
        self._stages = self._board = None

    # --- as a callback -----------------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Start the stages, or resume them from the checkpoint's state."""
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
        """Open and close stages, and lower the soft mask of what the open stage prunes."""
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
        """Close the open stage and log its numbers."""
        run.close_stage(state.global_step)
        thresholds = {name: mode.threshold for name, mode in run.modes.items()}
        found = of_stage(self.history[-1], thresholds, run.strategy.costs)
        state.log_history.append({"step": state.global_step, **found})
        if self._board is not None:
            self._board.write(found, state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        """Close the last stage, remove the hooks and apply the plan."""
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
        # No width is rounded up: that would restore neurons that the model was trained without.
        apply(model, plan, self.calibration or self.validation, round_to=1)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint of the Trainer stores, as plain data."""
        return {"args": {}, "attributes": self._stages.state() if self._stages is not None else self._kept}
