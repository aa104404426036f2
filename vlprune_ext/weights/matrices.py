"""The matrices that layer-wise pruning works on: the weights of the linear layers inside a tower's blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..anatomy import Anatomy


@dataclass(frozen=True)
class Matrix:
    """One prunable weight [out, in].

    name    of the parameter in the model
    path    of its module in the block
    number  among all matrices of the model; the stream of random numbers that belongs to it
    """

    tower: str
    layer: int
    name: str
    path: str
    number: int
    module: nn.Linear

    @property
    def weight(self) -> Tensor:
        return self.module.weight

    def __str__(self) -> str:
        return self.name


def matrices(anatomy: Anatomy, towers: Sequence[str] | None = None) -> list[Matrix]:
    """The prunable matrices of some towers (None: all), tower by tower, block by block, in the order of definition.

    Embeddings, norms, projectors between towers and the language-model head lie outside blocks and are none of them.
    Raises ValueError for a tower that has none, or that the model lacks.
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
