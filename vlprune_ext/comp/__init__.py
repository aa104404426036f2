"""CoMP (arXiv 2604.02956), piece by piece: what a mode's units are worth, and which mode is pruned next."""

from ..tokens.importance import token_importance
from .flops import block_flops
from .importance import ChannelImportance, token_weights
from .strategy import ModeStrategy, cost

__all__ = ["ChannelImportance", "ModeStrategy", "block_flops", "cost", "token_importance", "token_weights"]
