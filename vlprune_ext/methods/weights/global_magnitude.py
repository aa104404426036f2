"""Global magnitude: the smallest weights of the whole model."""

from __future__ import annotations

from dataclasses import dataclass, field

from .ecoflap import ECoFLaP


@dataclass(kw_only=True)
class GlobalMagnitude(ECoFLaP):
    """The smallest |w| of the whole model go, wherever they lie: the exact k-th value over all its matrices."""

    estimator: str = field(default="magnitude", init=False)
    criterion: str = field(default="magnitude", init=False)
    scope: str | None = field(default="matrix", init=False)
