"""Fields of CoMP, their checks, and what differs between it and its baselines."""

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
    """Hold the fields of CoMP (arXiv 2604.02956); what the paper leaves open, and is ours, is marked [ours].

    Parameters
    ----------
    flops : float
        Share of the dense model's FLOPs that is kept, in (0, 1).
    train : bool
        True: prune while training, as a callback. False: `plan` prunes without training.
    validation : Data, optional
        Data on which accuracy and FLOPs are measured; `plan` takes it as an argument.
    calibration : Data, optional
        Data on which units and tokens are scored. None: the validation data.
    objective : str or Objective, optional
        What accuracy is. None: "retrieval" for a dual encoder, else "exact_match".
    modes : sequence of str, optional
        Names of `comp.modes.MODES`. None: the five of CoMP, as far as the model has them.
    interval : int
        Training steps of a stage, during which the soft mask falls from 1 to 0 [ours: the paper gives no number].
    step : float
        Share of the dense FLOPs that a stage saves, in (0, 1); a stage that can save less is shorter in proportion
        [ours].
    judged : {"both", "raised", "trained"}
        When the accuracy after a stage is measured for eq. (8). "raised": with all that is going masked completely,
        before training; "trained": at the end of the stage; "both": their mean [ours: the paper does not say].
    confirm : bool
        True: a mode is evaluated, by replay, before it is pruned, and passed over if another is then cheaper [ours].
        False: it is pruned whatever it costs by now, as in the paper.
    rho : float
        Probability of exploring, eq. (9); 0: greedy.
    tau : float
        Temperature of the exploration, in stages, eq. (9).
    history_weight : float
        l0 of eq. (10); 0: only the last cost is used.
    horizon : int
        I_max of eq. (10), in stages.
    cip : bool
        True: activations are weighted by token importance, eq. (4). False: eq. (3).
    cit : bool
        True: token importance ignores pruned heads, eq. (7). False: eq. (6).
    hold : bool
        True: token thresholds follow when heads are pruned, so that as many tokens are kept as before [ours]. False:
        they stay fixed, and a pruned head may take tokens with it, as in the paper.
    tokens : {"threshold", "keep"}
        How the plan drops tokens. "threshold": sample by sample; "keep": in each block the mean number of that, the
        same for all samples [ours].
    seed : int
        Seed of the exploration.
    batch_size : int
        Samples run at once where nothing is trained.
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
        """Name on the command line and in plans."""
        return type(self).__name__.lower()

    def describe(self) -> dict[str, Any]:
        """Return the method's name and fields, as plain data."""
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
        """Return the objective that accuracy is: the field, or the default for a model of this anatomy."""
        return objective_named(self.objective, anatomy, "decide")

    # --- what differs between CoMP and its baselines -----------------------------------------------------------------

    def choose(self, strategy: ModeStrategy, among: list[str], spent: float) -> tuple[str, bool]:
        """Choose the mode of the next stage.

        Parameters
        ----------
        strategy : ModeStrategy
            The costs so far.
        among : list of str
            Modes that can still save FLOPs.
        spent : float
            Share of the FLOPs reduction that is reached, in [0, 1].

        Returns
        -------
        tuple of (str, bool)
            The mode, and whether it is exploration.
        """
        return strategy.choose(among)

    def strategy(self, modes: Sequence[str]) -> ModeStrategy:
        """Return a strategy that chooses among these modes."""
        return ModeStrategy(
            modes, rho=self.rho, tau=self.tau, history=self.history_weight, horizon=self.horizon, seed=self.seed
        )
