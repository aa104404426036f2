"""Mask units and layers of a model with hooks, without writing a weight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ..anatomy import describe
from ..anatomy.patch import Patches
from ..plan import Plan
from .sites import changed_sites, check_layers, columns_of, layer_numbers


def _pass_by(hidden_states: Tensor, *_: object, **__: object) -> Tensor:
    """Return the residual stream unchanged, in place of a block's forward."""
    return hidden_states


def _zero_columns(columns: Tensor):
    """Return a pre-hook that zeroes these columns of a projection's input."""

    def hook(_: nn.Module, args: tuple) -> tuple:
        x = args[0]
        return (x.index_fill(-1, columns.to(x.device), 0), *args[1:])

    return hook


@contextmanager
def masked(model: nn.Module, plan: Plan) -> Iterator[nn.Module]:
    """Mask, with hooks on ``model``, everything that ``plan`` removes, while the context lasts.

    The inputs of the output projections are zeroed at removed heads and neurons; removed blocks are bypassed, and the
    others are renumbered, so that KV cache entries are consecutive. No weight is written; all hooks come off on exit,
    also after an exception.

    Parameters
    ----------
    model : nn.Module
        The model the plan was made for.
    plan : Plan
        Heads, neurons and layers to mask; its sparsities and tokens have no effect here.

    Yields
    ------
    nn.Module
        ``model``.

    Raises
    ------
    ValueError
        The plan does not fit the model, or a layer cannot be bypassed.
    """
    anatomy = describe(model)
    plan.check(anatomy)
    check_layers(anatomy, plan)
    with Patches() as patches:
        for _, _, site, units in changed_sites(anatomy, plan):
            patches.pre_hook(site.out, _zero_columns(columns_of(site, units)))
        for name, tower in anatomy.towers.items():
            gone = set(plan.layers.get(name, []))
            if not gone:
                continue
            place = 0
            for layer, block in enumerate(tower.blocks):
                if layer in gone:
                    patches.forward(block.module, _pass_by)
                    continue
                for module, attribute in layer_numbers(block.module):
                    patches.attribute(module, attribute, place)
                place += 1
        yield model
