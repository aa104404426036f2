"""Remove units and layers from a model physically, or zero their weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy, Site, Tower, describe
from ..plan import Plan
from .sites import BY_NUMBER, PER_LAYER, TAPS, changed_sites, columns_of, layer_numbers


def _entry(tower: Tower, kind: str, layer: int, units: Sequence[int] = ()) -> dict:
    """Return one entry of the record of zeroed units."""
    return {"tower": tower.name, "kind": kind, "layer": layer, "units": list(units)}


@torch.no_grad()
def _zero_units(site: Site, units: Sequence[int]) -> None:
    """Zero the output projection's columns of these units, in place."""
    weight = site.out.weight
    weight[:, columns_of(site, units).to(weight.device)] = 0


@torch.no_grad()
def zero_units(anatomy: Anatomy, plan: Plan) -> list[dict]:
    """Zero the output projections of everything that ``plan`` removes, in place.

    Parameters
    ----------
    anatomy : Anatomy
        The model.
    plan : Plan
        Units, whose columns are zeroed, and layers, all of whose output projections are, with their biases.

    Returns
    -------
    list of dict
        One entry {"tower", "kind", "layer", "units"} for each site or layer zeroed.
    """
    zeroed = []
    for tower, layer, site, units in changed_sites(anatomy, plan):
        _zero_units(site, units)
        zeroed.append(_entry(tower, site.kind, layer, units))
    for name, layers in plan.layers.items():
        tower = anatomy.towers[name]
        for layer in sorted(layers):
            for site in tower.blocks[layer].sites.values():
                site.out.weight.zero_()
                if site.out.bias is not None:
                    site.out.bias.zero_()
            zeroed.append(_entry(tower, "layer", layer))
    return zeroed


def _blip_attention(self: Any, hidden_states: Tensor, **_: object) -> tuple[Tensor, Tensor]:
    """Compute BLIP's vision attention with a head_dim of its own; the original derives it from the number of heads."""
    batch, length, _width = hidden_states.shape
    q, k, v = self.qkv(hidden_states).view(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
    probabilities = self.dropout((q @ k.transpose(-1, -2) * self.scale).softmax(dim=-1))  # [B, H, T, T]
    context = (probabilities @ v).transpose(1, 2).flatten(2)  # [B, T, H * head_dim]
    return self.projection(context), probabilities


# Attention class whose own forward cannot run with fewer heads -> a forward that can.
_FORWARDS = {"BlipAttention": _blip_attention}


def _owner(site: Site) -> nn.Module | None:
    """Return the module that owns the site's head or width counts, or None."""
    return site.block.get_submodule(site.paths.owner) if site.paths.owner else None


@torch.no_grad()
def _narrow(linear: nn.Linear, index: Tensor, dim: int) -> None:
    """Keep these rows (dim 0, with their biases) or columns (dim 1) of a projection."""
    index = index.to(linear.weight.device)
    linear.weight = nn.Parameter(linear.weight.index_select(dim, index), requires_grad=linear.weight.requires_grad)
    if dim == 0:
        linear.out_features = index.numel()
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias.index_select(0, index), requires_grad=linear.bias.requires_grad)
    else:
        linear.in_features = index.numel()


