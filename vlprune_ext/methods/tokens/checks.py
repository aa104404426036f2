"""Checks of the token methods' fields."""

from __future__ import annotations


def expect_share(name: str, value: float) -> None:
    """Raise ValueError unless 0 < value <= 1; ``name`` is the field's, for the message."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"{name} is {value!r}; expected a share 0 < {name} <= 1")


def expect_part(name: str, value: float) -> None:
    """Raise ValueError unless 0 <= value <= 1; ``name`` is the field's, for the message."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{name} is {value!r}; expected a share 0 <= {name} <= 1")


def expect_whole(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is an int; ``name`` is the field's, for the message."""
    if type(value) is not int:
        raise ValueError(f"{name} is {value!r}; expected a whole number")
