"""What CoMP is told: its fields, what they may be, and what differs between it and its baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..anatomy import Anatomy
from ..data import Data
from ..objectives import Objective, objective_named
from .modes import MODES
from .strategy import ModeStrategy

TOKENS = ("threshold", "keep")
JUDGED = ("both", "raised", "trained")


@dataclass(kw_only=True, eq=False)
class Settings:
    """The fields of CoMP (arXiv 2604.02956); what the paper leaves open, and is ours, is marked [ours].

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

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    def describe(self) -> dict[str, Any]:
        """The method's name and fields, as plain data."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        for place in ("validation", "calibration"):
            data = found[place]
            found[place] = None if data is None else data.origin
        if isinstance(self.objective, Objective):
            found["objective"] = self.objective.name
        if self.modes is not None:
            found["modes"] = list(self.modes)
        return {"name": self.name, **found}

    def objective_for(self, anatomy: Anatomy) -> Objective:
        """What accuracy is, of a model of this anatomy: `objective`, or what is usual for its kind."""
        return objective_named(self.objective, anatomy, "decide")

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