def _narrow_site(site: Site, kept: Sequence[int]) -> None:
    """Narrow a site's projections to the units ``kept`` (ascending)."""
    for linear in site.inputs:
        segments = site.input_segments(linear)
        rows = torch.arange(linear.out_features).view(segments, site.units, -1)
        _narrow(linear, rows[:, list(kept)].flatten(), 0)
    _narrow(site.out, columns_of(site, kept), 1)
    owner = _owner(site)
    if owner is None:
        return
    for name in (*site.paths.counts, *site.paths.widths):
        setattr(owner, name, getattr(owner, name) // site.units * len(kept))
    if not site.paths.removable:
        owner.forward = partial(_FORWARDS[type(owner).__name__], owner)


def removable(site: Site) -> bool:
    """Return whether units of a site can be removed physically; where not, they are zeroed.

    Parameters
    ----------
    site : Site
        Heads or neurons of one block.

    Returns
    -------
    bool
        False for attention whose forward cannot run with fewer heads.
    """
    return site.paths.removable or type(_owner(site)).__name__ in _FORWARDS


def remove_units(anatomy: Anatomy, plan: Plan) -> list[dict]:
    """Remove units and layers physically, in place: narrow the projections, delete the blocks, update the configs.

    Parameters
    ----------
    anatomy : Anatomy
        The model.
    plan : Plan
        Units and layers to remove.

    Returns
    -------
    list of dict
        One entry {"tower", "kind", "layer", "units"} for each site of which units had to be zeroed instead.
    """
    zeroed = []
    for tower, layer, site, units in changed_sites(anatomy, plan):
        kept = sorted(set(range(site.units)) - set(units))
        if not removable(site):
            _zero_units(site, units)
            zeroed.append(_entry(tower, site.kind, layer, units))
        elif kept:
            _narrow_site(site, kept)
        else:
            _zero_units(site, units)
            _narrow_site(site, [0])
            zeroed.append(_entry(tower, site.kind, layer, [0]))
    feature_layers = {name: _feature_layer(anatomy, tower, plan) for name, tower in anatomy.towers.items()}
    lengths: dict[int, tuple[Any, int]] = {}  # towers may share a config; it then holds the depth of the deepest
    for name, tower in anatomy.towers.items():
        if gone := plan.layers.get(name):
            holders = {id(holder): holder for holder in (*_configs(anatomy, tower), *_around(anatomy, tower))}
            for holder in holders.values():
                _renumber(holder, len(tower.container), set(gone))
        for layer in sorted(plan.layers.get(name, []), reverse=True):
            del tower.container[layer]
        for place, block in enumerate(tower.container):
            for module, attribute in layer_numbers(block):
                setattr(module, attribute, place)
        for config in _configs(anatomy, tower):
            longest = max(lengths.get(id(config), (config, 0))[1], len(tower.container))
            lengths[id(config)] = (config, longest)
        if plan.layers.get(name) and feature_layers[name] is not None:
            setattr(anatomy.model.config, tower.paths.feature_layer, feature_layers[name])
    for config, longest in lengths.values():
        config.num_hidden_layers = longest
    return zeroed


def _around(anatomy: Anatomy, tower: Tower) -> Iterator[nn.Module]:
    """Yield the modules that hold a tower's blocks, the model first."""
    for name, module in anatomy.model.named_modules():
        if not name or f"{tower.prefix}.".startswith(f"{name}."):
            yield module


def _configs(anatomy: Anatomy, tower: Tower) -> Iterator[Any]:
    """Yield the tower's config, and the copies of it that modules around its blocks hold."""
    yield tower.config
    for module in _around(anatomy, tower):
        config = module.__dict__.get("config")
        if type(config) is type(tower.config):
            yield config


def _renumber(holder: Any, blocks: int, gone: set[int]) -> None:
    """Let what a config or a module says of ``blocks`` blocks by their numbers speak of those that are kept."""
    kept = [layer for layer in range(blocks) if layer not in gone]
    for name in PER_LAYER if not isinstance(holder, nn.Module) else ():
        value = holder.__dict__.get(name)
        if isinstance(value, (list, tuple)) and len(value) == blocks:
            setattr(holder, name, type(value)(value[layer] for layer in kept))
    for name in (*BY_NUMBER, *TAPS):
        value = holder.__dict__.get(name)
        if isinstance(value, (list, tuple)):
            setattr(holder, name, type(value)(kept.index(layer) for layer in value if layer in kept))


def _feature_layer(anatomy: Anatomy, tower: Tower, plan: Plan) -> int | list[int] | None:
    """Return the config's feature layer (such as LLaVA's ``vision_feature_layer``) as it is after removing blocks.

    Hidden state i enters block i and hidden state L leaves the last one; negative indices count from L + 1. Removing
    blocks moves hidden state i to the number of remaining blocks in front of it.
    """
    if not tower.paths.feature_layer:
        return None
    gone = set(plan.layers.get(tower.name, []))
    blocks = len(tower)

    def moved(index: int) -> int:
        """Return the index of a hidden state after removal."""
        stream = index if index >= 0 else blocks + 1 + index
        place = sum(layer not in gone for layer in range(stream))
        return place if index >= 0 else place - (blocks - len(gone) + 1)

    value = getattr(anatomy.model.config, tower.paths.feature_layer, None)
    if value is None:
        return None
    return moved(value) if isinstance(value, int) else [moved(index) for index in value]


def shrink(model: nn.Module, structure: Mapping[str, Sequence[Mapping[str, int]]]) -> None:
    """Narrow a model whose weights are still to be loaded to the units and layers of ``structure``, in place.

    Parameters
    ----------
    model : nn.Module
        A model built from the dense config.
    structure : mapping of str to sequence of mapping
        Tower -> block -> kind of site -> units, as `Anatomy.shape` returns.

    Raises
    ------
    ValueError
        Other towers or kinds of sites than the model's, or more blocks or units than it has.
    """
    anatomy = describe(model)
    shape = anatomy.shape()
    if shape.keys() != structure.keys():
        raise ValueError(f"structure: towers {', '.join(structure)}, the model's are {', '.join(shape)}")
    plan = Plan(shape)
    for tower, blocks in structure.items():
        have = shape[tower]
        if not 1 <= len(blocks) <= len(have):
            raise ValueError(f"structure: {len(blocks)} blocks of tower {tower!r}, the config gives {len(have)}")
        for layer, units in enumerate(blocks):
            if units.keys() != have[layer].keys():
                raise ValueError(
                    f"structure: block {tower}.{layer} has {', '.join(units)}, the model's has {', '.join(have[layer])}"
                )
            for kind, count in units.items():
                if not 1 <= count <= have[layer][kind]:
                    raise ValueError(
                        f"structure: {count} {kind} in block {tower}.{layer}, expected 1 to {have[layer][kind]}"
                    )
                if count < have[layer][kind]:
                    plan.add(tower, kind, layer, list(range(count, have[layer][kind])))
        for layer in range(len(blocks), len(have)):
            plan.add(tower, "layer", layer, [])
    remove_units(anatomy, plan)
