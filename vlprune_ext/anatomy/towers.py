"""Towers: stacks of residual blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from .blocks import Block, bind_block, has, resolve

IGNORED = -100  # label of positions without a loss: ignore_index of cross-entropy


@dataclass(frozen=True)
class TowerPaths:
    """Locations of one tower; module paths are relative to the model, alternatives in order of preference.

    Parameters
    ----------
    blocks : tuple of str
        The nn.ModuleList of blocks.
    config : str
        The tower's config, relative to ``model.config``; "": ``model.config`` itself.
    before : tuple of str
        Modules whose output is read by the first block only.
    beside : tuple of str
        Modules whose output later blocks read and that do not depend on the tower.
    pool : {"first", "eot", "last", "labels"}, optional
        Rows of the last block's output that are read: one pooled row, or those that predict labels; None: all.
    feature_layer : str
        Attribute of the model's config, if it has it, that names the blocks whose output is read; else the last one's
        is.
    """

    blocks: tuple[str, ...]
    config: str
    before: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    pool: str | None = None
    feature_layer: str = ""


@dataclass(frozen=True)
class Tower:
    """A stack of residual blocks of a model.

    Parameters
    ----------
    name : str
        Its name in the family.
    blocks : tuple of Block
        From first to last.
    container : nn.ModuleList
        The blocks' modules.
    prefix : str
        Parameter names in the container start with "<prefix>.".
    config : object
        The tower's own config.
    root_config : object
        The model's config.
    before, beside : tuple of nn.Module
        See `TowerPaths`.
    paths : TowerPaths
        Its entry in the table.
    """

    name: str
    blocks: tuple[Block, ...]
    container: nn.ModuleList
    prefix: str
    config: Any
    root_config: Any
    before: tuple[nn.Module, ...]
    beside: tuple[nn.Module, ...]
    paths: TowerPaths

    def __len__(self) -> int:
        return len(self.blocks)

    def shape(self) -> list[dict[str, int]]:
        """Return the number of units of every site, block by block."""
        return [{kind: site.units for kind, site in block.sites.items()} for block in self.blocks]

    def rows_read(self, inputs: Mapping[str, Tensor]) -> Tensor | int | None:
        """Return the positions in the last block's output that are read.

        Parameters
        ----------
        inputs : mapping of Tensor
            The model's inputs; ``input_ids`` or ``labels`` [B, T] are read.

        Returns
        -------
        int, Tensor [B, K], int64, or None
            One position for all samples, K positions of each, or all. Samples with fewer labels than K are padded with
            other positions.
        """
        if self.paths.pool == "first":
            return 0
        if self.paths.pool == "last":
            return -1
        if self.paths.pool == "eot":
            return self._eot_row(inputs)[:, None]
        if self.paths.pool == "labels" and "labels" in inputs:
            predicts = inputs["labels"][:, 1:] != IGNORED
            most = int(predicts.sum(1).max())
            # Positions that predict labels first, then others as padding for samples with fewer.
            return predicts.int().sort(dim=1, descending=True, stable=True).indices[:, :most]
        return None

    def _eot_row(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the position [B] int64 of the end-of-text token."""
        return _eot_position(inputs["input_ids"], self.config.eos_token_id)

    def taps(self) -> frozenset[int]:
        """Return the blocks whose output not only the next block reads: the features that a language model gets."""
        value = getattr(self.root_config, self.paths.feature_layer, ()) if self.paths.feature_layer else ()
        layers = (value,) if isinstance(value, int) else tuple(value or ())
        # Entry 0 of `hidden_states` is what enters the first block, entry i + 1 is what leaves block i.
        return frozenset((layer if layer >= 0 else len(self) + 1 + layer) - 1 for layer in layers)

    @property
    def depth(self) -> int:
        """Number of blocks whose output is read: blocks behind the last feature layer are not."""
        return max(self.taps(), default=len(self) - 1) + 1

    @property
    def cls(self) -> int:
        """Number of class tokens before the patches, as the vision tower's own embedding has them."""
        names = ("class_embedding", "cls_token")
        return int(any(hasattr(module, name) for module in self.before for name in names))

    @property
    def causal(self) -> bool:
        """Whether the tower's self-attention is causal."""
        attention = self.blocks[0].sites["head"].attention if "head" in self.blocks[0].sites else None
        return self.paths.pool == "eot" or bool(getattr(attention, "is_causal", False))

    @property
    def owner(self) -> str:
        """Path of the module that is called with the tower's inputs."""
        path = self.prefix.rpartition(".")[0]
        return path.rpartition(".")[0] if path.rpartition(".")[2] == "encoder" else path

    def trim(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Remove the columns behind the last end-of-text token of a batch, to which a causal tower never attends."""
        if self.paths.pool != "eot":
            return inputs
        length = int(self._eot_row(inputs).max()) + 1
        return {name: value[:, :length] for name, value in inputs.items()}


def _eot_position(input_ids: Tensor, eos_token_id: int) -> Tensor:
    """Return the position [B] int64 of the end-of-text token that CLIP pools."""
    # CLIP checkpoints with the historical eos_token_id 2 pool at the highest token id.
    key = input_ids if eos_token_id == 2 else (input_ids == eos_token_id)
    return key.int().argmax(dim=-1)


def blocks_path(model: nn.Module, paths: TowerPaths) -> str | None:
    """Return the first path of a tower's blocks that exists in the model, or None."""
    return next((path for path in paths.blocks if has(model, path)), None)


def bind_tower(model: nn.Module, name: str, paths: TowerPaths) -> Tower:
    """Resolve the paths of a tower in a model.

    Parameters
    ----------
    model : nn.Module
        The model.
    name : str
        The tower's name.
    paths : TowerPaths
        Its locations.

    Raises
    ------
    ValueError
        No blocks at any of the paths.
    """
    prefix = blocks_path(model, paths)
    if prefix is None:
        raise ValueError(f"{type(model).__name__}: no blocks of tower {name!r} at any of {', '.join(paths.blocks)}")
    container = cast(nn.ModuleList, resolve(model, prefix))
    config: Any = model.config
    return Tower(
        name=name,
        blocks=tuple(bind_block(block) for block in container),
        container=container,
        prefix=prefix,
        config=resolve(config, paths.config),
        root_config=config,
        before=tuple(resolve(model, path) for path in paths.before if has(model, path)),
        beside=tuple(resolve(model, path) for path in paths.beside if has(model, path)),
        paths=paths,
    )
