"""Towers: stacks of residual blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from .blocks import Block, bind_block, has, resolve

IGNORED = -100  # the label of a position that no loss is computed on


@dataclass(frozen=True)
class TowerPaths:
    """Where a family keeps one tower; paths are relative to the model, alternatives in order of preference."""

    blocks: tuple[str, ...]  # the nn.ModuleList of blocks
    config: str  # the tower's config, relative to model.config; "" = model.config
    before: tuple[str, ...] = ()  # modules whose output reaches nothing but the first block
    beside: tuple[str, ...] = ()  # modules that feed what comes after the first block and never change with the tower
    pool: str | None = None  # rows of the last block that are used: "first", "eot", "last", or what predicts "labels"
    feature_layer: str = ""  # config attribute (if it has it) that says whose output is used, if not the last's


@dataclass(frozen=True)
class Tower:
    """A stack of residual blocks of a model."""

    name: str
    blocks: tuple[Block, ...]
    container: nn.ModuleList
    prefix: str  # parameter names in the container start with "<prefix>."
    config: Any  # the tower's own
    root_config: Any  # the model's
    before: tuple[nn.Module, ...]
    beside: tuple[nn.Module, ...]
    paths: TowerPaths

    def __len__(self) -> int:
        return len(self.blocks)

    def shape(self) -> list[dict[str, int]]:
        """Units of every site, block by block."""
        return [{kind: site.units for kind, site in block.sites.items()} for block in self.blocks]

    def rows_read(self, inputs: Mapping[str, Tensor]) -> Tensor | int | None:
        """The rows of the last block's output that are used: one of each sample, or some [B, K]; None when all are."""
        if self.paths.pool == "first":
            return 0
        if self.paths.pool == "last":
            return -1
        if self.paths.pool == "eot":
            return self._eot_row(inputs)[:, None]
        if self.paths.pool == "labels" and "labels" in inputs:
            predicts = inputs["labels"][:, 1:] != IGNORED
            most = int(predicts.sum(1).max())
            # Their places first, then whatever fills the rows of samples that have fewer.
            return predicts.int().sort(dim=1, descending=True, stable=True).indices[:, :most]
        return None

    def _eot_row(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return _eot_position(inputs["input_ids"], self.config.eos_token_id)

    def taps(self) -> frozenset[int]:
        """Blocks whose output is read by more than the next block: the features that a language model sees."""
        value = getattr(self.root_config, self.paths.feature_layer, ()) if self.paths.feature_layer else ()
        layers = (value,) if isinstance(value, int) else tuple(value or ())
        # Entry 0 of `hidden_states` is what enters the first block, entry i + 1 is what leaves block i.
        return frozenset((layer if layer >= 0 else len(self) + 1 + layer) - 1 for layer in layers)

    @property
    def depth(self) -> int:
        """Blocks that are read: those after the last feature layer are not."""
        return max(self.taps(), default=len(self) - 1) + 1

    @property
    def cls(self) -> int:
        """How many class tokens are in front of the patches: what a vision tower is says that, not who reads it."""
        names = ("class_embedding", "cls_token")
        return int(any(hasattr(module, name) for module in self.before for name in names))

    @property
    def causal(self) -> bool:
        """Whether tokens see only those before them."""
        attention = self.blocks[0].sites["head"].attention if "head" in self.blocks[0].sites else None
        return self.paths.pool == "eot" or bool(getattr(attention, "is_causal", False))

    @property
    def owner(self) -> str:
        """The path of the module that is given the tower's inputs."""
        path = self.prefix.rpartition(".")[0]
        return path.rpartition(".")[0] if path.rpartition(".")[2] == "encoder" else path

    def trim(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Drop the columns after the last end-of-text token of a batch: a causal tower never looks there."""
        if self.paths.pool != "eot":
            return inputs
        length = int(self._eot_row(inputs).max()) + 1
        return {name: value[:, :length] for name, value in inputs.items()}


def _eot_position(input_ids: Tensor, eos_token_id: int) -> Tensor:
    # CLIP checkpoints with the historical eos_token_id 2 pool at the highest token id.
    key = input_ids if eos_token_id == 2 else (input_ids == eos_token_id)
    return key.int().argmax(dim=-1)


def blocks_path(model: nn.Module, paths: TowerPaths) -> str | None:
    return next((path for path in paths.blocks if has(model, path)), None)


def bind_tower(model: nn.Module, name: str, paths: TowerPaths) -> Tower:
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
