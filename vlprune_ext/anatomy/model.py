"""`describe`: from a transformers model to its `Anatomy`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .blocks import resolve
from .families import FAMILIES, Family
from .towers import Tower, bind_tower, blocks_path


class TextConfig(Protocol):
    """The fields read from the config of a language model."""

    vocab_size: int
    pad_token_id: int
    eos_token_id: int


@dataclass(frozen=True)
class Anatomy:
    """A model with its towers.

    Parameters
    ----------
    model : nn.Module
        The transformers model.
    family : Family
        Its entry in the table of families.
    """

    model: nn.Module
    family: Family

    @cached_property
    def towers(self) -> dict[str, Tower]:
        """Towers by name, in the order in which they run."""
        return {name: bind_tower(self.model, name, paths) for name, paths in self.family.towers.items()}

    @property
    def is_dual_encoder(self) -> bool:
        """Whether the model is a dual encoder: it embeds images and texts, each without the other."""
        return set(self.family.embed) == {"vision", "text"}

    @property
    def head(self) -> nn.Module | None:
        """The module that maps hidden states to logits, or None."""
        return resolve(self.model, self.family.head) if self.family.head else None

    @property
    def device(self) -> torch.device:
        """Device of the model's parameters."""
        return next(self.model.parameters()).device

    @property
    def text_config(self) -> TextConfig:
        """Config of the language model."""
        config: Any = self.model.config
        return config.get_text_config()

    def embed(self, tower: str, inputs: dict[str, Tensor]) -> Tensor:
        """Return a tower's embeddings [B, E] before normalisation; raise ValueError if it has none."""
        if tower not in self.family.embed:
            raise ValueError(f"tower: {type(self.model).__name__} has no embedding of tower {tower!r}")
        return self.family.embed[tower](self.model, inputs)

    def tower(self, name: str) -> Tower:
        """Return a tower by its name; raise ValueError listing the names."""
        if name not in self.towers:
            raise ValueError(
                f"tower: {type(self.model).__name__} has no tower {name!r}; its towers are {', '.join(self.towers)}"
            )
        return self.towers[name]

    def shape(self) -> dict[str, list[dict[str, int]]]:
        """Return the number of units of every site of every block: the fingerprint that a plan is checked against."""
        return {name: tower.shape() for name, tower in self.towers.items()}


def describe(model: nn.Module) -> Anatomy:
    """Return the anatomy of a transformers model.

    Raises
    ------
    ValueError
        A class that is not in the table; `register` adds one.
    """
    name = type(model).__name__
    if name not in FAMILIES:
        raise ValueError(
            f"model: {name} is not known; known are {', '.join(sorted(FAMILIES))}. "
            "vlprune_ext.anatomy.register(class_name, Family(...)) adds one."
        )
    family = FAMILIES[name]
    while family.otherwise and not all(blocks_path(model, paths) for paths in family.towers.values()):
        family = family.otherwise
    return Anatomy(model, family)
