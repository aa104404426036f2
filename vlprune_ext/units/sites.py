"""Sites that a plan changes, and whether their modules can be changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..anatomy import KINDS, Anatomy, Site, Tower
from ..anatomy.linears import check_linears
from ..plan import Plan

_SITE_KINDS = KINDS[:-1]
# What configs, and modules that hold blocks, say of blocks by their numbers: a list with an entry for each, lists of
# numbers, and numbers of blocks whose outputs something beside the next block reads.
PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "no_rope_layers")
BY_NUMBER = (
    "attn_layer_indices",
    "cross_attention_layers",
    "full_attn_idxs",
    "fullatt_block_indexes",
    "global_attn_indexes",
    "mlp_only_layers",
    "moe_layers",
    "window_block_indexes",
    "window_block_indices",
)
TAPS = ("deepstack_visual_indexes",)
LAYER_NUMBERS = ("layer_idx", "layer_num")  # by these a block indexes the KV cache


def changed_sites(anatomy: Anatomy, plan: Plan) -> Iterator[tuple[Tower, int, Site, list[int]]]:
    """Yield the sites that lose units, outside the layers that are removed as a whole.

    Parameters
    ----------
    anatomy : Anatomy
        The model.
    plan : Plan
        Units and layers to remove.

    Yields
    ------
    tuple of (Tower, int, Site, list of int)
        Tower, layer, site and the removed units, ascending.
    """
    for name, tower in anatomy.towers.items():
        gone = set(plan.layers.get(name, []))
        for layer, block in enumerate(tower.blocks):
            if layer in gone:
                continue
            for kind, site in block.sites.items():
                units = sorted(plan.removed(name, kind, layer))
                if units:
                    yield tower, layer, site, units


def check_changeable(anatomy: Anatomy, plan: Plan, mode: str) -> None:
    """Raise ValueError unless every projection and layer that ``plan`` changes can be changed.

    Parameters
    ----------
    anatomy : Anatomy
        The model.
    plan : Plan
        Units and layers to remove.
    mode : {"remove", "mask"}
        As in `apply`; "mask" needs blocks that normalise before they add to the residual stream.

    Raises
    ------
    ValueError
        A projection that `check_linears` refuses, or a layer that cannot be removed or zeroed.
    """
    changed = {tower.name for tower, *_ in changed_sites(anatomy, plan)}
    changed |= {name for name, layers in plan.layers.items() if layers}
    check_linears(anatomy, [name for name in anatomy.towers if name in changed])
    if mode == "remove":
        check_layers(anatomy, plan)
        return
    for name, layers in plan.layers.items():
        for layer in layers:
            block = anatomy.towers[name].blocks[layer]
            if block.norm is None:
                raise ValueError(
                    f"mode: 'mask' cannot remove layer {name}.{layer}: a {type(block.module).__name__} normalises "
                    "after adding, so zero weights do not make it the identity; use mode='remove'"
                )


def check_layers(anatomy: Anatomy, plan: Plan) -> None:
    """Raise ValueError unless every layer that ``plan`` removes can be taken out of its tower.

    Parameters
    ----------
    anatomy : Anatomy
        The model.
    plan : Plan
        Layers to remove.
    """
    for name, layers in plan.layers.items():
        for layer in layers:
            tower = anatomy.towers[name]
            reason = tower.blocks[layer].fixed
            tapped = [tap for tap in TAPS if layer in (getattr(tower.config, tap, None) or ())]
            if tapped:
                raise ValueError(f"plan: layer {name}.{layer} cannot be removed: {tapped[0]} reads what leaves it")
            if reason:
                raise ValueError(
                    f"plan: layer {name}.{layer} cannot be removed: {reason}; mode='mask' zeroes it instead"
                )


def columns_of(site: Site, units: Sequence[int]) -> Tensor:
    """Return the columns of the output projection that belong to these units.

    Parameters
    ----------
    site : Site
        Units of ``site.width`` columns each.
    units : sequence of int
        Heads or neurons.

    Returns
    -------
    Tensor [len(units) * width], int64
        Column indices, unit by unit.
    """
    first = torch.tensor(units, dtype=torch.long)[:, None] * site.width
    return (first + torch.arange(site.width)).flatten()


def layer_numbers(block: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield the modules of a block that store its layer index, each with the attribute that holds it."""
    for module in block.modules():
        for attribute in LAYER_NUMBERS:
            if isinstance(module.__dict__.get(attribute), int):
                yield module, attribute
