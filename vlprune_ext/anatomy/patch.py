"""Temporary changes to modules. Whatever is patched here is unpatched on exit, also when the body raises."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

_ABSENT = object()


class Patches:
    """Forward functions and hooks that live as long as a ``with`` block.

    Later patches of a module stack on earlier ones; they come off in reverse order.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def forward(self, module: nn.Module, function: Callable) -> None:
        """Let ``function`` answer in place of ``module.forward``; the module's hooks still run."""
        before = module.__dict__.get("forward", _ABSENT)

        def undo() -> None:
            if before is _ABSENT:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before

        module.__dict__["forward"] = function
        self._undo.append(undo)

    def pre_hook(self, module: nn.Module, hook: Callable, **kwargs) -> None:
        """Register a forward pre-hook."""
        self._undo.append(module.register_forward_pre_hook(hook, **kwargs).remove)

    def hook(self, module: nn.Module, hook: Callable, **kwargs) -> None:
        """Register a forward hook."""
        self._undo.append(module.register_forward_hook(hook, **kwargs).remove)

    def attribute(self, owner: object, name: str, value: object) -> None:
        """Set an attribute."""
        before = getattr(owner, name)
        setattr(owner, name, value)
        self._undo.append(lambda: setattr(owner, name, before))

    def undo(self) -> None:
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Patches:
        return self

    def __exit__(self, *_) -> None:
        self.undo()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off; every module's mode comes back on exit."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def gradients_only_of(model: nn.Module, parameters: Iterable[Tensor] = ()) -> Iterator[None]:
    """No other parameter of the model needs a gradient; every flag comes back on exit."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    wanted = {id(p) for p in parameters}
    for p, _ in flags:
        p.requires_grad_(id(p) in wanted)
    try:
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
