"""CoMP (arXiv 2604.02956), piece by piece: what a mode's units are worth, and which mode is pruned next."""

from .importance import channel_importance, token_importance, token_weights
from .strategy import ModeStrategy, cost

__all__ = ["ModeStrategy", "channel_importance", "cost", "token_importance", "token_weights"]
