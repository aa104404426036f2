"""The features of a vision tower, summarised before the language model reads them."""

from __future__ import annotations

from torch import Tensor, nn

from ..anatomy import Anatomy
from ..anatomy.patch import Patches
from . import attention
from .method import Features, SummariseTokens, share


class FeatureTap:
    """Notes what the class token of the last vision block that is read attends to."""

    def __init__(self, anatomy: Anatomy, method: SummariseTokens) -> None:
        tower = anatomy.tower("vision")
        if not tower.cls:
            raise ValueError(
                f"{method.name} needs a class token; the vision tower of {type(anatomy.model).__name__} has none"
            )
        self.method, self.keep = method, method.stages(len(tower))[0]
        self.cls = tower.cls
        self.site = tower.blocks[tower.depth - 1].sites["head"]
        self.attention: Tensor | None = None  # [N, 1 + P]
        self.keys: Tensor | None = None  # [N, 1 + P, d]
        self.kept: Tensor | None = None  # [N, P], what stays of the last images
        self.count = 0  # of each image

    def install(self, patches: Patches) -> None:
        attention.watch(patches, self.site, self._look)

    def _look(self, query: Tensor, key: Tensor, scale: float) -> None:
        self.attention = attention.from_rows(query[:, :, :1], key, scale).sum(1)
        self.keys = key.float().mean(1)

    def summarise(self, states: Tensor) -> Tensor:
        """The states [N, P, D] that the language model gets; notes which of them stay."""
        assert self.attention is not None
        assert self.keys is not None
        given = self.attention[:, self.cls :]
        if given.shape != states.shape[:2]:
            raise ValueError(
                f"{self.method.name}: {states.shape[1]} features of an image for {given.shape[1]} patches;"
                " expected one of each"
            )
        self.count = share(self.keep, states.shape[1])
        kept, states = self.method.summarise(
            Features(states, given.contiguous(), self.keys[:, self.cls :].contiguous()), self.count
        )
        self.kept = kept.float()
        return states


def before(patches: Patches, anatomy: Anatomy, change) -> None:
    """Let ``change`` have the states [N, P, D] in front of the projector that makes visual tokens of them."""
    assert anatomy.family.visual is not None
    projector = anatomy.model.get_submodule(anatomy.family.visual.projector)

    def enter(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (change(args[0]), *args[1:])

    patches.pre_hook(projector, enter)


def check_projector(anatomy: Anatomy, method) -> None:
    """Raise ValueError unless the patches of a vision tower are the visual tokens of a language model, one by one."""
    visual = anatomy.family.visual
    if visual is None or not (visual.projector or visual.reader):
        raise ValueError(
            f"{method.name} works on the vision tower; the patches of {type(anatomy.model).__name__} are not, one by"
            " one, the visual tokens of its language model"
        )
