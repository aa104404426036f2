"""Multi-mode strategy of CoMP (arXiv 2604.02956): which mode is pruned in the next stage.

Equation numbers are the paper's. A mode is only a name here.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


def cost(accuracy: tuple[float, float], flops: tuple[float, float]) -> float:
    """Return the accuracy lost per FLOP saved, eq. (8): the lower, the better.

    Parameters
    ----------
    accuracy : tuple of float
        (before, after).
    flops : tuple of float
        (before, after).

    Returns
    -------
    float

    Raises
    ------
    ValueError
        An accuracy that is not finite, or no FLOPs saved.
    """
    if not all(map(math.isfinite, accuracy)):
        raise ValueError(f"accuracy is {accuracy}; expected finite numbers")
    saved = flops[0] - flops[1]
    if not saved > 0:
        raise ValueError(f"flops is {flops}; expected fewer after than before")
    return (accuracy[0] - accuracy[1]) / saved


@dataclass
class ModeStrategy:
    """Choose the mode of each stage by its cost history, with exploration.

    Parameters
    ----------
    modes : sequence of str
        Their names.
    rho : float
        Probability of exploring (0.2).
    tau : float
        Temperature of the exploration, in stages (5).
    history : float
        l0, weight of a cost that was measured one stage ago (0.4).
    horizon : int
        I_max, stages after which a cost is forgotten (5).
    seed : int
        Seed of the exploration: the same seed, the same choices, however often the run is interrupted.
    costs : dict of str to float
        Mode -> R; a mode without one has to be measured first.
    waited : dict of str to int
        Mode -> I, stages since its cost was last measured.
    stage : int
        Stages so far.
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
        """Return the modes that have no cost yet."""
        return [mode for mode in self.modes if mode not in self.costs]

    def exploration(self, among: Sequence[str] | None = None) -> dict[str, float]:
        """Return the probabilities of an exploring stage, eq. (9): the softmax of ``I / tau``.

        Parameters
        ----------
        among : sequence of str, optional
            Modes that can still save FLOPs. None: all.

        Returns
        -------
        dict of str to float
            Mode -> probability.
        """
        names = self.modes if among is None else among
        powers = {mode: math.exp((self.waited[mode] - max(self.waited.values())) / self.tau) for mode in names}
        total = sum(powers.values())
        return {mode: power / total for mode, power in powers.items()}

    def choose(self, among: Sequence[str] | None = None) -> tuple[str, bool]:
        """Choose the mode of this stage: by exploration with probability rho, else the one of least cost.

        Parameters
        ----------
        among : sequence of str, optional
            Modes that can still save FLOPs. None: all.

        Returns
        -------
        tuple of (str, bool)
            The mode, the first of those of equal cost, and whether it is exploration.

        Raises
        ------
        ValueError
            No mode, an unknown one, or one without a cost.
        """
        names = list(self.modes if among is None else among)
        unknown = [mode for mode in names if mode not in self.modes]
        if not names or unknown:
            raise ValueError(f"among is {names}; expected some of {', '.join(self.modes)}")
        missing = [mode for mode in names if mode not in self.costs]
        if missing:
            raise ValueError(f"costs: {', '.join(missing)} not measured yet")
        draw = random.Random(f"{self.seed}, {self.stage}")  # seeded by stage: no generator state to save
        if draw.random() < self.rho:
            chances = self.exploration(names)
            return draw.choices(names, [chances[mode] for mode in names])[0], True
        return self.cheapest(names), False

    def cheapest(self, among: Sequence[str]) -> str:
        """Return the mode of least cost, the first of those of equal cost."""
        return min(among, key=lambda mode: self.costs[mode])

    def expected(self, mode: str, lost: float) -> float:
        """Return the expected cost of pruning ``mode`` in this stage, given its cost ``lost`` before training [ours].

        Training may repair some of the loss, so ``lost`` is an upper bound; if it is above R, the mean of both is
        expected.
        """
        return min(lost, (self.costs[mode] + lost) / 2)

    def decline(self, mode: str, lost: float) -> None:
        """Record that ``mode`` was evaluated and passed over: its R is now the expected cost."""
        self.costs[mode] = self.expected(mode, lost)
        self.waited[mode] = 0

    def update(self, mode: str, measured: float) -> None:
        """Update the R of ``mode`` by this stage's cost, eq. (10), in which older costs weigh less; end the stage.

        Parameters
        ----------
        mode : str
            The mode that was pruned.
        measured : float
            r, by eq. (8).

        Raises
        ------
        ValueError
            An unknown mode, or a cost that is not finite.
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
        """Return the state as plain data, for ``ModeStrategy(**...)``."""
        return asdict(self)
