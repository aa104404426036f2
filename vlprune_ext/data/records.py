"""What every source gives: pictures that are still closed, each with its texts and its class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

Prompts = dict[str, list[str]]  # the name of a class -> its prompts


@dataclass
class Record:
    """One image before processing: how to open it, its texts, its class."""

    open: Callable[[], Image.Image]
    texts: list[str]
    label: str | None = None
    question: str = ""  # what the texts answer
