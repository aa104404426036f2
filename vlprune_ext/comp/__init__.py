"""CoMP (arXiv 2604.02956), piece by piece: what a mode's units are worth, and which mode is pruned next."""

from .flops import block_flops
from .importance import channel_importance, token_importance, token_weights
from .strategy import ModeStrategy, cost

__all__ = ["ModeStrategy", "block_flops", "channel_importance", "cost", "token_importance", "token_weights"]
