"""`Scores` of modules and the `Plan` of what to prune. Plain data, readable JSON."""

from .plan import Plan, Removed
from .scores import Module, Scores

__all__ = ["Module", "Plan", "Removed", "Scores"]
