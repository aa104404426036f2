"""Vision-tower features pruned and summarised before the projector, as VisionZip does."""

from __future__ import annotations

from torch import Tensor, nn

from ..anatomy import Anatomy
from ..anatomy.patch import Patches
from . import attention
from .method import Features, SummariseTokens, share


class FeatureTap:
    """Record the class token's attention in the last vision block whose output is read, and summarise features by it.

    Parameters
    ----------
    anatomy : Anatomy
    method : SummariseTokens

    Raises
    ------
    ValueError
        A vision tower without a class token.
    """

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
        self.kept: Tensor | None = None  # [N, P] fp32, 1 for the kept patches of the latest images
        self.count = 0  # kept patches of each image

    def install(self, patches: Patches) -> None:
        """Register the hooks; ``patches`` removes them when it exits."""
        attention.watch(patches, self.site, self._look)

    def _look(self, query: Tensor, key: Tensor, scale: float) -> None:
        """Record the class token's attention weights and the mean keys of the latest images."""
        self.attention = attention.from_rows(query[:, :, :1], key, scale).sum(1)
        self.keys = key.float().mean(1)

    def summarise(self, states: Tensor) -> Tensor:
        """Return the states [N, P, D] that the projector gets, with summarised tokens written in; record the kept ones.

        Parameters
        ----------
        states : Tensor [N, P, D]
            Features of P patches of N images.

        Raises
        ------
        ValueError
            Another number of features than of patches.
        """
        assert self.attention is not None
        assert self.keys is not None
        given = self.attention[:, self.cls :]
        if given.shape != states.shape[:2]:
            raise ValueError(
                f"{self.method.name}: {states.shape[1]} features of an image for {given.shape[1]} patches;"
                " expected one feature per patch"
            )
        self.count = share(self.keep, states.shape[1])
        kept, states = self.method.summarise(
            Features(states, given.contiguous(), self.keys[:, self.cls :].contiguous()), self.count
        )
        self.kept = kept.float()
        return states


def before(patches: Patches, anatomy: Anatomy, change) -> None:
    """Apply ``change`` to the input [N, P, D] of the projector that maps patches to visual tokens.

    Parameters
    ----------
    patches : Patches
        Owns the hook.
    anatomy : Anatomy
        A model whose family names the projector.
    change : callable Tensor [N, P, D] -> Tensor [N, P, D]
        Applied to the features of P patches of N images.
    """
    assert anatomy.family.visual is not None
    projector = anatomy.model.get_submodule(anatomy.family.visual.projector)

    def enter(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (change(args[0]), *args[1:])

    patches.pre_hook(projector, enter)


def check_projector(anatomy: Anatomy, method) -> None:
    """Raise ValueError unless each patch of the vision tower becomes one visual token of the language model.

    Parameters
    ----------
    anatomy : Anatomy
        The model.
    method : TokenMethod
        Named in the message.
    """
    visual = anatomy.family.visual
    if visual is None or not (visual.projector or visual.reader):
        raise ValueError(
            f"{method.name} works on the vision tower; the patches of {type(anatomy.model).__name__} are not, one by"
            " one, the visual tokens of its language model"
        )
