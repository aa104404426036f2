"""Masks of a model that is being pruned, eq. (1): M^p on its heads and neurons, M^t on its tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from ..anatomy import Anatomy, Site
from ..anatomy.patch import Patches, evaluation_mode
from ..data import Data
from ..objectives import Objective
from ..tokens.flow import TokenFlow, Tokens, class_tokens
from .flops import Load, Unit
from .importance import ChannelImportance, token_weights


class Masks:
    """Apply soft masks to a running model, through its forwards; no weight is written.

    Parameters
    ----------
    anatomy : Anatomy
        The model.
    heads_vote : bool
        True: head masks weigh the attention in token importance, eq. (7). False: eq. (6).

    Attributes
    ----------
    units : dict of (tower, layer, kind) to Tensor [units], fp32
        Soft mask of each site's units at its output projection, in [0, 1]. Sites not named are unmasked.
    flow : TokenFlow
        The token masks.
    """

    def __init__(self, anatomy: Anatomy, *, heads_vote: bool = True) -> None:
        self.anatomy = anatomy
        self.units: dict[Unit, Tensor] = {}
        self.sites: dict[Unit, Site] = {
            (name, layer, kind): site
            for name, tower in anatomy.towers.items()
            for layer, block in enumerate(tower.blocks)
            for kind, site in block.sites.items()
        }
        self.flow = TokenFlow(anatomy, head_masks=self._votes if heads_vote else lambda tower, layer: None)

    def install(self, patches: Patches) -> None:
        """Register the hooks.

        Parameters
        ----------
        patches : Patches
            Removes them when it ends.
        """
        for key, site in self.sites.items():
            patches.forward(site.out, self._project(key, site))
        self.flow.install(patches)

    def kept(self) -> dict[Unit, int]:
        """Count the units of each masked site whose mask is above 0."""
        return {key: int((mask > 0).sum()) for key, mask in self.units.items()}

    @contextmanager
    def hardened(self) -> Iterator[None]:
        """Binarise all masks while the context lasts: units and tokens below 1 are masked completely."""
        before = self.units
        self.units = {key: (mask == 1).float() for key, mask in before.items()}
        try:
            with self.flow.hardened():
                yield
        finally:
            self.units = before

    def _votes(self, tower: str, layer: int) -> Tensor | None:
        """Return a block's head mask [H], or None if its heads are unmasked."""
        return self.units.get((tower, layer, "head"))

    def _project(self, key: Unit, site: Site):
        """Return a forward of the site's output projection with masked columns."""
        plain = site.out.forward

        def project(x: Tensor) -> Tensor:
            mask = self.units.get(key)
            if mask is None:
                return plain(x)
            return F.linear(x, masked_columns(site.out.weight, mask, site.width), site.out.bias)

        return project


def masked_columns(weight: Tensor, mask: Tensor, width: int) -> Tensor:
    """Mask the columns of an output projection: M^p of eq. (1), as ``(X ⊙ M) W^T = X (W ⊙ M)^T``.

    Cheaper than masking X: a batch has more activations than the projection has weights.

    Parameters
    ----------
    weight : Tensor [D, units * width]
        The output projection.
    mask : Tensor [units]
        M, in [0, 1].
    width : int
        Columns of a unit.

    Returns
    -------
    Tensor [D, units * width]
        In the dtype of ``weight``.
    """
    return weight * mask.to(weight.dtype).repeat_interleave(width)


@dataclass
class Findings:
    """Importances that one pass over data measured, under the masks as they were.

    Parameters
    ----------
    units : dict of (tower, layer, kind) to Tensor [units], fp32
        Eq. (3) or (4), averaged over a unit's channels.
    tokens : dict of str to list of list of (Tokens, Tensor [B, T])
        Tower -> batch -> block: the tokens that enter it and their importance.
    """

    units: dict[Unit, Tensor] = field(default_factory=dict)
    tokens: dict[str, list[list[tuple[Tokens, Tensor]]]] = field(default_factory=dict)

    def load(self) -> Load:
        """Return the token counts of the pass."""
        return Load(
            {
                tower: [torch.cat([tokens.alive.sum(1) for tokens, _ in block]) for block in zip(*of, strict=True)]
                for tower, of in self.tokens.items()
            }
        )


@torch.no_grad()
def examine(
    masks: Masks, objective: Objective, batches: Mapping[str, list[dict[str, Tensor]]], *, weigh_tokens: bool = True
) -> Findings:
    """Measure the importance of all units and tokens in one pass over the data, under the installed masks.

    Parameters
    ----------
    masks : Masks
        Installed.
    objective : Objective
        Decides what runs.
    batches : mapping of str to list of dict
        Tower -> its model inputs (`inputs_of`).
    weigh_tokens : bool
        True: units by eq. (4). False: by eq. (3).

    Returns
    -------
    Findings
    """
    anatomy, flow = masks.anatomy, masks.flow
    channels = {key: ChannelImportance(site.out.weight) for key, site in masks.sites.items()}
    found = Findings()
    weights: dict[str, Tensor] = {}  # tower -> [B, T] of the block that runs
    waiting: dict[str, tuple[Unit, Tensor]] = {}  # an MLP's activations, until the next layer's tokens are known

    def on_importance(tower: str, layer: int, tokens: Tokens, importance: Tensor) -> None:
        seen = found.tokens.setdefault(tower, [])
        if layer == 0:
            seen.append([])
        seen[-1].append((tokens, importance))
        weights[tower] = tokens.alive.float()
        if weigh_tokens:
            weights[tower] = token_weights(importance * weights[tower], class_tokens(anatomy, tower))
        if tower in waiting:
            key, x = waiting.pop(tower)
            channels[key].add(x, weights[tower])

    def collect(key: Unit):
        tower, layer, kind = key

        def look(_, args: tuple[Tensor, ...]) -> None:
            if tower not in flow.towers:
                channels[key].add(args[0], flow.state[tower].alive.float())
            elif kind == "neurons" and layer < len(anatomy.tower(tower)) - 1:
                waiting[tower] = (key, args[0])
            else:
                channels[key].add(args[0], weights[tower])

        return look

    flow.on_importance = on_importance
    try:
        with Patches() as patches, evaluation_mode(anatomy.model):
            for key, site in masks.sites.items():
                patches.pre_hook(site.out, collect(key))
            for tower, inputs in batches.items():
                for batch in inputs:
                    objective.outputs(anatomy, tower, batch)
    finally:
        flow.on_importance = None
    for key, of in channels.items():
        if of.samples:
            value = of.value().view(-1, masks.sites[key].width).mean(1)
            found.units[key] = value * masks.units.get(key, 1.0)  # the norm of the masked activations
    return found


def inputs_of(
    anatomy: Anatomy, objective: Objective, data: Data, batch_size: int
) -> dict[str, list[dict[str, Tensor]]]:
    """Return what an objective feeds each tower; one tower where its rows are runs of the whole model.

    Parameters
    ----------
    anatomy : Anatomy
        The model.
    objective : Objective
        Decides what each tower is fed.
    data : Data
        The samples.
    batch_size : int
        Rows of a batch.

    Returns
    -------
    dict of str to list of dict
        Tower -> batch -> model inputs.
    """
    return {tower: objective.batches(anatomy, tower, data, batch_size) for tower in objective.runs(anatomy)}
