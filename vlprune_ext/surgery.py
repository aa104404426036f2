"""Carry out a plan on a model: take units and layers away, zero them, or only pretend to.

`apply` is the only function through which a plan changes a model. Whatever it removes, the outputs are those of the
dense model with the same heads and neurons held at zero and the same layers passed by.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .anatomy import KINDS, Anatomy, Site, Tower, describe
from .data import Data
from .layerwise import Selection, prune_layerwise
from .objectives import objective_named
from .patch import Patches
from .plan import Plan

MODES = ("remove", "mask")
_SITE_KINDS = KINDS[:-1]
_LAYER_NUMBERS = ("layer_idx", "layer_num")  # by these a block finds its entry in a KV cache


# --- plans -----------------------------------------------------------------------------------------------------------


def round_plan(plan: Plan, round_to: int, order: Mapping[str, Mapping[int, Sequence[int]]] | None = None) -> Plan:
    """A plan that leaves every MLP a width divisible by ``round_to``, by removing fewer neurons.

    order  tower -> layer -> neurons from least to most important: the most important of those that should go come
           back. Without it, those with the highest index.

    A width never exceeds that of the model the plan is for. ``round_to=1`` changes nothing.
    """
    if not isinstance(round_to, int) or round_to < 1:
        raise ValueError(f"round_to: {round_to!r}, expected an int >= 1")
    rounded = copy.deepcopy(plan)
    for tower, layers in plan.neurons.items():
        for layer, units in layers.items():
            width = plan.shape[tower][layer]["neurons"]
            goal = min(width, math.ceil((width - len(units)) / round_to) * round_to)
            if order is None:
                ranked = sorted(units)
            else:
                place = {unit: i for i, unit in enumerate(order[tower][layer])}
                ranked = sorted(units, key=lambda unit: place[unit])
            rounded.neurons[tower][layer] = sorted(ranked[: width - goal])
    return rounded


# --- the door --------------------------------------------------------------------------------------------------------


def apply(
    model: nn.Module, plan: Plan, data: object | None = None, *, mode: str = "remove", round_to: int = 8
) -> nn.Module:
    """Change ``model`` in place as ``plan`` says, and return it.

    plan      made for a model of this shape (`Plan.check`)
    data      the calibration data the plan was made with; its name and hash are kept for the record
    mode      "remove": heads, neurons and layers are physically gone: projections become narrower, blocks leave their
              list. Modules stay the same objects, so hooks and references survive; their parameters are new, so build
              an optimizer afterwards. "mask": the same outputs by zeroed weights; the model keeps its shape, loads
              anywhere and is no faster.
    round_to  with mode="remove", MLP widths are rounded up to a multiple of this (`round_plan`); 1 turns it off

    A site that loses all its units keeps one of them, zeroed: attention kernels and KV caches do not run without heads.
    ``model.vlprune`` records what was done: ``{"shape": the dense model's, "plans": [{"plan", "mode", "zeroed",
    "data"}, ...]}``, one entry for each plan applied.

    Raises ValueError, with the model untouched, if the plan does not fit or cannot be carried out.
    """
    if mode not in MODES:
        raise ValueError(f"mode: {mode!r}, expected one of {', '.join(MODES)}")
    anatomy = describe(model)
    plan.check(anatomy)
    rounded = round_plan(plan, round_to)
    plan = rounded if mode == "remove" else plan
    _check_weights(anatomy, plan, mode)
    shape = anatomy.shape()
    if plan.sparsity:
        _prune_weights(anatomy, plan, data)
    zeroed = _remove(anatomy, plan) if mode == "remove" else _zero(anatomy, plan)
    record = getattr(model, "vlprune", None) or {"shape": shape, "plans": []}
    origin = None if data is None else {"name": getattr(data, "name", ""), "hash": getattr(data, "hash", "")}
    entry = {"plan": json.loads(plan.to_json()), "mode": mode, "zeroed": zeroed, "data": origin}
    model.vlprune = {**record, "plans": [*record["plans"], entry]}  # type: ignore[assignment]
    return model


def _prune_weights(anatomy: Anatomy, plan: Plan, data: object | None) -> None:
    """Before anything is removed, since names and sparsities are those of the whole model."""
    if not isinstance(data, Data):
        raise ValueError("data: needed to carry out a plan with sparsities, which looks at what enters each matrix")
    try:
        selection = Selection(**plan.selection)
    except TypeError as error:
        raise ValueError(f"plan: selection {plan.selection}: {error}") from None
    prune_layerwise(anatomy, objective_named(selection.objective, anatomy), data, plan.sparsity, selection)


def _changes(anatomy: Anatomy, plan: Plan) -> Iterator[tuple[Tower, int, Site, list[int]]]:
    """The sites that lose units, outside the layers that go as a whole."""
    for name, tower in anatomy.towers.items():
        gone = set(plan.layers.get(name, []))
        for layer, block in enumerate(tower.blocks):
            if layer in gone:
                continue
            for kind, site in block.sites.items():
                units = sorted(plan.removed(name, kind, layer))
                if units:
                    yield tower, layer, site, units


def _check_weights(anatomy: Anatomy, plan: Plan, mode: str) -> None:
    """Raise ValueError unless everything that will be written can be."""
    for tower, layer, site, _ in _changes(anatomy, plan):
        _check_site(site, f"{site.kind} of {tower.name}.{layer}")
    if mode == "remove":
        _check_layers(anatomy, plan)
        return
    for name, layers in plan.layers.items():
        for layer in layers:
            block = anatomy.towers[name].blocks[layer]
            if block.norm is None:
                raise ValueError(
                    f"mode: 'mask' cannot remove layer {name}.{layer}: a {type(block.module).__name__} normalises "
                    "after adding, so zero weights do not make it the identity; use mode='remove'"
                )
            for site in block.sites.values():
                _check_site(site, f"layer {name}.{layer}")


def _check_layers(anatomy: Anatomy, plan: Plan) -> None:
    """Raise ValueError unless every layer that goes can be taken out of its list."""
    for name, layers in plan.layers.items():
        for layer in layers:
            reason = anatomy.towers[name].blocks[layer].fixed
            if reason:
                raise ValueError(
                    f"plan: layer {name}.{layer} cannot be removed: {reason}; mode='mask' zeroes it instead"
                )


def _check_site(site: Site, where: str) -> None:
    for linear in (site.out, *site.inputs):
        weight: Any = getattr(linear, "weight", None)
        if not isinstance(linear, nn.Linear) or weight.shape != (linear.out_features, linear.in_features):
            raise ValueError(f"plan: {where}: its projection is a {type(linear).__name__}, expected a plain Linear")
        if weight.is_meta:
            raise ValueError(f"plan: {where}: its weights are not in memory (meta device)")


# --- zeroing ---------------------------------------------------------------------------------------------------------


def _columns(site: Site, units: Sequence[int]) -> Tensor:
    """Columns [len(units) * width] of the output projection that belong to these units."""
    first = torch.tensor(units, dtype=torch.long)[:, None] * site.width
    return (first + torch.arange(site.width)).flatten()


def _entry(tower: Tower, kind: str, layer: int, units: Sequence[int] = ()) -> dict:
    return {"tower": tower.name, "kind": kind, "layer": layer, "units": list(units)}


@torch.no_grad()
def _zero_units(site: Site, units: Sequence[int]) -> None:
    weight = site.out.weight
    weight[:, _columns(site, units).to(weight.device)] = 0


@torch.no_grad()
def _zero(anatomy: Anatomy, plan: Plan) -> list[dict]:
    """Zero what the plan removes; returns what that was."""
    zeroed = []
    for tower, layer, site, units in _changes(anatomy, plan):
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


# --- removing --------------------------------------------------------------------------------------------------------


def _blip_attention(self: Any, hidden_states: Tensor, **_: object) -> tuple[Tensor, Tensor]:
    """BLIP's vision attention with a head_dim of its own; the original divides the stream's width by the heads."""
    batch, length, _width = hidden_states.shape
    q, k, v = self.qkv(hidden_states).view(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
    probabilities = self.dropout((q @ k.transpose(-1, -2) * self.scale).softmax(dim=-1))  # [B, H, T, T]
    context = (probabilities @ v).transpose(1, 2).flatten(2)  # [B, T, H * head_dim]
    return self.projection(context), probabilities


# Attention classes whose own forward cannot run with fewer heads -> one that can.
_FORWARDS = {"BlipAttention": _blip_attention}


def _owner(site: Site) -> nn.Module | None:
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
    """Leave a site only its units ``kept`` (ascending)."""
    for linear in site.inputs:
        segments = site.input_segments(linear)
        rows = torch.arange(linear.out_features).view(segments, site.units, -1)
        _narrow(linear, rows[:, list(kept)].flatten(), 0)
    _narrow(site.out, _columns(site, kept), 1)
    owner = _owner(site)
    if owner is None:
        return
    for name in (*site.paths.counts, *site.paths.widths):
        setattr(owner, name, getattr(owner, name) // site.units * len(kept))
    if not site.paths.removable:
        owner.forward = partial(_FORWARDS[type(owner).__name__], owner)


def removable(site: Site) -> bool:
    """Whether units of a site can be physically removed; where not, they are zeroed."""
    return site.paths.removable or type(_owner(site)).__name__ in _FORWARDS


def _remove(anatomy: Anatomy, plan: Plan) -> list[dict]:
    """Take units and layers away; returns what had to be zeroed instead."""
    zeroed = []
    for tower, layer, site, units in _changes(anatomy, plan):
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
    lengths: dict[int, tuple[Any, int]] = {}  # towers may share a config; it then holds the longest one's length
    for name, tower in anatomy.towers.items():
        for layer in sorted(plan.layers.get(name, []), reverse=True):
            del tower.container[layer]
        for place, block in enumerate(tower.container):
            for module, attribute in _layer_numbers(block):
                setattr(module, attribute, place)
        for config in _configs(anatomy, tower):
            longest = max(lengths.get(id(config), (config, 0))[1], len(tower.container))
            lengths[id(config)] = (config, longest)
        if plan.layers.get(name) and feature_layers[name] is not None:
            setattr(anatomy.model.config, tower.paths.feature_layer, feature_layers[name])
    for config, longest in lengths.values():
        config.num_hidden_layers = longest
    return zeroed


def _layer_numbers(block: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for module in block.modules():
        for attribute in _LAYER_NUMBERS:
            if isinstance(module.__dict__.get(attribute), int):
                yield module, attribute


def _configs(anatomy: Anatomy, tower: Tower) -> Iterator[Any]:
    """The tower's config, and copies of it that modules around its blocks keep for themselves."""
    yield tower.config
    for name, module in anatomy.model.named_modules():
        around = not name or f"{tower.prefix}.".startswith(f"{name}.")
        config = module.__dict__.get("config")
        if around and type(config) is type(tower.config):
            yield config


