"""`Scores` and `Plan`: what was measured, and what is removed. Plain data, readable JSON."""

from .plan import Plan, Removed
from .scores import Module, Scores

__all__ = ["Module", "Plan", "Removed", "Scores"]
