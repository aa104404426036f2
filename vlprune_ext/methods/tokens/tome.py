"""ToMe (arXiv 2210.09461): token merging in the vision tower."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ... import ops
from ...tokens import MergeTokens
from ...tokens.method import share
from .checks import expect_share


@dataclass(frozen=True)
class ToMe(MergeTokens):
    """Merge similar tokens in every block of the vision tower, by bipartite soft matching between attention and MLP.

    Tokens of even place are matched with the nearest of odd place, by the cosine of the keys (mean over heads), and the
    most similar pairs merge. Averages are weighted by token size, and attention is proportional: a token counts as many
    times as it has patches. Each block merges the same number (the paper's r), more in the first blocks where the last
    ones could not do their part, since a block at most halves its tokens. In front of a language model, the merged
    tokens keep their places, and the other places are dropped before its first block.

    Source: ToMe (arXiv 2210.09461).

    Parameters
    ----------
    keep : float
        Tokens at the vision tower's end, as a share of its patches, in (0, 1].
    """

    keep: float = 0.5

    def __post_init__(self) -> None:
        expect_share("keep", self.keep)

    def schedule(self, tokens: int, blocks: int) -> list[int]:
        final, left, merged = share(self.keep, tokens), tokens, []
        for block in range(blocks):
            after = blocks - block - 1
            even = left - -(-(left - final) // (after + 1))
            # The most tokens that the later blocks can still reduce to `final`.
            reachable = final
            for _ in range(after):
                reachable = 2 * reachable
            merged.append(left - min(even, reachable))
            if merged[-1] > left // 2:
                raise ValueError(f"ToMe: keep is {self.keep}; {blocks} vision blocks halve {tokens} tokens less often")
            left -= merged[-1]
        return merged

    def merge(self, states: Tensor, keys: Tensor, size: Tensor, merged: int, cls: int) -> tuple[Tensor, Tensor, Tensor]:
        images, tokens = size.shape
        place = torch.arange(tokens, device=states.device)
        odd = (place - cls) % 2 == 1
        target = (odd & (place >= cls)).expand(images, -1)
        source = (~odd & (place >= cls)).expand(images, -1)
        similarity, match = ops.match_tokens(keys, target, source=source)
        index = ops.select_tokens(-similarity, tokens - merged, ~source)
        (states,), size = ops.merge_tokens(index, match, [states], size=size)
        return states, size, index
