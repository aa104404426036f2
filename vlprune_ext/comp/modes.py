"""Modes of CoMP: units or tokens that one threshold prunes further.

A new kind (weight sparsity, bit width) is one more `Mode` and an entry of `MODES`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..plan import Plan
from ..tokens.flow import Threshold, Tokens
from ..units.surgery import removable
from .flops import Load, Unit
from .masks import Findings, Masks

LEVEL = 0.01  # tolerance of `level`
BITE = 1 / 8  # most that one stage takes of a mode's capacity


class Mode(ABC):
    """A set of units or tokens that is pruned by raising one threshold.

    What a raised threshold passes is *going*: its soft mask falls (`soften`) until it is *gone* (`settle`), or is
    restored (`withdraw`).
    """

    name: str
    capacity: float | None = None  # FLOPs that it can save from the dense model; set by the first `raise_threshold`

    @abstractmethod
    def raise_threshold(self, found: Findings, budget: Budget, goal: float) -> float:
        """Raise the threshold just so far that what is going saves ``goal`` FLOPs, or all that can be saved.

        A stage takes at most `BITE` of the mode's capacity, so that small modes take small steps, unless the goal is
        infinite.

        Parameters
        ----------
        found : Findings
            Importances under the current masks.
        budget : Budget
            The FLOPs of the model.
        goal : float
            FLOPs of one sample.

        Returns
        -------
        float
            FLOPs that will be saved; 0, without any change, if nothing can be pruned.
        """

    @abstractmethod
    def soften(self, counts: float) -> None:
        """Set the soft mask of what is going, from 1 down to 0."""

    @abstractmethod
    def settle(self) -> None:
        """Prune what is going for good: its mask is 0."""

    @abstractmethod
    def withdraw(self) -> None:
        """Restore the threshold, and the masks, from before it was raised."""

    @property
    @abstractmethod
    def threshold(self) -> float:
        """The threshold; minus infinity, or 0 for tokens, before it was raised."""

    @abstractmethod
    def towers(self) -> tuple[str, ...]:
        """Return the towers whose outputs the mode changes."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return the mode's state as plain data, for `load`."""

    @abstractmethod
    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""

    @abstractmethod
    def write(self, plan: Plan, found: Findings | None) -> None:
        """Add what is gone to ``plan``; ``found``: importances, given where tokens are dropped by number."""


class Budget:
    """Predict the FLOPs of the masked model with fewer units or tokens.

    Parameters
    ----------
    masks : Masks
        The current masks.
    total : callable
        (kept, load) -> FLOPs of one sample.
    load : Load
        Token counts when last measured.
    """

    def __init__(self, masks: Masks, total: Callable[[dict[Unit, int], Load], float], load: Load) -> None:
        self.masks, self.total, self.load = masks, total, load

    def with_units(self, kept: dict[Unit, int]) -> float:
        """Return the FLOPs if these sites had so many units, ``kept``: (tower, layer, kind) -> units."""
        return self.total({**self.masks.kept(), **kept}, self.load)

    def with_tokens(self, shares: dict[str, list[float]], left: dict[str, float]) -> float:
        """Return the FLOPs if these towers had other token counts.

        shares  tower -> for each block, the factor of the tokens that enter it
        left    tower -> the factor of the tokens that leave its last block
        """
        entered, after = dict(self.load.entered), dict(self.load.left)
        for tower, of_blocks in shares.items():
            entered[tower] = [n * s for n, s in zip(self.load.entered[tower], of_blocks, strict=True)]
        for tower, s in left.items():
            if tower in after:
                after[tower] = self.load.left[tower] * s
        return self.total(self.masks.kept(), Load(entered, after))


# --- units -----------------------------------------------------------------------------------------------------------


