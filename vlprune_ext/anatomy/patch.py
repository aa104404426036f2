"""Temporary changes to modules: hooks, patched forwards, modes. All are undone on exit, also after an exception.

A copy of a patched module is an ordinary module: `copy.deepcopy`, pickling and `torch.save` see it without its patches.
"""

from __future__ import annotations

import copy
import copyreg
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

_ABSENT = object()
_COPYING = ("__deepcopy__", "__reduce_ex__")  # looked up on the instance by copy and pickle
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)

Clean = Callable[[dict[str, Any]], None]  # takes one patch out of a module's state
_patched: weakref.WeakKeyDictionary[nn.Module, list[Clean]] = weakref.WeakKeyDictionary()


class Patches:
    """Owner of hooks, patched forwards and attributes, which it undoes when its ``with`` block ends.

    Later patches of a module stack on earlier ones; they are undone in reverse order.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def forward(self, module: nn.Module, function: Callable) -> None:
        """Replace ``module.forward`` by ``function``; the module's hooks still run."""
        clean = partial(_restore, before={"forward": module.__dict__.get("forward", _ABSENT)})
        module.__dict__["forward"] = function
        self._note(module, clean, lambda: clean(module.__dict__))

    def pre_hook(self, module: nn.Module, hook: Callable, **kwargs) -> None:
        """Register a forward pre-hook, with the keyword arguments of `register_forward_pre_hook`."""
        handle = module.register_forward_pre_hook(hook, **kwargs)
        self._note(module, partial(_without_hook, number=handle.id), handle.remove)

    def hook(self, module: nn.Module, hook: Callable, **kwargs) -> None:
        """Register a forward hook, with the keyword arguments of `register_forward_hook`."""
        handle = module.register_forward_hook(hook, **kwargs)
        self._note(module, partial(_without_hook, number=handle.id), handle.remove)

    def attribute(self, module: nn.Module, name: str, value: object) -> None:
        """Set ``module.name`` to ``value``."""
        before, state = getattr(module, name), dict(module.__dict__)
        setattr(module, name, value)
        # A property's setter writes under another name.
        changed = {key: state.get(key, _ABSENT) for key, now in module.__dict__.items() if now is not state.get(key)}
        self._note(module, partial(_restore, before=changed), lambda: setattr(module, name, before))

    def _note(self, module: nn.Module, clean: Clean, undo: Callable[[], None]) -> None:
        """Remember how to undo one patch, and how to take it out of the state of a copy."""
        cleans = _patched.setdefault(module, [])
        if not cleans:
            reference = weakref.ref(module)
            module.__dict__.update(
                zip(_COPYING, (partial(_deepcopy, reference), partial(_reduce, reference)), strict=True)
            )
        cleans.append(clean)

        def undone() -> None:
            undo()
            cleans.remove(clean)
            if not cleans:
                for name in _COPYING:
                    module.__dict__.pop(name, None)

        self._undo.append(undone)

    def undo(self) -> None:
        """Undo all patches, the latest first."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Patches:
        return self

    def __exit__(self, *_) -> None:
        self.undo()


def _restore(state: dict[str, Any], before: dict[str, Any]) -> None:
    """Give entries of a state the values that they had, or take them out."""
    for name, value in before.items():
        if value is _ABSENT:
            state.pop(name, None)
        else:
            state[name] = value


def _without_hook(state: dict[str, Any], number: int) -> None:
    """Take one hook out of a copied state; the module's own dicts are not written."""
    for name in _HOOKS:
        if number in state.get(name, ()):
            state[name] = type(state[name])((key, value) for key, value in state[name].items() if key != number)


def _plain_state(module: nn.Module) -> dict[str, Any]:
    """Return the state of a module without its patches."""
    state = {name: value for name, value in module.__dict__.items() if name not in _COPYING}
    for clean in reversed(_patched[module]):
        clean(state)
    return state


def _deepcopy(reference: weakref.ref[nn.Module], memo: dict[int, Any]) -> nn.Module:
    """Copy a patched module as `copy.deepcopy` copies it without patches."""
    module = reference()
    assert module is not None
    found = module.__class__.__new__(module.__class__)
    memo[id(module)] = found
    found.__dict__.update(copy.deepcopy(_plain_state(module), memo))
    return found


def _reduce(reference: weakref.ref[nn.Module], _protocol: int) -> tuple[Any, ...]:
    """Say to pickle how to build a patched module without its patches."""
    module = reference()
    assert module is not None
    return copyreg.__newobj__, (module.__class__,), _plain_state(module)  # type: ignore[attr-defined]


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
