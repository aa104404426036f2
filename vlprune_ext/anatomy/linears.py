"""Whether a model's projections are what they look like: plain linear layers, each with a weight of its own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from .model import Anatomy

_ADAPTED = ("base_layer", "lora_A")  # what adapters keep beside the layer that they wrap


def check_linears(anatomy: Anatomy, towers: Sequence[str]) -> None:
    """Raise ValueError unless every projection in the blocks of some towers can be scored and pruned as it stands.

    A weight that is computed from others, a linear layer with an adapter or one that was replaced by a quantised one
    would be scored by one weight and run with another. Weights that are not in memory cannot be looked at, and a block
    that stands at two places cannot lose something at one of them.

    Parameters
    ----------
    anatomy : Anatomy
        The model.
    towers : sequence of str
        Its towers to look at.

    Raises
    ------
    ValueError
        Naming the first module that is not plain, what it is, and the remedy.
    """
    places: dict[int, str] = {}
    for name in towers:
        tower = anatomy.tower(name)
        for layer, block in enumerate(tower.blocks):
            where = f"{tower.prefix}.{layer}"
            for path, module in block.module.named_modules():
                reason = _reason(module)
                if reason:
                    raise ValueError(f"model: {where}.{path}: {reason}")
            for site in block.sites.values():
                for linear in (site.out, *site.inputs):
                    if not isinstance(linear, nn.Linear):
                        raise ValueError(
                            f"model: a projection of {site.kind} in {where} is a {_name(linear)}, expected a"
                            " torch.nn.Linear; prune before you quantise or replace it"
                        )
            before = places.setdefault(id(block.module), where)
            if before != where:
                raise ValueError(
                    f"model: {where} and {before} are one module; give each block weights of its own (copy.deepcopy)"
                )


def _reason(module: nn.Module) -> str:
    """Return why a module's weight is not what the module computes with, and the remedy; "" for a plain one."""
    if parametrize.is_parametrized(module):
        names = ", ".join(module.parametrizations)  # type: ignore[arg-type]
        return (
            f"its {names} is parametrized, so computed from other tensors; make it plain by"
            f" torch.nn.utils.parametrize.remove_parametrizations(module, {names.split(', ')[0]!r})"
        )
    for hook in module._forward_pre_hooks.values():
        kind = type(hook)
        if isinstance(hook, BasePruningMethod):
            return "its weight is masked by torch.nn.utils.prune; make that permanent by prune.remove(module, 'weight')"
        if kind.__module__ in ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm"):
            return f"its weight is computed by {kind.__name__}; make it plain by the remove function beside it"
    adapter = next((name for name in _ADAPTED if hasattr(module, name)), None)
    if adapter is not None:
        return (
            f"a {type(module).__name__} with an adapter ({adapter}); merge it into the weights first, by"
            " merge_and_unload() of peft, or take it off by unload()"
        )
    return _reason_of_linear(module) if isinstance(module, nn.Linear) else ""


def _reason_of_linear(module: nn.Linear) -> str:
    """Return why a linear layer is not a plain one; "" if it is."""
    weight, stored = module.weight, type(module.weight.data)
    if type(module).forward is not nn.Linear.forward:
        return f"a {_name(module)} with a forward of its own, expected a torch.nn.Linear"
    if stored is not Tensor or not weight.is_floating_point():
        what = weight.dtype if stored is Tensor else stored.__name__
        return f"its weight is a {what}, expected a dense floating-point tensor; prune before you quantise it"
    if weight.is_meta:
        return (
            "its weights are not in memory (meta device): offloaded or not loaded yet; load the model without"
            " device_map='disk' or CPU offload"
        )
    if weight.shape != (module.out_features, module.in_features):
        return f"its weight is {list(weight.shape)}, expected [{module.out_features}, {module.in_features}]"
    return ""


def _name(module: nn.Module) -> str:
    """Return the full name of a module's class."""
    return f"{type(module).__module__}.{type(module).__name__}"