class UnitMode(Mode):
    """Prune heads and neurons of some sites under one threshold.

    Scores compete after standardisation within each kind of site: a head's is a mean over channels and spreads less.
    The best unit of a site is always kept.
    """

    def __init__(self, name: str, masks: Masks, units: Iterable[Unit]) -> None:
        self.name, self.masks = name, masks
        self.units = tuple(units)
        self.gone = {key: torch.zeros(masks.sites[key].units, dtype=torch.bool) for key in self.units}
        self.going = {key: torch.zeros_like(mask) for key, mask in self.gone.items()}
        self._threshold = self._before = -torch.inf

    @property
    def threshold(self) -> float:
        return self._threshold

    def towers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(tower for tower, _, _ in self.units))

    def raise_threshold(self, found: Findings, budget: Budget, goal: float) -> float:
        order = self._ranking(found)
        now = budget.with_units({})

        def saved(count: int) -> float:
            kept = {key: int((~gone).sum()) for key, gone in self.gone.items()}
            for _, key, _ in order[:count]:
                kept[key] -= 1
            return now - budget.with_units(kept)

        self.capacity = saved(len(order)) if self.capacity is None else self.capacity
        goal = goal if goal == math.inf else min(goal, BITE * self.capacity)
        low, high = 0, len(order)  # the fewest units that save enough
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if saved(middle) >= goal else (middle + 1, high)
        saves = saved(low)
        if saves <= 0:
            return 0.0
        self._before = self._threshold
        self._threshold = order[low - 1][0]
        for _, key, unit in order[:low]:
            self.going[key][unit] = True
        return saves

    def _ranking(self, found: Findings) -> list[tuple[float, Unit, int]]:
        """Return (standardised score, site, unit) of the units that can be pruned, ascending."""
        scores = {key: found.units[key].double().cpu() for key in self.units if key in found.units}
        standard: dict[Unit, Tensor] = {}
        for kind in {kind for _, _, kind in scores}:
            of_kind = torch.cat([s[~self.gone[key]] for key, s in scores.items() if key[2] == kind])
            spread = of_kind.std(correction=0).clamp(min=1e-12)
            standard |= {key: (s - of_kind.mean()) / spread for key, s in scores.items() if key[2] == kind}
        found_units = []
        for key, score in standard.items():
            score = score.masked_fill(self.gone[key], -torch.inf)
            stays = int(score.argmax())
            found_units += [
                (float(score[unit]), key, unit)
                for unit in range(len(score))
                if unit != stays and not self.gone[key][unit]
            ]
        return sorted(found_units)

    def soften(self, counts: float) -> None:
        for key, going in self.going.items():
            gone = self.gone[key]
            if bool(going.any()) or bool(gone.any()):
                device = self.masks.sites[key].out.weight.device
                mask = torch.ones(len(gone), dtype=torch.float32).masked_fill_(going, counts).masked_fill_(gone, 0.0)
                self.masks.units[key] = mask.to(device)
            else:
                self.masks.units.pop(key, None)

    def settle(self) -> None:
        for key, going in self.going.items():
            self.gone[key] |= going
            going.zero_()
        self.soften(0.0)

    def withdraw(self) -> None:
        for going in self.going.values():
            going.zero_()
        self._threshold = self._before
        self.soften(0.0)

    def state(self) -> dict[str, Any]:
        return {
            "threshold": self._threshold,
            "capacity": self.capacity,
            **{
                name: [[*key, mask.nonzero().flatten().tolist()] for key, mask in masks.items() if bool(mask.any())]
                for name, masks in (("gone", self.gone), ("going", self.going))
            },
        }

    def load(self, state: dict[str, Any]) -> None:
        self._threshold = self._before = state["threshold"]
        self.capacity = state["capacity"]
        for name, masks in (("gone", self.gone), ("going", self.going)):
            for mask in masks.values():
                mask.zero_()
            for tower, layer, kind, units in state[name]:
                masks[tower, layer, kind][units] = True
        self.soften(0.0)

    def write(self, plan: Plan, found: Findings | None) -> None:
        for (tower, layer, kind), gone in self.gone.items():
            if bool(gone.any()):
                plan.add(tower, kind, layer, gone.nonzero().flatten().tolist())


# --- tokens ----------------------------------------------------------------------------------------------------------


