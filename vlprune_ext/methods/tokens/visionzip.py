"""VisionZip (arXiv 2412.04467): dominant visual tokens, and contextual ones that merge the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ... import ops
from ...tokens import SummariseTokens
from ...tokens.method import Features, View, share
from .checks import expect_part, expect_share


@dataclass(frozen=True)
class VisionZip(SummariseTokens):
    """Keep dominant visual tokens and merge the others into contextual ones, before the language model.

    Dominant tokens receive the most attention of the class token, in the last vision block whose output is read.
    Contextual tokens are sampled evenly from the others; each remaining token joins the one whose key is nearest
    (cosine, mean over heads), and their mean takes its place. The released code adds that mean to the contextual token
    instead of including it.

    Source: VisionZip (arXiv 2412.04467).

    Parameters
    ----------
    keep : float
        Share of the visual tokens that are kept, in (0, 1].
    contextual : float
        Share of the kept tokens that are contextual (the paper: 10 of 64).
    positions : {"keep", "renumber"}
        Position ids of the kept tokens: their own, or renumbered.
    """

    keep: float = 0.5
    contextual: float = 10 / 64

    def __post_init__(self) -> None:
        expect_share("keep", self.keep)
        expect_part("contextual", self.contextual)

    def stages(self, blocks: int) -> dict[int, float]:
        return {0: self.keep}

    def summarise(self, features: Features, count: int) -> tuple[Tensor, Tensor]:
        images, patches = features.cls_attention.shape
        centres = min(share(self.contextual, count) if self.contextual else 0, count)
        kept = torch.zeros_like(features.cls_attention, dtype=torch.bool)
        if count > centres:
            kept.scatter_(1, ops.select_tokens(features.cls_attention, count - centres), True)
        if centres == 0 or count == patches:
            return kept.fill_(True) if count == patches else kept, features.states
        others = (~kept).nonzero()[:, 1].view(images, -1)
        step = others.shape[1] // centres
        target = torch.zeros_like(kept).scatter_(1, others[:, : step * centres : step], True)
        _, match = ops.match_tokens(features.keys, target, source=~(kept | target))
        kept |= target
        index = kept.nonzero()[:, 1].view(images, -1)
        (merged,), _ = ops.merge_tokens(index, match, [features.states])
        return kept, features.states.scatter(1, index[..., None].expand_as(merged), merged)

    def score(self, view: View) -> Tensor:
        assert view.summary is not None
        return view.summary
