"""CoMP's masks in place on a model, for as long as a test looks."""

from __future__ import annotations

from contextlib import contextmanager

from vlprune_ext.anatomy import describe
from vlprune_ext.anatomy.patch import Patches
from vlprune_ext.comp.masks import Masks
from vlprune_ext.tokens.flow import Threshold


@contextmanager
def masked(model, limits, units=None, *, heads_vote=True):
    """The masks of a model, put in place."""
    masks = Masks(describe(model), heads_vote=heads_vote)
    masks.flow.thresholds = {
        name: Threshold(keep=tuple(limit["keep"][: len(masks.anatomy.tower(name))]))
        if "keep" in limit
        else Threshold(**limit)
        for name, limit in limits.items()
    }
    masks.units = dict(units or {})
    with Patches() as patches:
        masks.install(patches)
        yield masks
