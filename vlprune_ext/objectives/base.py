"""`Objective`, the interface: inputs of each tower, outputs per row, values per sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..data import Data

Inputs = dict[str, Tensor]
LOGIT_BYTES = 64 << 20  # logits are computed in chunks of at most this size


def batched(inputs: Inputs, batch_size: int) -> Iterator[Inputs]:
    """Split inputs into batches along the first dimension."""
    count = len(next(iter(inputs.values())))
    for start in range(0, count, batch_size):
        yield {name: value[start : start + batch_size] for name, value in inputs.items()}


@dataclass(frozen=True)
class Part:
    """A weighted random subset of n images.

    Parameters
    ----------
    images : Tensor [n], int64
        Indices into the data.
    weight : Tensor [n]
        How many images each of them represents: the inverse of its inclusion probability.
    """

    images: Tensor
    weight: Tensor


class Objective(ABC):
    """Value of a model on data, per sample. Subclasses are stateless: one object serves any model and data.

    In the methods, ``tower`` is the name of the tower that is run, N the number of its rows, S that of samples.
    """

    name: str
    differentiable = True
    sees_cross_attention = True
    whole_runs = False  # every tower's rows are the same full forwards of the model

    @abstractmethod
    def towers(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Return the names of the towers that the objective runs.

        Parameters
        ----------
        anatomy : Anatomy
            The model.

        Raises
        ------
        ValueError
            A model that the objective does not apply to.
        """

    def runs(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Return the towers to run so that all blocks run once: one, where each tower's rows are full forwards."""
        towers = self.towers(anatomy)
        return towers[:1] if self.whole_runs else towers

    @abstractmethod
    def batches(self, anatomy: Anatomy, tower: str, data: Data, batch_size: int) -> list[Inputs]:
        """Return a tower's rows as batches of model inputs, on the model's device.

        Parameters
        ----------
        anatomy : Anatomy
            The model.
        tower : str
            The tower.
        data : Data
            Of S samples.
        batch_size : int
            Rows of a batch.
        """

    @abstractmethod
    def outputs(self, anatomy: Anatomy, tower: str, inputs: Inputs) -> Tensor:
        """Return what `values` needs of each row, from the model's forward on a batch.

        Parameters
        ----------
        anatomy : Anatomy
            The model.
        tower : str
            The tower that is run.
        inputs : dict of Tensor
            One of `batches`, of B rows.

        Returns
        -------
        Tensor [B, ...]
            For instance embeddings or losses.
        """

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
        """Return the value of each sample from the outputs of one tower's rows.

        Parameters
        ----------
        anatomy : Anatomy
            The model.
        tower : str
            The tower that was run.
        outputs : Tensor [N, ...]
            What `outputs` returned for its rows.
        other : Tensor or None
            What the method `other` returned for this tower.
        data : Data
            All samples.
        part : Part, optional
            The images whose rows ``outputs`` holds, in that order: values are those of their samples, and statistics
            over all rows, such as the ranks of a retrieval, are estimated from the weighted subset. None: all.

        Returns
        -------
        Tensor [S], fp32
        """

    @abstractmethod
    def sample_of_row(self, tower: str, data: Data) -> Tensor | None:
        """Return the sample [N] int64 of each row of a tower; None where every row is used by all samples."""

    @abstractmethod
    def samples(self, data: Data, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the samples of some images.

        Parameters
        ----------
        data : Data
            All samples.
        images : Tensor [n], int64
            Indices of images.

        Returns
        -------
        samples : Tensor [K], int64
            In the order of the images.
        position : Tensor [K], int64
            Index into ``images`` of each sample's image.
        """

    def other(self, anatomy: Anatomy, tower: str, data: Data, batch_size: int) -> Tensor | None:
        """Return what `values` needs of the towers that are not run, such as the other tower's embeddings.

        Parameters
        ----------
        anatomy : Anatomy
            The model.
        tower : str
            The tower that is run.
        data : Data
            All samples.
        batch_size : int
            Rows of a batch.
        """
        return None

    @abstractmethod
    def report(self, anatomy: Anatomy, data: Data, batch_size: int) -> dict[str, float]:
        """Return the metrics of a model on data.

        Parameters
        ----------
        anatomy : Anatomy
            The model.
        data : Data
            All samples.
        batch_size : int
            Rows of a batch.

        Returns
        -------
        dict of float
            Metric name -> value.
        """

    def runner(self, anatomy: Anatomy, tower: str) -> Callable[[nn.Module, Inputs], Tensor]:
        """Return `outputs` as the ``run_model`` of `replay.Replay`."""
        return lambda _, inputs: self.outputs(anatomy, tower, inputs)

    def run(self, anatomy: Anatomy, tower: str, data: Data, batch_size: int) -> Tensor:
        """Return the outputs [N, ...] of all rows of a tower."""
        return torch.cat([self.outputs(anatomy, tower, b) for b in self.batches(anatomy, tower, data, batch_size)])
