"""Prunable matrices: the weights of the linear layers inside a tower's blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..anatomy import Anatomy


@dataclass(frozen=True)
class Matrix:
    """A prunable weight matrix [out, in].

    Parameters
    ----------
    tower, layer : str, int
        Where its block is.
    name : str
        The parameter's name in the model.
    path : str
        Its module's path in the block.
    number : int
        Its index among all matrices of the model, which selects its stream of random numbers.
    module : nn.Linear
        The layer it belongs to.
    """

    tower: str
    layer: int
    name: str
    path: str
    number: int
    module: nn.Linear

    @property
    def weight(self) -> Tensor:
        """The layer's weight, [out, in]."""
        return self.module.weight

    def __str__(self) -> str:
        return self.name


def matrices(anatomy: Anatomy, towers: Sequence[str] | None = None) -> list[Matrix]:
    """List the prunable matrices of a model, tower by tower, block by block, in the order of definition.

    Embeddings, norms, projectors between towers and the language-model head lie outside the blocks and are not among
    them.

    Parameters
    ----------
    anatomy : Anatomy
        The model.
    towers : sequence of str, optional
        Towers to list. None: all.

    Returns
    -------
    list of Matrix

    Raises
    ------
    ValueError
        A tower that the model lacks or that has no linear layer in its blocks.
    """
    found: list[Matrix] = []
    for name, tower in anatomy.towers.items():
        for layer, block in enumerate(tower.blocks):
            found += [
                Matrix(name, layer, f"{tower.prefix}.{layer}.{path}.weight", path, 0, module)
                for path, module in block.module.named_modules()
                if isinstance(module, nn.Linear)
            ]
    found = [Matrix(m.tower, m.layer, m.name, m.path, i, m.module) for i, m in enumerate(found)]
    if towers is None:
        return found
    for name in towers:
        anatomy.tower(name)
        if not any(m.tower == name for m in found):
            raise ValueError(f"towers: {name!r} has no prunable weights (no linear layer in its blocks)")
    return [m for m in found if m.tower in towers]
