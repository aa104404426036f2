"""Visual tokens leaving a model while it runs: hooks, attention, key-value cache. The methods are in `methods`."""

from .method import DropTokens, EvictTokens, MergeTokens, SummariseTokens, TokenMethod
from .session import Pruning, prune_tokens

__all__ = ["DropTokens", "EvictTokens", "MergeTokens", "Pruning", "SummariseTokens", "TokenMethod", "prune_tokens"]
