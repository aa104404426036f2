"""Token pruning at inference: hooks on residual streams, attention and KV caches. `methods.tokens` has the methods."""

from .method import DropTokens, EvictTokens, MergeTokens, SummariseTokens, TokenMethod
from .session import Pruning, prune_tokens

__all__ = ["DropTokens", "EvictTokens", "MergeTokens", "Pruning", "SummariseTokens", "TokenMethod", "prune_tokens"]
