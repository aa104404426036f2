"""`load_data`: from the name of a source to model inputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import zoo
from .digits import read_digits
from .jsonl import read_jsonl
from .prepare import Preparer
from .sources import DIGITS, DIGITS_QUESTIONS, SOURCES
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
    """Read images and texts and preprocess them into the inputs of ``model``.

    Parameters
    ----------
    source : str or Path
        ``"digits"``: DigitScenes, scenes of one to four digits with a caption each, all captions different; for a model
        that only answers questions, "digits-questions" instead.
        ``"digits-classes"``: scenes of one digit with the ten digits as classes, one prompt for every colour and
        position; at most 320, at which every colour, digit and position occurs once.
        ``"digits-questions"``: scenes with a question each ("what digit is top left ?") and its one-word answer, for a
        model with an image token or a visual question answering model (``BlipForQuestionAnswering``).
        Otherwise a JSONL file; each line is ``{"image": path, "text": str or [str, ...]}`` and, on every line or on
        none, ``"label"``: a class name, and ``"split"``. Paths are relative to the file. Lines with the same image
        become one image with several texts.
    split : str
        One of train, calibration, validation, test for the digits; a value of ``"split"`` for a JSONL file that has it.
        A file without it is read whole.
    model : PreTrainedModel, optional
        The processor is loaded from its folder (``model.name_or_path``), and the signature of its forward decides
        whether images, texts or both are prepared. Remote code is never run.
    processor : optional
        A processor, tokenizer or image processor, in place of the model's own. With neither, digits are prepared for
        the shipped ``clip-digits``.
    limit : int, optional
        Number of images. Digits: 1,000 (classes: 320) by default. JSONL: all by default; else a random subset by
        ``seed``, in the file's order.
    seed : int
        Seed of the scenes, or of the subset.
    templates : sequence of str
        Prompts of a JSONL file's classes, as format strings of the class name.

    Returns
    -------
    Data
        For a processor with an image token (LLaVA and similar) the token is prepended to every text that has none, and
        labels cover what comes after it; for other generative models, labels cover the text. For an encoder-decoder
        such as T5, labels begin with the decoder start token; with images, the encoder gets what precedes the text: the
        image, and a prompt where the text has one before an image token. For ``BlipForQuestionAnswering`` the encoder
        gets the question, an empty one if the source has none.

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
            raise FileNotFoundError(f"no file {path}; expected a JSONL file or one of {', '.join(SOURCES)}")
        if path.is_dir():
            raise ValueError(f"{path} is a folder, expected a JSONL file")
        records, prompts = read_jsonl(path, split, limit, seed, templates)
        name = path.name
    return prepare(name, split, records, prompts)
