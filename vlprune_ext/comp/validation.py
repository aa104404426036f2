"""Accuracy and FLOPs of a model under its masks, on validation data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..anatomy.flops import count_flops
from ..anatomy.patch import evaluation_mode
from ..data import Data
from ..objectives import Objective
from ..replay import Replay, Within
from ..tokens.flow import memories
from .flops import Load, Unit, blocks_flops
from .masks import Masks, inputs_of

Context = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Measured:
    """Accuracy and FLOPs of a model under its masks.

    Parameters
    ----------
    accuracy : float
        Mean of the objective's values.
    flops : float
        FLOPs of one sample.
    load : Load
        Token counts.
    """

    accuracy: float
    flops: float
    load: Load


@dataclass
class _Seen:
    """Token and unit counts of some runs, batch by batch."""

    entered: dict[str, list[tuple[Tensor, ...]]] = field(default_factory=dict)  # tower -> batch -> block -> [B]
    left: dict[str, list[Tensor]] = field(default_factory=dict)
    kept: dict[Unit, int] = field(default_factory=dict)

    def note(self, masks: Masks, towers: Sequence[str]) -> None:
        """Add the counts of these towers in the batch that has just run."""
        for name in towers:
            tokens = masks.flow.state[name]
            self.entered.setdefault(name, []).append(tokens.entered)
            self.left.setdefault(name, []).append(tokens.alive.sum(1))
        self.kept = masks.kept()

    def load(self) -> Load:
        """Return the token counts of all batches."""
        return Load(
            {name: [torch.cat(block) for block in zip(*found, strict=True)] for name, found in self.entered.items()},
            {name: torch.cat(found) for name, found in self.left.items()},
        )


class Validation:
    """Measure accuracy and FLOPs of a model under its masks, binarised: what is below 1 is masked completely.

    Parameters
    ----------
    masks : Masks
        Installed, and still empty.
    objective : Objective
        What accuracy is.
    data : Data
        Validation data.
    batch_size : int
        Rows run at once.

    Attributes
    ----------
    dense : Measured
        The dense model.

    Raises
    ------
    ValueError
        Data that the objective cannot use, or an accuracy that is not finite.
    """

    def __init__(self, masks: Masks, objective: Objective, data: Data, batch_size: int) -> None:
        self.masks, self.anatomy = masks, masks.anatomy
        self.objective, self.data = objective, data
        self.inputs = inputs_of(self.anatomy, objective, data, batch_size)
        self.memories = memories(self.anatomy)
        self._embedded: dict[str, Tensor] = {}  # outputs of the two towers of a dual encoder, when last measured
        self._load = Load()
        self._rest = self._around_blocks(inputs_of(self.anatomy, objective, data.subset(1), 1))
        self.dense = self.now()

    def total(self, kept: dict[Unit, int], load: Load) -> float:
        """Return the FLOPs of one sample: blocks by their shapes, and the constant rest of the model.

        Parameters
        ----------
        kept : dict of (tower, layer, kind) to int
            Remaining units of a site. Sites not named are whole.
        load : Load
            Token counts.

        Returns
        -------
        float
        """
        return self._rest + blocks_flops(self.anatomy, self.memories, load, kept)

    def now(self) -> Measured:
        """Measure the model under its current masks."""
        seen = _Seen()
        with torch.no_grad(), evaluation_mode(self.anatomy.model), self.masks.hardened():
            outputs = {
                tower: torch.cat([self._run(tower, batch, seen) for batch in batches])
                for tower, batches in self.inputs.items()
            }
        if len(outputs) > 1:
            self._embedded = outputs
        self._load = seen.load()
        first = next(iter(outputs))
        return self._judged(first, outputs[first], seen)

    def running(self, batches: Mapping[str, list[dict[str, Tensor]]]) -> Load:
        """Count the tokens that run on other data under the current masks.

        Parameters
        ----------
        batches : mapping of str to list of dict
            Tower -> its model inputs (`inputs_of`).

        Returns
        -------
        Load
        """
        seen = _Seen()
        with torch.no_grad(), evaluation_mode(self.anatomy.model), self.masks.hardened():
            for tower, several in batches.items():
                for batch in several:
                    self._run(tower, batch, seen)
        return seen.load()

    def trials(self, towers: Sequence[str], contexts: Sequence[Context]) -> list[Measured]:
        """Measure the model within each of several contexts that change only some towers, by replay.

        What precedes the first of these towers runs once; a tower that is independent of them does not run at all.

        Parameters
        ----------
        towers : sequence of str
            Towers that the contexts change.
        contexts : sequence of callable
            Each returns a context manager that changes the masks.

        Returns
        -------
        list of Measured
            One for each context.
        """
        dual = len(self.inputs) > 1
        if dual and len(set(towers)) > 1:
            return [self.within(context) for context in contexts]
        first = next(name for name in self.anatomy.towers if name in towers)
        source = first if dual else next(iter(self.inputs))
        every = [_Seen() for _ in contexts]
        noting = _Seen()  # of the dense pass

        def change(context: Context, seen: _Seen) -> Context:
            @contextmanager
            def within() -> Iterator[None]:
                nonlocal noting
                outside, noting = noting, seen
                try:
                    with context(), self.masks.hardened():
                        yield
                finally:
                    noting = outside

            return within

        replay = Replay(
            self.anatomy,
            first,
            self.inputs[source],
            lambda _, inputs: self._run(source, inputs, noting),
            carrier=self.masks.flow,
        )
        changes = [Within(first, 0, change(context, seen)) for context, seen in zip(contexts, every, strict=True)]
        with self.masks.hardened():
            (_, found) = next(iter(replay.walk(changes, finish=False)))
        return [self._judged(source, output, seen) for output, seen in zip(found, every, strict=True)]

    def within(self, context: Context) -> Measured:
        """Measure the model within a context, by running all of it."""
        embedded, load = self._embedded, self._load
        try:
            with context():
                return self.now()
        finally:
            self._embedded, self._load = embedded, load

    def _run(self, tower: str, inputs: dict[str, Tensor], seen: _Seen) -> Tensor:
        """Run one batch of a tower, note its counts in ``seen``, and return the objective's outputs."""
        output = self.objective.outputs(self.anatomy, tower, inputs)
        seen.note(self.masks, self._running(tower))
        return output

    def _running(self, tower: str) -> list[str]:
        """Return the towers that run when the objective runs one."""
        return [tower] if len(self.inputs) > 1 else list(self.anatomy.towers)

    def _judged(self, tower: str, outputs: Tensor, seen: _Seen) -> Measured:
        """Return accuracy and FLOPs from a tower's outputs; raise ValueError unless the accuracy is finite."""
        other = next((found for name, found in self._embedded.items() if name != tower), None)
        accuracy = float(self.objective.values(self.anatomy, tower, outputs, other, self.data).double().mean())
        if not math.isfinite(accuracy):
            raise ValueError(
                f"objective: {self.objective.name} is {accuracy} on {self.data.name}; expected a finite number"
            )
        load = seen.load()
        load = Load({**self._load.entered, **load.entered}, {**self._load.left, **load.left})
        return Measured(accuracy, self.total(seen.kept, load), load)

    @torch.no_grad()
    def _around_blocks(self, one: dict[str, list[dict[str, Tensor]]]) -> float:
        """Return the FLOPs outside the blocks: torch's count for one sample without that of its blocks."""
        load = Load()  # with padding, which torch counts

        def run() -> None:
            for tower, batches in one.items():
                self.objective.outputs(self.anatomy, tower, batches[0])
                for name in self._running(tower):
                    tokens = self.masks.flow.state[name]
                    length = torch.full_like(tokens.entered[0], tokens.length)
                    load.entered[name], load.left[name] = [length] * len(tokens.entered), length

        with evaluation_mode(self.anatomy.model):
            counted = count_flops(run)
        return counted - blocks_flops(self.anatomy, self.memories, load, {})
