"""Temporary changes to modules: hooks, patched forwards, modes. All are undone on exit, also after an exception."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

_ABSENT = object()


class Patches:
    """Owner of hooks, patched forwards and attributes, which it undoes when its ``with`` block ends.

    Later patches of a module stack on earlier ones; they are undone in reverse order.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def forward(self, module: nn.Module, function: Callable) -> None:
        """Replace ``module.forward`` by ``function``; the module's hooks still run."""
        before = module.__dict__.get("forward", _ABSENT)

        def undo() -> None:
            if before is _ABSENT:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before

        module.__dict__["forward"] = function
        self._undo.append(undo)

    def pre_hook(self, module: nn.Module, hook: Callable, **kwargs) -> None:
        """Register a forward pre-hook, with the keyword arguments of `register_forward_pre_hook`."""
        self._undo.append(module.register_forward_pre_hook(hook, **kwargs).remove)

    def hook(self, module: nn.Module, hook: Callable, **kwargs) -> None:
        """Register a forward hook, with the keyword arguments of `register_forward_hook`."""
        self._undo.append(module.register_forward_hook(hook, **kwargs).remove)

    def attribute(self, owner: object, name: str, value: object) -> None:
        """Set ``owner.name`` to ``value``."""
        before = getattr(owner, name)
        setattr(owner, name, value)
        self._undo.append(lambda: setattr(owner, name, before))

    def undo(self) -> None:
        """Undo all patches, the latest first."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Patches:
        return self

    def __exit__(self, *_) -> None:
        self.undo()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Set a model to evaluation mode inside the ``with`` block; every module's own mode is restored on exit."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def gradients_only_of(model: nn.Module, parameters: Iterable[Tensor] = ()) -> Iterator[None]:
    """Require gradients of these parameters only inside the ``with`` block; every flag is restored on exit.

    Parameters
    ----------
    model : nn.Module
        Its other parameters get ``requires_grad=False``.
    parameters : iterable of Tensor
        Parameters of the model; none by default.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    wanted = {id(p) for p in parameters}
    for p, _ in flags:
        p.requires_grad_(id(p) in wanted)
    try:
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
