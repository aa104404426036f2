"""CoMP: parameters and tokens pruned together (Collaborative Multi-Mode Pruning, CVPR 2026, arXiv 2604.02956).

A *mode* is something that can be pruned further: parameters or tokens, of vision or language. One stage after another,
the mode that costs the least accuracy for each FLOP saved is pruned a little more, until the model is small enough.
Equation numbers are the paper's; what the paper leaves open, and is ours, is marked [ours].
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from ..anatomy import describe
from ..comp.flops import Load
from ..comp.masks import Findings, Masks, examine, inputs_of
from ..comp.modes import MODES, Budget, Mode
from ..comp.scalars import Board, of_stage
from ..comp.strategy import ModeStrategy, cost
from ..comp.validation import Measured, Validation
from ..data import Data
from ..objectives import Objective, objective_named
from ..patch import Patches
from ..plan import Plan
from ..replay import Progress
from ..surgery import apply

COLLABORATIVE = (
    "vision parameters",
    "language parameters",
    "cross-modal parameters",
    "vision tokens",
    "language tokens",
)
TOKENS = ("threshold", "keep")
JUDGED = ("raised", "trained")
CLOSE = 0.005  # of the dense model's FLOPs: so near to the target counts as there [ours]


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
                nothing trained yet, so that a mode answers for what it did and nothing else; or "trained", when the
                stage is over [ours: the paper does not say]
    rho, tau    probability of exploring, and its temperature in stages, eq. (9); rho=0: greedy
    history_weight, horizon  l0 and I_max of eq. (10); history_weight=0: only the last cost counts
    cip         tokens weigh activations, eq. (4); False: they all count alike, eq. (3)
    cit         pruned heads have no say in what tokens are worth, eq. (7); False: eq. (6)
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
    interval: int = 50
    step: float = 0.05
    judged: str = "raised"
    rho: float = 0.2
    tau: float = 5.0
    history_weight: float = 0.4
    horizon: int = 5
    cip: bool = True
    cit: bool = True
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
        self._strategy(["one"])
        self._run: _Run | None = None
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

    # --- what differs between CoMP and its baselines -----------------------------------------------------------------

    def choose(self, strategy: ModeStrategy, among: list[str], spent: float) -> tuple[str, bool]:
        """The mode of a stage, and whether it is explored.

        among  modes that can still save FLOPs; spent: the share of all that is to be saved that is saved already
        """
        return strategy.choose(among)

    def _strategy(self, modes: Sequence[str]) -> ModeStrategy:
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
        with self._at_work(model, self.validation or data) as run:
            while run.open_stage():
                run.soften(0.0)
                run.close_stage(step=len(self.history))
                if progress is not None:
                    saved = 1 - run.now.flops / run.dense
                    progress(
                        min(round(1000 * saved), round(1000 * (1 - self.flops))),
                        round(1000 * (1 - self.flops)),
                        "saved",
                    )
            return run.plan()

    @contextmanager
    def _at_work(self, model: nn.Module, validation: Data | None) -> Iterator[_Run]:
        run = self._begin(model, validation)
        try:
            yield run
        finally:
            self.detach()

    def _begin(self, model: nn.Module, validation: Data | None) -> _Run:
        if validation is None:
            raise ValueError("validation: None, expected data to measure accuracy on: CoMP(validation=load_data(...))")
        self.detach()
        self.history = []
        self._run = _Run(self, model, validation)
        return self._run

    def detach(self) -> None:
        """Take the hooks off the model; what they masked counts again. Training does so at its end."""
        if self._run is not None:
            self._run.patches.undo()
        if self._board is not None:
            self._board.close()
        self._run = self._board = None

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
        run = self._run
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

    def _close_stage(self, run: _Run, state: TrainerState) -> None:
        run.close_stage(state.global_step)
        thresholds = {name: mode.threshold for name, mode in run.modes.items()}
        found = of_stage(self.history[-1], thresholds, run.strategy.costs)
        state.log_history.append({"step": state.global_step, **found})
        if self._board is not None:
            self._board.write(found, state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        run = self._run
        if run is None:
            return
        if run.mode is not None:
            self._close_stage(run, state)
        plan, model, self._kept = run.plan(), run.model, run.state()
        self.detach()
        apply(
            model, plan, self.calibration or self.validation, round_to=1
        )  # what was trained without should not come back

    def state(self) -> dict[str, Any]:
        """What a checkpoint of the Trainer keeps: plain data."""
        return {"args": {}, "attributes": self._run.state() if self._run is not None else self._kept}


class _Run:
    """CoMP at work on a model."""

    def __init__(self, method: CoMP, model: nn.Module, validation: Data) -> None:
        self.method, self.model = method, model
        self.anatomy = describe(model)
        objective = method.objective
        if objective is None:
            objective = "retrieval" if set(self.anatomy.family.embed) == {"vision", "text"} else "exact_match"
        self.objective = objective_named(objective, self.anatomy)
        self.patches = Patches()
        self.masks = Masks(self.anatomy, heads_vote=method.cit)
        try:
            self.masks.install(self.patches)
            self.validation = Validation(self.masks, self.objective, validation, method.batch_size)
            self.scored = inputs_of(self.anatomy, self.objective, method.calibration or validation, method.batch_size)
            self.dense = self.validation.dense
            self.now: Measured = self.validation.now()
            self.whole: Load = self.now.load
            self.modes = self._modes()
            self.strategy = method._strategy(list(self.modes))
            self.exhausted: list[str] = []
            self.mode: Mode | None = None  # of the open stage
            self.opened = 0  # the training step at which it began
            self.planned = 0.0  # share of the dense FLOPs that it is to save
            self.entry: dict[str, Any] = {}
            self.frozen = False
        except BaseException:
            self.patches.undo()
            raise

    @property
    def length(self) -> int:
        """Training steps of the open stage."""
        return max(1, round(self.method.interval * min(1.0, self.planned / self.method.step)))

    @property
    def target(self) -> float:
        """FLOPs of one sample."""
        return self.method.flops * self.dense

    # --- stages ------------------------------------------------------------------------------------------------------

    def open_stage(self, step: int = 0) -> bool:
        """Choose a mode and raise its threshold; False once the model is small enough."""
        if self.now.flops <= self.target + CLOSE * self.dense:
            self.frozen = True
            return False
        found = self._examine()
        if not self.strategy.costs:
            self._measure_all(found)
        while True:
            among = [name for name in self.modes if name not in self.exhausted]
            if not among:
                raise ValueError(
                    f"flops: {self.method.flops}, expected at least {self.now.flops / self.dense:.3f}: no mode can save"
                    " more"
                )
            spent = (self.dense - self.now.flops) / (self.dense - self.target)
            chosen, explored = self.method.choose(self.strategy, among, spent)
            mode = self.modes[chosen]
            saves = mode.raise_threshold(found, self._budget(), self._goal())
            if saves > 0:
                break
            self.exhausted.append(chosen)
        self.mode, self.opened, self.planned = mode, step, saves / self.dense
        self.entry = {
            "stage": len(self.method.history),
            "step": step,
            "mode": chosen,
            "explored": explored,
            "costs": dict(self.strategy.costs),
            "waited": dict(self.strategy.waited),
            "threshold": mode.threshold,
        }
        if self.method.judged == "raised":
            mode.soften(0.0)
            (measured,) = self.validation.trials(mode.towers(), [nullcontext])
            self._learn(mode, measured)
        self._agree()
        return True

    def soften(self, counts: float) -> None:
        """What the open stage takes away counts so much."""
        if self.mode is not None:
            self.mode.soften(counts)

    def close_stage(self, step: int) -> None:
        """What was going is gone."""
        assert self.mode is not None
        self.mode.settle()
        before, self.now = self.now, self.validation.now()
        if self.method.judged == "trained":
            self._learn(self.mode, self.now, before)
        self.method.history.append(
            {
                **self.entry,
                "closed": step,
                "accuracy": [before.accuracy, self.now.accuracy],
                "flops": [before.flops / self.dense, self.now.flops / self.dense],
                "tokens": self.now.load.shares(self.whole),
                "units": self._units_left(),
            }
        )
        self.mode = None
        self._agree()

    def _learn(self, mode: Mode, after: Measured, before: Measured | None = None) -> None:
        """What a stage cost, eqs. (8) and (10)."""
        paid = self._cost(before or self.now, after, self.planned)
        self.strategy.update(mode.name, paid)
        self.entry |= {"cost": paid, "measured": after.accuracy}

    def _examine(self) -> Findings:
        return examine(self.masks, self.objective, self.scored, weigh_tokens=self.method.cip)

    def _budget(self) -> Budget:
        return Budget(self.masks, self.validation.total, self.now.load)

    def _goal(self) -> float:
        return min(self.method.step * self.dense, self.now.flops - self.target)

    def _cost(self, before: Measured, after: Measured, planned: float) -> float:
        """Eq. (8), with FLOPs as shares of the dense model's.

        Tokens come and go as a model learns. A stage that saved less than half of what it was to save is judged as if
        it had saved that half [ours]: divided by next to nothing, one sample more or less would decide.
        """
        saved = max((before.flops - after.flops) / self.dense, planned / 2)
        return cost((before.accuracy, after.accuracy), (saved, 0.0))

    # --- before the first stage --------------------------------------------------------------------------------------

    def _modes(self) -> dict[str, Mode]:
        """Those of the wanted modes that the model has."""
        wanted = COLLABORATIVE if self.method.modes is None else self.method.modes
        built = {name: MODES[name](self.masks) for name in wanted}
        missing = [name for name, mode in built.items() if mode is None]
        if missing and self.method.modes is not None:
            raise ValueError(f"modes: {type(self.model).__name__} has no {', '.join(missing)}")
        found = {name: mode for name, mode in built.items() if mode is not None}
        if not found:
            raise ValueError(f"model: {type(self.model).__name__} has none of {', '.join(wanted)}")
        return found

    def _measure_all(self, found: Findings) -> None:
        """The first cost of every mode [ours], by replay; and whether the target can be reached at all."""
        budget = self._budget()
        together: dict[tuple[str, ...], list[Mode]] = {}
        for mode in self.modes.values():
            together.setdefault(mode.towers(), []).append(mode)
        for towers, modes in together.items():
            contexts = [lambda m=mode: self._all_raised(found, budget, self._goal(), [m]) for mode in modes]
            for mode, measured in zip(modes, self.validation.trials(towers, contexts), strict=True):
                if measured.flops < self.now.flops:
                    self.strategy.costs[mode.name] = self._cost(self.now, measured, 0.0)
                else:
                    self.exhausted.append(mode.name)
        with self._all_raised(found, budget, math.inf, self.modes.values()):
            least = self.validation.now().flops / self.dense
        self.now = self.validation.now()
        if least > self.method.flops + CLOSE:
            raise ValueError(
                f"flops: {self.method.flops}, expected at least {least:.3f}, the least that {', '.join(self.modes)} can"
                f" leave of {type(self.model).__name__}"
            )

    @contextmanager
    def _all_raised(self, found: Findings, budget: Budget, goal: float, modes) -> Iterator[None]:
        """Some modes as they would be after one stage, without fading."""
        raised = []
        try:
            for mode in modes:
                if mode.raise_threshold(found, budget, goal):
                    raised.append(mode)
                    mode.soften(0.0)
            yield
        finally:
            for mode in raised:
                mode.withdraw()

    # --- what is left ------------------------------------------------------------------------------------------------

    def _units_left(self) -> dict[str, float]:
        """Tower and kind -> share of its units."""
        kept = self.masks.kept()
        found: dict[str, list[int]] = {}
        for (tower, layer, kind), site in self.masks.sites.items():
            counts = found.setdefault(f"{tower}.{kind}", [0, 0])
            counts[0] += kept.get((tower, layer, kind), site.units)
            counts[1] += site.units
        return {name: left / every for name, (left, every) in found.items()}

    def plan(self) -> Plan:
        """What is gone."""
        plan = Plan(self.anatomy.shape(), method={**self.method.describe(), "objective": self.objective.name})
        found = self._examine() if self.method.tokens == "keep" else None
        for mode in self.modes.values():
            mode.write(plan, found)
        self.now = self.validation.now()
        plan.method["history"] = self.method.history
        plan.method["reached"] = {
            "accuracy": self.now.accuracy,
            "flops": self.now.flops / self.dense,
            "tokens": self.now.load.shares(self.whole),
        }
        return plan

    # --- to be kept --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Plain data, from which `load` goes on."""
        return {
            "fields": {
                key: value for key, value in self.method.describe().items() if key not in ("validation", "calibration")
            },
            "modes": {name: mode.state() for name, mode in self.modes.items()},
            "strategy": self.strategy.as_dict(),
            "exhausted": self.exhausted,
            "stage": {
                "mode": None if self.mode is None else self.mode.name,
                "opened": self.opened,
                "planned": self.planned,
                "entry": self.entry,
            },
            "now": {"accuracy": self.now.accuracy, "flops": self.now.flops},
            "frozen": self.frozen,
            "history": self.method.history,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Be where `state` was taken."""
        given = json.loads(json.dumps(self.state()["fields"]))
        different = [key for key, value in state["fields"].items() if given.get(key) != value]
        if different:
            name = different[0]
            raise ValueError(f"{name}: {given.get(name)!r}, but the run to go on with has {state['fields'][name]!r}")
        for name, mode in self.modes.items():
            mode.load(state["modes"][name])
        self.strategy = ModeStrategy(**state["strategy"])
        self.exhausted, self.frozen = list(state["exhausted"]), state["frozen"]
        self.method.history = list(state["history"])
        self.opened, self.planned, self.entry = (state["stage"][key] for key in ("opened", "planned", "entry"))
        self.mode = self.modes.get(state["stage"]["mode"])
        self.now = replace(self.now, **state["now"])

    def _agree(self) -> None:
        """Where several processes train, all do what the first has decided."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            said = [self.state()]
            torch.distributed.broadcast_object_list(said)
            self.load(said[0])
