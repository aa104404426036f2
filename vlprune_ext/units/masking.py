"""Mask units and layers in a running model, without writing a weight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ..anatomy import describe
from ..anatomy.patch import Patches
from ..plan import Plan
from .sites import changed_sites, check_layers, columns_of, layer_numbers


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
