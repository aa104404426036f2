"""Token merging in a vision tower, block by block, between attention and MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..anatomy.patch import Patches
from . import attention
from .checks import check_runs_once
from .method import MergeTokens
from .pruning import Pruning


@dataclass
class Images:
    """Batch of N images during the vision tower's forward.

    Parameters
    ----------
    patches : int
        P, patches of each image.
    schedule : list of int
        How many tokens each block merges away.
    size : Tensor [N, T], fp32
        Number of patches merged into each token.
    places : Tensor [N, T], int64
        Position of each token in the unmerged sequence, class token included.
    keys : Tensor [N, T, d], fp32, optional
        Keys of the running block, mean over heads.
    states : Tensor [N, T', D], optional
        Merged residual stream between the block's attention and its MLP.
    added : Tensor [N, T', D], optional
        Output of the block's MLP.
    """

    patches: int
    schedule: list[int]
    size: Tensor
    places: Tensor
    keys: Tensor | None = None
    states: Tensor | None = None
    added: Tensor | None = None


class MergingTower:
    """Merge tokens in the blocks of a vision tower, by hooks.

    A block adds its MLP's output to a residual that it holds itself, out of a hook's reach. So tokens are merged at the
    input of the MLP's norm, the MLP runs on the merged tokens, and the sum of both replaces the block's output.

    Parameters
    ----------
    anatomy : Anatomy
    method : MergeTokens
    pruning : Pruning
        Records which tokens are kept.

    Raises
    ------
    ValueError
        A block without a known attention and pre-norm; flash attention, which cannot weigh tokens by their size.
    """

    def __init__(self, anatomy: Anatomy, method: MergeTokens, pruning: Pruning) -> None:
        self.method, self.pruning = method, pruning
        self.tower = anatomy.tower("vision")
        pruning.tower, pruning.blocks = self.tower.name, self.tower.depth
        self.images: Images | None = None
        for block in self.tower.blocks[: self.tower.depth]:
            if "head" not in block.sites or block.norm is None:
                raise ValueError(
                    f"{method.name}: {type(block.module).__name__} is not supported; expected a block with a known"
                    " attention and a norm before it"
                )
        if "flash" in str(self.tower.config._attn_implementation):
            raise ValueError(
                f"{method.name}: attention proportional to token size needs an additive mask, which flash attention"
                ' does not take; load the model with attn_implementation="sdpa"'
            )

    def install(self, patches: Patches) -> None:
        """Register the hooks; ``patches`` removes them when it exits."""
        for layer, block in enumerate(self.tower.blocks[: self.tower.depth]):
            if layer == 0:
                patches.pre_hook(block.module, self._begin, with_kwargs=True)
            attention.weigh(patches, block.sites["head"], self._weight)
            attention.watch(patches, block.sites["head"], self._note_keys)
            patches.pre_hook(block.sites["neurons"].skip[0], self._merge_hook(layer))
            patches.hook(block.sites["neurons"].module, self._hold)
            # Before all other hooks, so that recorders of hidden states see the merged output.
            patches.hook(block.module, self._sum, prepend=True)

    def _begin(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Start a batch of images at the first block."""
        hidden = args[0] if args else kwargs["hidden_states"]
        check_runs_once(self.method.name, self.tower.container)
        images, tokens = hidden.shape[:2]
        cls = self.tower.cls
        places = torch.arange(tokens, device=hidden.device)
        self.images = Images(
            patches=tokens - cls,
            schedule=self.method.schedule(tokens - cls, self.tower.depth),
            size=torch.ones(images, tokens, dtype=torch.float32, device=hidden.device),
            places=places.expand(images, -1),
        )
        self.pruning.begin((places >= cls).expand(images, -1))

    def _note_keys(self, query: Tensor, key: Tensor, scale: float) -> None:
        """Record the running block's keys, mean over heads."""
        assert self.images is not None
        self.images.keys = key.float().mean(1)

    def _weight(self) -> Tensor | None:
        """Return the key weights [N, T] of the attention: token sizes; None before anything merged."""
        images = self.images
        assert images is not None
        return images.size if images.size.shape[1] < images.patches + self.tower.cls else None

    def _merge_hook(self, layer: int):
        """Return a pre-hook of the MLP's norm that merges the block's tokens."""

        def merge(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            images = self.images
            assert images is not None
            merged = images.schedule[layer]
            if not merged:
                return None
            assert images.keys is not None
            cls = self.tower.cls
            images.states, images.size, index = self.method.merge(args[0], images.keys, images.size, merged, cls)
            images.places = images.places.gather(1, index)
            self.pruning.note(layer + 1, images.places, torch.ones_like(images.places, dtype=torch.bool))
            return (images.states, *args[1:])

        return merge

    def _hold(self, _: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Keep the MLP's output for `_sum`, and give the block a zero to add."""
        images = self.images
        if images is None or images.states is None:
            return None
        images.added = output
        return output.new_zeros(1)

    def _sum(self, _: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Return residual plus MLP output of the merged tokens in place of the block's own sum."""
        images = self.images
        if images is None or images.states is None:
            return None
        assert images.added is not None
        found = images.states + images.added
        images.states, images.added = None, None
        return found

    def spread(self, states: Tensor) -> Tensor:
        """Scatter the merged patches [N, T', D] to their positions among all patches [N, P, D]; 0 elsewhere.

        Parameters
        ----------
        states : Tensor [N, T', D]
            Features of the merged patches, without the class token.

        Raises
        ------
        ValueError
            Another number of features than of merged patches.
        """
        images = self.images
        assert images is not None
        places = images.places[:, self.tower.cls :] - self.tower.cls
        if places.shape[1] != states.shape[1]:
            raise ValueError(
                f"{self.method.name}: {states.shape[1]} features of an image for {places.shape[1]} kept patches;"
                " expected one feature per patch"
            )
        if places.shape[1] == images.patches:  # a scattered copy's layout could change the projector's rounding
            return states
        full = states.new_zeros(states.shape[0], images.patches, states.shape[2])
        return full.scatter(1, places[..., None].expand_as(states), states)

    def kept(self) -> Tensor:
        """Return the mask [N, P] fp32 of patches that represent those merged into them."""
        images = self.images
        assert images is not None
        places = images.places[:, self.tower.cls :] - self.tower.cls
        return torch.zeros(places.shape[0], images.patches, dtype=torch.float32, device=places.device).scatter(
            1, places, 1.0
        )
