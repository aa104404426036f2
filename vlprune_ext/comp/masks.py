"""The masks of a model that is being pruned: M^p on its heads and neurons, M^t on its tokens (eq. 1)."""

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
    """Soft masks in a running model; its weights are not written.

    units  (tower, layer, kind of site) -> [units] fp32, how much each counts in its output projection; sites that are
           not named are whole
    flow   the tokens
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
        """Put the hooks in place, for as long as ``patches`` lives."""
        for key, site in self.sites.items():
            patches.forward(site.out, self._project(key, site))
        self.flow.install(patches)

    def kept(self) -> dict[Unit, int]:
        """How many units of each masked site count at all."""
        return {key: int((mask > 0).sum()) for key, mask in self.units.items()}

    @contextmanager
    def hardened(self) -> Iterator[None]:
        """What counts less, be it a unit or a token, does not count at all."""
        before = self.units
        self.units = {key: (mask == 1).float() for key, mask in before.items()}
        try:
            with self.flow.hardened():
                yield
        finally:
            self.units = before

    def _votes(self, tower: str, layer: int) -> Tensor | None:
        return self.units.get((tower, layer, "head"))

    def _project(self, key: Unit, site: Site):
        plain = site.out.forward

        def project(x: Tensor) -> Tensor:
            mask = self.units.get(key)
            if mask is None:
                return plain(x)
            return F.linear(x, masked_columns(site.out.weight, mask, site.width), site.out.bias)

        return project


def masked_columns(weight: Tensor, mask: Tensor, width: int) -> Tensor:
    """M^p of eq. (1), where it costs least: ``(X ⊙ M) W^T = X (W ⊙ M)^T``.

    weight [D, units * width] of an output projection, mask [units]. A batch has more activations than it has weights.
    """
    return weight * mask.to(weight.dtype).repeat_interleave(width)


@dataclass
class Findings:
    """What one pass over data found out under the masks as they are.

    units   (tower, layer, kind) -> [units] fp32, eq. (3) or (4), the mean over a unit's channels
    tokens  tower -> for each batch, for each block: the tokens at its door and their importance [B, T]
    """

    units: dict[Unit, Tensor] = field(default_factory=dict)
    tokens: dict[str, list[list[tuple[Tokens, Tensor]]]] = field(default_factory=dict)

    def load(self) -> Load:
        """The tokens that ran."""
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
    """Measure what units and tokens are worth, in one run over the data; the masks have to be installed.

    batches       tower -> what the objective feeds it, as `inputs_of` gives
    weigh_tokens  units by eq. (4); False: by eq. (3)
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
            found.units[key] = value * masks.units.get(key, 1.0)  # the norm of what is masked
    return found


def inputs_of(
    anatomy: Anatomy, objective: Objective, data: Data, batch_size: int
) -> dict[str, list[dict[str, Tensor]]]:
    """Tower -> what an objective feeds it; one tower where a run of it is a run of the whole model."""
    return {tower: objective.batches(anatomy, tower, data, batch_size) for tower in objective.runs(anatomy)}
