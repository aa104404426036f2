"""`Sample`, the common form of all data sources: an unopened image with its texts and its class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

Prompts = dict[str, list[str]]  # class name -> its prompts


@dataclass
class Sample:
    """One image before preprocessing.

    Parameters
    ----------
    open : callable () -> PIL.Image
        Opens the image.
    texts : list of str
        Its captions or answers.
    label : str, optional
        Its class.
    question : str
        The question that the texts answer.
    """

    open: Callable[[], Image.Image]
    texts: list[str]
    label: str | None = None
    question: str = ""
