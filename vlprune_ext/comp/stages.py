"""Pruning loop of CoMP: one stage after another, until the FLOPs target is met.

Equation numbers are the paper's; what the paper leaves open, and is ours, is marked [ours].
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..anatomy import describe
from ..anatomy.linears import check_linears
from ..anatomy.patch import Patches
from ..data import Data
from ..plan import Plan
from .masks import Findings, Masks, examine, inputs_of
from .modes import MODES, Budget, Mode, TokenMode, level
from .settings import Settings
from .strategy import ModeStrategy, cost
from .validation import Measured, Validation

COLLABORATIVE = (
    "vision parameters",
    "language parameters",
    "cross-modal parameters",
    "vision tokens",
    "language tokens",
)
CLOSE = 0.005  # tolerance of the target, as a share of the dense model's FLOPs [ours]


@dataclass(frozen=True)
class _Choice:
    """The mode of a stage, its threshold raised.

    saves     FLOPs of one sample that will be saved
    costs     R of every mode, by which it was chosen
    explored  it was drawn by eq. (9)
    declined  mode -> its cost before training, of modes that were evaluated and passed over
    raised    the model with all that is going masked completely, before training; None: not measured
    """

    mode: Mode
    saves: float
    costs: dict[str, float]
    explored: bool
    declined: dict[str, float]
    raised: Measured | None


class Stages:
    """Run CoMP's stages on a model, under hooks that last until ``patches.undo()``.

    Parameters
    ----------
    settings : Settings
        The fields of CoMP or a baseline.
    model : nn.Module
        The dense model.
    validation : Data
        Data on which accuracy and FLOPs are measured.

    Attributes
    ----------
    history : list of dict
        One entry for each closed stage: what was chosen and why, what it saved and cost.
    """

    def __init__(self, settings: Settings, model: nn.Module, validation: Data) -> None:
        self.settings, self.model = settings, model
        self.history: list[dict[str, Any]] = []
        self.anatomy = describe(model)
        check_linears(self.anatomy, list(self.anatomy.towers))
        self.objective = settings.objective_for(self.anatomy)
        self.patches = Patches()
        self.masks = Masks(self.anatomy, heads_vote=settings.cit)
        try:
            self.masks.install(self.patches)
            self.validation = Validation(self.masks, self.objective, validation, settings.batch_size)
            self.scored = inputs_of(
                self.anatomy, self.objective, settings.calibration or validation, settings.batch_size
            )
            self.now: Measured = self.validation.dense
            self.dense, self.whole = self.now.flops, self.now.load  # of the dense model
            self.modes = self._modes()
            self.strategy = settings.strategy(list(self.modes))
            self.exhausted: list[str] = []
            self.mode: Mode | None = None  # of the open stage
            self.opened = 0  # the training step at which it began
            self.planned = 0.0  # share of the dense FLOPs that it will save
            self.entry: dict[str, Any] = {}
            self.frozen = False
        except BaseException:
            self.patches.undo()
            raise

    @property
    def length(self) -> int:
        """Training steps of the open stage."""
        return max(1, round(self.settings.interval * min(1.0, self.planned / self.settings.step)))

    @property
    def target(self) -> float:
        """FLOPs of one sample at which pruning ends."""
        return self.settings.flops * self.dense

    # --- stages ------------------------------------------------------------------------------------------------------

    def open_stage(self, step: int = 0) -> bool:
        """Choose a mode and raise its threshold, at a training step; return False once the FLOPs target is met."""
        if self.now.flops <= self.target + CLOSE * self.dense:
            self.frozen = True
            return False
        found = self._examine()
        if not self.strategy.costs:
            self._measure_all(found)
        choice = self._choose(found)
        self.mode, self.opened, self.planned = choice.mode, step, choice.saves / self.dense
        self.entry = {
            "stage": len(self.history),
            "step": step,
            "mode": choice.mode.name,
            "explored": choice.explored,
            "declined": choice.declined,
            "costs": choice.costs,
            "waited": dict(self.strategy.waited),
            "threshold": choice.mode.threshold,
        }
        if choice.raised is not None:
            self.entry["raised"] = {"accuracy": choice.raised.accuracy, "flops": choice.raised.flops / self.dense}
        self._agree()
        return True

    def _choose(self, found: Findings) -> _Choice:
        """Choose the mode of the stage and raise its threshold.

        Costs date from earlier stages, and pruning changes what a model can spare. So a mode is evaluated, by replay,
        before it is pruned. If another is then cheaper, that one is evaluated, until the cheapest is one that was
        [ours].
        """
        tried: dict[str, Measured] = {}
        declined: dict[str, float] = {}
        while True:
            among = [name for name in self.modes if name not in self.exhausted]
            if not among:
                raise ValueError(
                    f"flops: {self.settings.flops}, expected at least {self.now.flops / self.dense:.3f}: no mode"
                    " can save more"
                )
            if declined:
                chosen, explored = self.strategy.cheapest(among), False
            else:
                spent = (self.dense - self.now.flops) / (self.dense - self.target)
                chosen, explored = self.settings.choose(self.strategy, among, spent)
            mode, costs = self.modes[chosen], dict(self.strategy.costs)
            saves = mode.raise_threshold(found, self._budget(), self._goal())
            if saves <= 0:
                self.exhausted.append(chosen)
                continue
            withdraw = self._hold_tokens(mode, found)
            if chosen not in tried and (self.settings.confirm or self.settings.judged != "trained"):
                tried[chosen] = self._raised(mode)
                lost = self._cost(self.now, tried[chosen], saves / self.dense)
                if self.settings.confirm and self.strategy.expected(chosen, lost) > min(costs[name] for name in among):
                    self.strategy.decline(chosen, lost)
                    declined[chosen] = lost
                    withdraw()
                    continue
            declined.pop(chosen, None)
            return _Choice(mode, saves, costs, explored, declined, tried.get(chosen))

    def _hold_tokens(self, mode: Mode, found: Findings) -> Callable[[], None]:
        """Move token thresholds so that as many tokens run as before the mode's units were pruned [ours].

        Thresholds are of importances, which depend on the remaining heads. Returns what undoes it, and the mode's
        pruning.
        """
        held = []
        if self.settings.hold and not isinstance(mode, TokenMode):
            changed = self._changed(mode)
            held = [m for m in self._token_modes() if changed & set(m.towers())]
        before = [m.limit.gone for m in held]
        if held:
            mode.soften(0.0)
        for other in held:
            towers = [tower for tower in self.scored if tower in other.towers()] or list(self.scored)
            running = partial(self.validation.running, {tower: self.scored[tower] for tower in towers})
            other.hold(running, found.load())

        def withdraw() -> None:
            mode.withdraw()
            for other, threshold in zip(held, before, strict=True):
                other.place(threshold)

        return withdraw

    def _token_modes(self) -> list[TokenMode]:
        """Return the modes that have dropped tokens."""
        return [mode for mode in self.modes.values() if isinstance(mode, TokenMode) and mode.limit.gone > 0]

    def _changed(self, mode: Mode) -> set[str]:
        """Return the towers that change with a mode: its own, and those that run on their outputs."""
        if len(self.scored) > 1:
            return set(mode.towers())
        names = list(self.anatomy.towers)
        return set(names[min(map(names.index, mode.towers())) :])

    def _raised(self, mode: Mode) -> Measured:
        """Measure the model with all that is going masked completely, by replay."""
        mode.soften(0.0)
        (measured,) = self.validation.trials(mode.towers(), [nullcontext])
        return measured

    def soften(self, counts: float) -> None:
        """Set the soft mask of what the open stage prunes, from 1 down to 0."""
        if self.mode is not None:
            self.mode.soften(counts)

    def close_stage(self, step: int) -> None:
        """Prune what is going for good, measure the model and update the mode's cost, at a training step."""
        assert self.mode is not None
        self.mode.settle()
        before, self.now = self.now, self.validation.now()
        self._learn(before)
        self.history.append(
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

    def _learn(self, before: Measured) -> None:
        """Update the mode's R by the stage's cost, eqs. (8) and (10).

        Accuracy before training shows the mode alone, but not what training repairs; after training, the effect of
        training is part of it. With ``judged="both"`` accuracy and FLOPs are the mean of both [ours].
        """
        assert self.mode is not None
        seen = {"trained": self.now}
        if "raised" in self.entry:
            raised = self.entry["raised"]
            seen["raised"] = replace(self.now, accuracy=raised["accuracy"], flops=raised["flops"] * self.dense)
        used = [seen[name] for name in seen if self.settings.judged in ("both", name)]
        after = replace(
            self.now,
            accuracy=sum(one.accuracy for one in used) / len(used),
            flops=sum(one.flops for one in used) / len(used),
        )
        paid = self._cost(before, after, self.planned)
        self.strategy.update(self.mode.name, paid)
        self.entry["cost"] = paid

    def _examine(self) -> Findings:
        """Measure the importances of all units and tokens."""
        return examine(self.masks, self.objective, self.scored, weigh_tokens=self.settings.cip)

    def _budget(self) -> Budget:
        """Return the current FLOPs budget."""
        return Budget(self.masks, self.validation.total, self.now.load)

    def _goal(self) -> float:
        """Return the FLOPs that the next stage saves."""
        return min(self.settings.step * self.dense, self.now.flops - self.target)

    def _cost(self, before: Measured, after: Measured, planned: float) -> float:
        """Return the cost by eq. (8), with FLOPs as shares of the dense model's.

        Token counts vary as a model learns. A stage that saved less than half of ``planned`` counts as having saved
        that half [ours]: divided by almost nothing, one sample more or less would decide.
        """
        saved = max((before.flops - after.flops) / self.dense, planned / 2)
        return cost((before.accuracy, after.accuracy), (saved, 0.0))

    # --- before the first stage --------------------------------------------------------------------------------------

    def _modes(self) -> dict[str, Mode]:
        """Build the wanted modes that the model has."""
        wanted = COLLABORATIVE if self.settings.modes is None else self.settings.modes
        built = {name: MODES[name](self.masks) for name in wanted}
        missing = [name for name, mode in built.items() if mode is None]
        if missing and self.settings.modes is not None:
            raise ValueError(f"modes: {type(self.model).__name__} has no {', '.join(missing)}")
        found = {name: mode for name, mode in built.items() if mode is not None}
        if not found:
            raise ValueError(f"model: {type(self.model).__name__} has none of {', '.join(wanted)}")
        return found

    def _measure_all(self, found: Findings) -> None:
        """Measure the first cost of every mode [ours], by replay; raise ValueError if the target cannot be reached."""
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
        everything = self.validation.within(lambda: self._all_raised(found, budget, math.inf, self.modes.values()))
        least = everything.flops / self.dense
        if least > self.settings.flops + CLOSE:
            raise ValueError(
                f"flops: {self.settings.flops}, expected at least {least:.3f}, the least that {', '.join(self.modes)}"
                f" can leave of {type(self.model).__name__}"
            )

    @contextmanager
    def _all_raised(self, found: Findings, budget: Budget, goal: float, modes: Iterable[Mode]) -> Iterator[None]:
        """Prune these modes by one stage at once, without soft masks, while the context lasts."""
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
        """Return the share of remaining units of each tower and kind."""
        kept = self.masks.kept()
        found: dict[str, list[int]] = {}
        for (tower, layer, kind), site in self.masks.sites.items():
            counts = found.setdefault(f"{tower}.{kind}", [0, 0])
            counts[0] += kept.get((tower, layer, kind), site.units)
            counts[1] += site.units
        return {name: left / every for name, (left, every) in found.items()}

    def _return(self) -> None:
        """Move token thresholds back to the FLOPs at which pruning ended: training changes token counts [ours]."""
        modes = self._token_modes()
        goal, placed = self.now.flops, [mode.limit.gone for mode in modes]

        def missing(scale: float) -> float:
            for mode, threshold in zip(modes, placed, strict=True):
                mode.place(scale * threshold)
            self.now = self.validation.now()
            return 1 - self.now.flops / goal

        if self.settings.hold and self.frozen and modes:
            level(1.0, missing)
        else:
            self.now = self.validation.now()
        self._agree()

    def plan(self) -> Plan:
        """Return what is gone as a plan, with the history and what was reached."""
        self._return()
        plan = Plan(self.anatomy.shape(), method={**self.settings.describe(), "objective": self.objective.name})
        found = self._examine() if self.settings.tokens == "keep" else None
        for mode in self.modes.values():
            mode.write(plan, found)
        plan.method["history"] = self.history
        plan.method["reached"] = {
            "accuracy": self.now.accuracy,
            "flops": self.now.flops / self.dense,
            "tokens": self.now.load.shares(self.whole),
        }
        return plan

    # --- to be kept --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return the state as plain data, for `load`."""
        return {
            "fields": {
                key: value
                for key, value in self.settings.describe().items()
                if key not in ("validation", "calibration")
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
            "history": self.history,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned; raise ValueError if it was taken with other fields."""
        given = json.loads(json.dumps(self.state()["fields"]))
        kept = state["fields"]
        different = [key for key in {**given, **kept} if given.get(key) != kept.get(key)]
        if different:
            name = different[0]
            raise ValueError(f"{name}: {given.get(name)!r}, but the run to go on with has {kept.get(name)!r}")
        for name, mode in self.modes.items():
            mode.load(state["modes"][name])
        self.strategy = ModeStrategy(**state["strategy"])
        self.exhausted, self.frozen = list(state["exhausted"]), state["frozen"]
        self.history = list(state["history"])
        self.opened, self.planned, self.entry = (state["stage"][key] for key in ("opened", "planned", "entry"))
        self.mode = self.modes.get(state["stage"]["mode"])
        self.now = replace(self.now, **state["now"])

    def _agree(self) -> None:
        """Broadcast the state of the first process, so that all of a distributed run decide alike."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            said = [self.state()]
            torch.distributed.broadcast_object_list(said)
            self.load(said[0])
