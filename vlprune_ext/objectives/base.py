"""What every objective is: which rows a tower is fed, what is read off the model, and what that is worth."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..data import Data

Inputs = dict[str, Tensor]
LOGIT_BYTES = 64 << 20  # logits are computed this many bytes at a time


def batched(inputs: Inputs, batch_size: int) -> Iterator[Inputs]:
    count = len(next(iter(inputs.values())))
    for start in range(0, count, batch_size):
        yield {name: value[start : start + batch_size] for name, value in inputs.items()}


@dataclass(frozen=True)
class Part:
    """Some images of the data [n] int64, and how many images each of them stands for [n]."""

    images: Tensor
    weight: Tensor


class Objective(ABC):
    """One way to judge a model. Subclasses are stateless: one object serves any model and data."""

    name: str
    differentiable = True
    sees_cross_attention = True
    whole_runs = False  # every tower's rows are the same runs of the whole model

    @abstractmethod
    def towers(self, anatomy: Anatomy) -> tuple[str, ...]:
        """The towers that take part; ValueError if the model cannot be judged this way."""

    def runs(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Return the towers to feed so that everything runs once: one where its rows are runs of the whole model."""
        towers = self.towers(anatomy)
        return towers[:1] if self.whole_runs else towers

    @abstractmethod
    def batches(self, anatomy: Anatomy, tower: str, data: Data, batch_size: int) -> list[Inputs]:
        """The rows that a tower is fed, as model inputs on the model's device."""

    @abstractmethod
    def outputs(self, anatomy: Anatomy, tower: str, inputs: Inputs) -> Tensor:
        """[B, ...]: what is read off the model for each row."""

    @abstractmethod
    def values(
        self,
        anatomy: Anatomy,
        tower: str,
        outputs: Tensor,
        other: Tensor | None,
        data: Data,
        part: Part | None = None,
    ) -> Tensor:
        """[S] float32: the value of each sample, from the outputs [N, ...] of the tower's rows.

        other  what `other` returned for this tower
        part   the images whose rows ``outputs`` holds, in that order; values are those of their samples, and what these
               are compared with is estimated from what is there. None: all
        """

    @abstractmethod
    def sample_of_row(self, tower: str, data: Data) -> Tensor | None:
        """[N] int64: the sample that each row of a tower belongs to; None where rows serve all samples."""

    @abstractmethod
    def samples(self, data: Data, images: Tensor) -> tuple[Tensor, Tensor]:
        """(the samples [K] of some images [n] int64, in that order; the position [K] in ``images`` of each one's)."""

    def other(self, anatomy: Anatomy, tower: str, data: Data, batch_size: int) -> Tensor | None:
        """What `values` needs of the towers that do not change."""
        return None

    @abstractmethod
    def report(self, anatomy: Anatomy, data: Data, batch_size: int) -> dict[str, float]:
        """The numbers a person reads."""

    def runner(self, anatomy: Anatomy, tower: str) -> Callable[[nn.Module, Inputs], Tensor]:
        """`outputs` as `Replay` wants it."""
        return lambda _, inputs: self.outputs(anatomy, tower, inputs)

    def run(self, anatomy: Anatomy, tower: str, data: Data, batch_size: int) -> Tensor:
        """[N, ...]: the outputs of all rows."""
        return torch.cat([self.outputs(anatomy, tower, b) for b in self.batches(anatomy, tower, data, batch_size)])
