"""Built-in sources: digit scenes with captions, class labels or questions."""

from __future__ import annotations

from PIL import Image

from ..zoo.digit_scenes import COLOURS, PLAIN_KINDS, POSITIONS, SINGLES, DigitScenes, Question, describe
from .samples import Prompts, Sample
from .sources import DIGITS_CLASSES, DIGITS_QUESTIONS

_DEFAULT_SCENES = 1000


def read_digits(source: str, split: str, limit: int | None, seed: int) -> tuple[list[Sample], Prompts | None]:
    """Return the digit scenes of a built-in source as records.

    Parameters
    ----------
    source : str
        A key of `SOURCES`.
    split : str
        One of `zoo.digit_scenes.SPLITS`.
    limit : int or None
        Number of scenes; None: the source's default.
    seed : int
        Seed of the scenes.

    Returns
    -------
    records : list of Sample
    prompts : dict of list of str, or None
        Class name -> prompts, where the digits are classes.
    """
    questions: list[Question | None] = []
    if source != DIGITS_CLASSES:
        scenes = DigitScenes(split, limit or _DEFAULT_SCENES, seed)
        prompts = None
        if source == DIGITS_QUESTIONS:
            questions = [*scenes.asked(seed, PLAIN_KINDS)]
    else:
        scenes = DigitScenes(split, limit or SINGLES, seed, objects=(1,))
        prompts = {
            str(digit): [describe(c, digit, p) for c in range(len(COLOURS)) for p in range(len(POSITIONS))]
            for digit in range(10)
        }
    records = [
        Sample(
            open=lambda image=scene.image: Image.fromarray(image),  # type: ignore[misc]
            texts=[question.answer if question else scene.caption],
            label=None if prompts is None else str(scene.objects[0].digit),
            question=question.text if question else "",
        )
        for scene, question in zip(scenes, questions or [None] * len(scenes), strict=True)
    ]
    return records, prompts
