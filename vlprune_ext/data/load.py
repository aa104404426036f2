"""``load_data``: from the name of a source to the inputs of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import zoo
from .digits import read_digits
from .jsonl import read_jsonl
from .prepare import Preparer
from .sources import DIGITS, DIGITS_CLASSES, DIGITS_QUESTIONS, SOURCES
from .tensors import Data


def load_data(
    source: str | Path,
    split: str = "calibration",
    *,
    model: Any = None,
    processor: Any = None,
    limit: int | None = None,
    seed: int = 0,
    templates: Sequence[str] = ("a photo of a {}.",),
) -> Data:
    """Read images and texts and make them into what ``model`` takes.

    Parameters
    ----------
    source : str or Path
        ``"digits"``: DigitScenes, scenes of one to four digits with a caption each, all captions different; for a
        model that only answers questions, the next but one.
        ``"digits-classes"``: scenes of one digit with the ten digits as classes, one prompt for every colour and place;
        at most 320, at which every colour, digit and place occurs once.
        ``"digits-questions"``: scenes with a question each ("what digit is top left ?") and its answer of one word, for
        a model with an image token or one made for questions (``BlipForQuestionAnswering``).
        Otherwise a JSONL file; each line is ``{"image": path, "text": str or [str, ...]}`` and, on every line or on
        none, ``"label"``: a class name, and ``"split"``. Paths are relative to the file. Lines with the same image
        become one image with several texts.
    split : str
        One of train, calibration, validation, test for the digits; a value of ``"split"`` for a JSONL that has it. A
        JSONL without is used whole.
    model : PreTrainedModel, optional
        Its folder (``model.name_or_path``) gives the processor, and its forward decides whether images, texts or both
        are prepared. Remote code is never run.
    processor : optional
        A processor, tokenizer or image processor, instead of the model's own. With neither, digits are prepared for
        the shipped ``clip-digits``.
    limit : int, optional
        How many images. Digits: 1,000 (320) by default. JSONL: all by default; a random choice by ``seed``, in the
        file's order.
    seed : int
        Which scenes, or which choice.
    templates : sequence of str
        How a JSONL's class names become prompts.

    Returns
    -------
    Data
        For a processor with an image token (LLaVA and its kin) the token is put in front of every text that has none,
        and labels cover what comes after it; for other models that generate, labels cover the text. Of an
        encoder-decoder such as T5, labels begin with the token that starts the decoder; with images, its encoder is
        given what comes before the text: the image, and a prompt where the text has one in front of an image token.
        Of ``BlipForQuestionAnswering`` the encoder is given the question, an empty one where the source has none.

    Raises
    ------
    FileNotFoundError
        No such file; no such image (with the line).
    ValueError
        No data; an unknown split; a line that is not JSON, lacks a key or has a wrong type (with its number); a file
        that is not an image (with the line); no processor.
    """
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise ValueError(f"limit is {limit!r}, expected an int of at least 1 or None")
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed is {seed!r}, expected an int of 0 or more")
    digits = source in SOURCES
    prepare = Preparer(model, processor, fallback=zoo.path("clip-digits") if digits and model is None else None)
    if digits:
        if source == DIGITS and prepare.only_answers:
            source = DIGITS_QUESTIONS
        records, prompts = read_digits(str(source), split, limit, seed)
        name = str(source)
    else:
        path = Path(source)
        if not path.exists():
            raise FileNotFoundError(f"no file {path}; give a JSONL file, {DIGITS!r} or {DIGITS_CLASSES!r}")
        if path.is_dir():
            raise ValueError(f"{path} is a folder, expected a JSONL file")
        records, prompts = read_jsonl(path, split, limit, seed, templates)
        name = path.name
    return prepare(name, split, records, prompts)
