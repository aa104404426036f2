"""The multi-mode strategy of CoMP (arXiv 2604.02956): which mode is pruned in the next stage.

Equation numbers are the paper's. A mode is a name: what it prunes, and how, is not this file's business.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


def cost(accuracy: tuple[float, float], flops: tuple[float, float]) -> float:
    """Accuracy lost for each FLOP saved, eq. (8), of what was (before, after): the lower, the better.

    Raises ValueError if an accuracy is not finite or no FLOP was saved.
    """
    if not all(map(math.isfinite, accuracy)):
        raise ValueError(f"accuracy is {accuracy}; expected finite numbers")
    saved = flops[0] - flops[1]
    if not saved > 0:
        raise ValueError(f"flops is {flops}; expected fewer after than before")
    return (accuracy[0] - accuracy[1]) / saved


@dataclass
class ModeStrategy:
    """Chooses a mode, is told what that cost, and remembers.

    modes      their names
    rho        probability of exploring (0.2)
    tau        temperature of the exploration, in stages (5)
    history    weight l0 of a cost that was measured one stage ago (0.4)
    horizon    stages I_max after which a cost is forgotten (5)
    seed       of the exploration: the same seed, the same choices, however often the run is interrupted

    costs      mode -> R; a mode without has to be measured first
    waited     mode -> I, stages since its cost was last measured
    stage      how many stages there have been
    """

    modes: Sequence[str]
    rho: float = 0.2
    tau: float = 5.0
    history: float = 0.4
    horizon: int = 5
    seed: int = 0
    costs: dict[str, float] = field(default_factory=dict)
    waited: dict[str, int] = field(default_factory=dict)
    stage: int = 0

    def __post_init__(self) -> None:
        self.modes = tuple(self.modes)
        if not self.modes or len(set(self.modes)) < len(self.modes):
            raise ValueError(f"modes is {self.modes}; expected names, each once")
        if not 0 <= self.rho <= 1 or not 0 <= self.history <= 1:
            raise ValueError(f"rho is {self.rho} and history {self.history}; expected shares")
        if not self.tau > 0 or self.horizon < 1:
            raise ValueError(f"tau is {self.tau} and horizon {self.horizon}; expected positive numbers")
        for mode in self.modes:
            self.waited.setdefault(mode, 1)

    def unmeasured(self) -> list[str]:
        """Modes that have no cost yet."""
        return [mode for mode in self.modes if mode not in self.costs]

    def exploration(self, among: Sequence[str] | None = None) -> dict[str, float]:
        """Probabilities of an exploring stage, eq. (9): the softmax of ``I / tau``."""
        names = self.modes if among is None else among
        powers = {mode: math.exp((self.waited[mode] - max(self.waited.values())) / self.tau) for mode in names}
        total = sum(powers.values())
        return {mode: power / total for mode, power in powers.items()}

    def choose(self, among: Sequence[str] | None = None) -> tuple[str, bool]:
        """The mode of this stage, and whether it is explored; ``among``: those that can still give FLOPs.

        Otherwise the mode of least cost, the first of those that are alike. Raises ValueError if none is left, or one
        of them was not measured.
        """
        names = list(self.modes if among is None else among)
        unknown = [mode for mode in names if mode not in self.modes]
        if not names or unknown:
            raise ValueError(f"among is {names}; expected some of {', '.join(self.modes)}")
        missing = [mode for mode in names if mode not in self.costs]
        if missing:
            raise ValueError(f"costs: {', '.join(missing)} not measured yet")
        draw = random.Random(f"{self.seed}, {self.stage}")  # no state to save
        if draw.random() < self.rho:
            chances = self.exploration(names)
            return draw.choices(names, [chances[mode] for mode in names])[0], True
        return self.cheapest(names), False

    def cheapest(self, among: Sequence[str]) -> str:
        """The mode of least cost, the first of those that are alike."""
        return min(among, key=lambda mode: self.costs[mode])

    def expected(self, mode: str, lost: float) -> float:
        """What pruning ``mode`` in this stage may cost, if before training it costs ``lost`` [ours].

        Training may repair some of that, so it is the most that a stage can cost; if that is more than R, the mean.
        """
        return min(lost, (self.costs[mode] + lost) / 2)

    def decline(self, mode: str, lost: float) -> None:
        """``mode`` was tried and passed over: R is what it was expected to cost."""
        self.costs[mode] = self.expected(mode, lost)
        self.waited[mode] = 0

    def update(self, mode: str, measured: float) -> None:
        """What pruning ``mode`` in this stage cost: R by eq. (10), in which what is old counts less; the stage is over.

        Raises ValueError for a mode that it does not know, and a cost that is not finite.
        """
        if mode not in self.modes:
            raise ValueError(f"mode is {mode!r}; expected one of {', '.join(self.modes)}")
        if not math.isfinite(measured):
            raise ValueError(f"measured is {measured}; expected a finite number")
        before = self.costs.get(mode)
        weight = max(self.history - self.history / self.horizon * max(self.waited[mode] - 1, 0), 0.0)
        self.costs[mode] = measured if before is None else weight * before + (1 - weight) * measured
        self.waited[mode] = 0
        for name in self.modes:
            self.waited[name] += 1
        self.stage += 1

    def as_dict(self) -> dict[str, Any]:
        """Plain data, from which ``ModeStrategy(**...)`` goes on."""
        return asdict(self)
