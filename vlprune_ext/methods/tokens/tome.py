"""ToMe (arXiv 2210.09461): similar tokens merge within the vision tower."""

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
    """Merge, in each vision block between attention and MLP, the tokens of even place whose nearest odd one is nearest.

    keep    share of the patches that leave the tower, in (0, 1]

    Nearest by the cosine of the keys, mean of heads. Means are weighted by size, and attention counts a token as many
    times as it has patches. Each block merges as many (the paper's r), more in front where the last ones could not do
    their part, since a block at most halves its tokens. In front of a language model, the tokens that are left stand
    where they were, and the others leave before its first block.
    """

    keep: float = 0.5

    def __post_init__(self) -> None:
        expect_share("keep", self.keep)

    def schedule(self, tokens: int, blocks: int) -> list[int]:
        final, left, merged = share(self.keep, tokens), tokens, []
        for block in range(blocks):
            after = blocks - block - 1
            even = left - -(-(left - final) // (after + 1))
            # What the blocks behind can still bring down to `final`.
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
