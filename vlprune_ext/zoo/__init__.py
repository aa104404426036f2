"""Small trained models and the data that they were trained on, shipped with the package: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

from .digit_scenes import DigitScenes, Object, Scene

__all__ = ["DigitScenes", "Object", "Scene", "names", "path"]

_ROOT = Path(__file__).parent


def names() -> list[str]:
    """Return the names of the shipped models, sorted; each is a ``save_pretrained`` folder."""
    return sorted(config.parent.name for config in _ROOT.glob("*/config.json"))


def path(name: str) -> Path:
    """Return the folder of a shipped model, for ``from_pretrained``; raise ValueError on a name not in ``names()``."""
    known = names()
    if name not in known:
        raise ValueError(f"no model named {name!r} in the zoo, which has {', '.join(known) or 'none'}")
    return _ROOT / name
