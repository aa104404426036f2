"""CoMP (arXiv 2604.02956) in parts: masks, importance of units and tokens, costs of modes, and the mode strategy."""

from ..tokens.importance import token_importance
from .flops import block_flops
from .importance import ChannelImportance, token_weights
from .strategy import ModeStrategy, cost

__all__ = ["ChannelImportance", "ModeStrategy", "block_flops", "cost", "token_importance", "token_weights"]
