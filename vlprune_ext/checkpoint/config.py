"""The config of a model whose blocks differ in their units, in the words of transformers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..anatomy import Anatomy, Site, Tower, describe
from .manifest import pretty_json

# transformers' own keys. The second lets it read a config whose layers differ, as AutoProcessor does; without it even
# the validation of a config fails.
_PER_LAYER = "per_layer_config"
_READABLE = "allow_global_per_layer_attribute_access"


def write_config(model: PreTrainedModel, anatomy: Anatomy, path: Path) -> bool:
    """Put the units of every block into config.json; True if transformers alone builds the same model from it."""
    content = json.loads(path.read_text(encoding="utf-8"))
    dense = (getattr(model, "vlprune", None) or {"shape": {}})["shape"]
    by_config: dict[str, list[Tower]] = {}
    for tower in anatomy.towers.values():
        if tower.shape() != dense.get(tower.name):
            by_config.setdefault(tower.paths.config, []).append(tower)
    for where, towers in by_config.items():
        if all(_units(tower) == _units(towers[0]) for tower in towers):
            _describe_units(type(model), content, where, towers[0])
    path.write_text(pretty_json(content), encoding="utf-8")
    return _stock_shape(type(model), content) == anatomy.shape()


def _sub_config(content: dict, where: str) -> dict:
    return content[where] if where else content


# What families call their numbers: the first that a config has.
_HEADS = ("num_attention_heads", "num_heads")
_NEURONS = ("intermediate_size", "ffn_dim", "d_ff")
_HEAD_DIM = ("head_dim", "d_kv")


def _key(config: Any, names: tuple[str, ...]) -> str:
    """Return the one of some names that a config itself has, not as an alias of another."""
    own = config.to_dict()
    return next((name for name in names if name in own), names[0])


def _units(tower: Tower) -> list[dict[str, int]]:
    """Return the units of every block under the keys of a config."""
    heads, neurons = _key(tower.config, _HEADS), _key(tower.config, _NEURONS)
    rows = []
    for block in tower.blocks:
        row = {}
        if "head" in block.sites:
            site = block.sites["head"]
            row[heads] = site.out.in_features // _head_dim(site)
            if hasattr(tower.config, "num_key_value_heads"):
                row["num_key_value_heads"] = site.units
        if "neurons" in block.sites:
            row[neurons] = block.sites["neurons"].units
        rows.append(row)
    return rows


def _head_dim(site: Site) -> int:
    owner: Any = site.block.get_submodule(site.paths.owner)
    names = ("head_dim", "attention_head_size", "key_value_proj_dim")
    return next(size for name in names if (size := getattr(owner, name, None)))


def _describe_units(model_class: Any, content: dict, where: str, tower: Tower) -> None:
    """Write one tower's units: for all blocks at once where a config can say that, else block by block."""
    config, rows = _sub_config(content, where), _units(tower)
    stated = {key: getattr(tower.config, key) for key in rows[0]}
    sites = [block.sites["head"] for block in tower.blocks if "head" in block.sites]
    for keys in (_NEURONS, (*_HEADS, "num_key_value_heads")):
        mine = [{key: row[key] for key in keys if key in row} for row in rows]
        if all(row == {key: stated[key] for key in row} for row in mine):
            continue
        neurons = keys is _NEURONS
        if all(row == mine[0] for row in mine) and (neurons or all(site.paths.free_head_dim for site in sites)):
            general = mine[0] if neurons else {**mine[0], _key(tower.config, _HEAD_DIM): _head_dim(sites[0])}
            trial = plain_config(content)
            _sub_config(trial, where).update(general)
            if _stock_config(model_class, trial) is not None:
                config.update(general)
                continue
        digits = len(str(len(rows) - 1))
        config[_READABLE] = True
        layers = config.setdefault(_PER_LAYER, {})
        for layer, row in enumerate(mine):
            different = {key: value for key, value in row.items() if value != stated[key]}
            if different:
                layers.setdefault(str(layer).zfill(digits), {}).update(different)


def plain_config(content: dict) -> dict:
    """Return a config without its per-layer keys."""
    return {
        key: plain_config(value) if isinstance(value, dict) else value
        for key, value in content.items()
        if key not in (_PER_LAYER, _READABLE)
    }


def _stock_config(model_class: Any, content: dict) -> PreTrainedConfig | None:
    """Return the config object, or None if transformers does not accept it."""
    try:
        return model_class.config_class.from_dict(copy.deepcopy(content))
    except Exception:  # validation raises many kinds
        return None


def _stock_shape(model_class: Any, content: dict) -> dict | None:
    """Return the units of the model that transformers builds from a config, or None if it builds none."""
    config = _stock_config(model_class, content) if plain_config(content) == content else None
    if config is None:
        return None
    with torch.device("meta"):
        return describe(model_class(config)).shape()