def _feature_layer(anatomy: Anatomy, tower: Tower, plan: Plan) -> int | list[int] | None:
    """The index, among the streams between the blocks that stay, of the stream that the model reads.

    Stream i enters block i and stream L leaves the last one; negative indices count from L + 1. Removing blocks moves
    stream i to the number of blocks that stay in front of it.
    """
    if not tower.paths.feature_layer:
        return None
    gone = set(plan.layers.get(tower.name, []))
    blocks = len(tower)

    def moved(index: int) -> int:
        stream = index if index >= 0 else blocks + 1 + index
        place = sum(layer not in gone for layer in range(stream))
        return place if index >= 0 else place - (blocks - len(gone) + 1)

    value = getattr(anatomy.model.config, tower.paths.feature_layer, None)
    if value is None:
        return None
    return moved(value) if isinstance(value, int) else [moved(index) for index in value]


def shrink(model: nn.Module, structure: Mapping[str, Sequence[Mapping[str, int]]]) -> None:
    """Give a model whose weights are still to be loaded the units and layers of ``structure``, as `Anatomy.shape`.

    Raises ValueError if it has less than that.
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
    _remove(anatomy, plan)


# --- pretending ------------------------------------------------------------------------------------------------------


def _pass_by(hidden_states: Tensor, *_: object, **__: object) -> Tensor:
    return hidden_states


def _zero_columns(columns: Tensor):
    def hook(_: nn.Module, args: tuple) -> tuple:
        x = args[0]
        return (x.index_fill(-1, columns.to(x.device), 0), *args[1:])

    return hook


@contextmanager
def masked(model: nn.Module, plan: Plan) -> Iterator[nn.Module]:
    """Let ``model`` behave as if ``plan`` were applied, without writing a weight.

    Removed heads and neurons enter their output projection as zeros; removed blocks hand on what they get, and those
    that stay take their places in a KV cache. Everything is back when the context ends, also by an exception.

    Raises ValueError if the plan does not fit the model.
    """
    anatomy = describe(model)
    plan.check(anatomy)
    _check_layers(anatomy, plan)
    with Patches() as patches:
        for _, _, site, units in _changes(anatomy, plan):
            patches.pre_hook(site.out, _zero_columns(_columns(site, units)))
        for name, tower in anatomy.towers.items():
            gone = set(plan.layers.get(name, []))
            if not gone:
                continue
            place = 0
            for layer, block in enumerate(tower.blocks):
                if layer in gone:
                    patches.forward(block.module, _pass_by)
                    continue
                for module, attribute in _layer_numbers(block.module):
                    patches.attribute(module, attribute, place)
                place += 1
        yield model