class TokenMode(Mode):
    """Prune tokens of some towers, sample by sample: those whose importance in any block is at most the threshold."""

    def __init__(self, name: str, masks: Masks, towers: Iterable[str]) -> None:
        self.name, self.masks = name, masks
        self._towers = tuple(towers)
        self.limit = Threshold()

    @property
    def threshold(self) -> float:
        return self.limit.going

    def towers(self) -> tuple[str, ...]:
        return self._towers

    def raise_threshold(self, found: Findings, budget: Budget, goal: float) -> float:
        now = budget.with_units({})
        low, high = self.limit.going, 1.0  # importances of a sample sum to one
        before = {tower: self._entering(tower, 0.0, found) for tower in self._towers}

        def saved(threshold: float) -> float:
            return now - self._flops_at(threshold, before, found, budget)

        self.capacity = saved(high) if self.capacity is None else self.capacity
        goal = goal if goal == math.inf else min(goal, BITE * self.capacity)
        if saved(high) <= 0:
            return 0.0
        if saved(high) > goal:
            for _ in range(24):
                middle = (low + high) / 2
                low, high = (low, middle) if saved(middle) >= goal else (middle, high)
        saves = saved(high)
        self.limit = replace(self.limit, going=high)
        return saves

    def hold(self, running: Callable[[], Load], wanted: Load) -> None:
        """Move the threshold so that as many tokens run as in ``wanted``; none may be going.

        running  returns the token counts under the current masks
        """
        number = self._number(wanted)

        def missing(threshold: float) -> float:
            self.place(threshold)
            return 1 - self._number(running()) / number

        level(self.limit.gone, missing)

    def place(self, threshold: float) -> None:
        """Set the threshold, at most 1, and mask what is below it at once."""
        threshold = min(threshold, 1.0)
        self.limit = Threshold(going=threshold, gone=threshold)
        self.soften(0.0)

    def _number(self, load: Load) -> float:
        """Return the tokens of a mean sample, summed over all blocks that are read."""
        return sum(
            float(entered.double().mean())
            for tower in self._towers
            for entered in load.entered[tower][: self.masks.anatomy.tower(tower).depth]
        )

    def _entering(self, tower: str, threshold: float, found: Findings) -> Tensor:
        """Return the tokens that enter each block that is read, and leave the last, under a threshold, [depth + 1]."""
        depth = self.masks.anatomy.tower(tower).depth
        return torch.stack([_passing(blocks[:depth], threshold) for blocks in found.tokens[tower]]).sum(0)

    def _flops_at(self, threshold: float, before: dict[str, Tensor], found: Findings, budget: Budget) -> float:
        """Predict the FLOPs under another threshold, from the importances of the remaining tokens."""
        shares: dict[str, list[float]] = {}
        left: dict[str, float] = {}
        for tower in self._towers:
            ratio = (self._entering(tower, threshold, found) / before[tower]).tolist()
            unread = len(self.masks.anatomy.tower(tower)) - len(ratio) + 1
            shares[tower], left[tower] = [*ratio[:-1], *[0.0] * unread], ratio[-1]
        self._beyond(shares, left, found)
        return budget.with_tokens(shares, left)

    def _beyond(self, shares: dict[str, list[float]], left: dict[str, float], found: Findings) -> None:
        """Scale the language model's token counts too: visual tokens pruned in the vision tower never enter it."""
        visual = self.masks.anatomy.family.visual
        if visual is None or visual.reader or "vision" not in left or visual.tower not in found.tokens:
            return
        of_blocks = []
        for layer in range(len(found.tokens[visual.tower][0])):
            free = sum(int((t.free & t.alive).sum()) for t in (b[layer][0] for b in found.tokens[visual.tower]))
            every = sum(int(t.alive.sum()) for t in (b[layer][0] for b in found.tokens[visual.tower]))
            of_blocks.append(1 - free / every * (1 - left["vision"]))
        own = shares.get(visual.tower, [1.0] * len(of_blocks))
        shares[visual.tower] = [a * b for a, b in zip(own, of_blocks, strict=True)]

    def soften(self, counts: float) -> None:
        self.limit = replace(self.limit, soft=counts)
        for tower in self._towers:
            self.masks.flow.thresholds[tower] = self.limit

    def settle(self) -> None:
        self.limit = replace(self.limit, gone=self.limit.going)
        self.soften(0.0)

    def withdraw(self) -> None:
        self.limit = replace(self.limit, going=self.limit.gone)
        self.soften(0.0)

    def state(self) -> dict[str, Any]:
        return {"threshold": self.limit.going, "capacity": self.capacity, "gone": self.limit.gone}

    def load(self, state: dict[str, Any]) -> None:
        self.limit = Threshold(going=state["threshold"], gone=state["gone"])
        self.capacity = state["capacity"]
        self.soften(0.0)

    def write(self, plan: Plan, found: Findings | None) -> None:
        if self.limit.gone == 0:
            return
        for tower in self._towers:
            if found is None:
                plan.tokens[tower] = {"threshold": self.limit.gone}
                continue
            movable = sum(int(blocks[0][0].free.sum()) for blocks in found.tokens[tower])
            left = [_passing(blocks, self.limit.gone, free=True) for blocks in found.tokens[tower]]
            plan.tokens[tower] = {"keep": (torch.stack(left).sum(0)[1:] / movable).tolist()}


