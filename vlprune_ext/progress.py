"""The type of progress callbacks."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]  # units of work done, in total, name of the current step