def level(at: float, missing: Callable[[float], float]) -> None:
    """Search, by false position, the threshold at which almost nothing (`LEVEL`) is missing; the last one tried is set.

    Parameters
    ----------
    at : float
        First threshold, above 0.
    missing : callable
        Sets a threshold and returns the missing share, negative for an excess; rising with the threshold.
    """
    high: tuple[float, float] | None = None  # (threshold, missing share)
    low: tuple[float, float] | None = None
    for _ in range(8):
        found = missing(at)
        if abs(found) <= LEVEL:
            return
        high, low = ((at, found), low) if found > 0 else (high, (at, found))
        if high is None:
            at *= 1.5
        elif low is None:
            at /= 1.5
        else:  # false position, kept away from both ends
            at = low[0] + (high[0] - low[0]) * min(max(low[1] / (low[1] - high[1]), 0.1), 0.9)


def _passing(blocks: list[tuple[Tokens, Tensor]], threshold: float, *, free: bool = False) -> Tensor:
    """Count a batch's tokens that enter each block, and leave the last, under another threshold, [blocks + 1].

    Remaining tokens share the importance of dropped ones. ``free``: count only tokens that may be dropped.
    """
    alive = blocks[0][0].alive
    counts = []
    for tokens, importance in blocks:
        alive = alive & tokens.alive
        counts.append((alive & tokens.free if free else alive).sum())
        worth = importance * alive
        worth = worth / worth.sum(1, keepdim=True).clamp(min=1e-30)
        alive = Threshold(going=threshold, gone=threshold).mask(worth, tokens.free, alive, 0).bool() & alive
    return torch.stack([*counts, (alive & blocks[-1][0].free if free else alive).sum()]).double()


# --- which a model has -----------------------------------------------------------------------------------------------


def _unit_mode(name: str, wanted: Callable[[str, str], bool]) -> Callable[[Masks], Mode | None]:
    """Return a builder of the `UnitMode` of the removable sites that ``wanted`` (tower, kind) selects."""

    def build(masks: Masks) -> Mode | None:
        units = [key for key, site in masks.sites.items() if wanted(key[0], key[2]) and removable(site)]
        return UnitMode(name, masks, units) if units else None

    return build


def _token_mode(name: str, wanted: Callable[[str], bool]) -> Callable[[Masks], Mode | None]:
    """Return a builder of the `TokenMode` of the towers that ``wanted`` selects."""

    def build(masks: Masks) -> Mode | None:
        towers = [tower for tower in masks.flow.towers if wanted(tower)]
        return TokenMode(name, masks, towers) if towers else None

    return build


# Name -> builder of a model's mode; the builder returns None if the model has none. The first five are CoMP's.
MODES: dict[str, Callable[[Masks], Mode | None]] = {
    "vision parameters": _unit_mode("vision parameters", lambda tower, kind: tower == "vision"),
    "language parameters": _unit_mode(
        "language parameters", lambda tower, kind: tower != "vision" and kind != "cross_head"
    ),
    "cross-modal parameters": _unit_mode("cross-modal parameters", lambda tower, kind: kind == "cross_head"),
    "vision tokens": _token_mode("vision tokens", lambda tower: tower == "vision"),
    "language tokens": _token_mode("language tokens", lambda tower: tower != "vision"),
    "parameters": _unit_mode("parameters", lambda tower, kind: True),
    "tokens": _token_mode("tokens", lambda tower: True),
}
