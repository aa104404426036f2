"""DigitScenes: coloured real handwritten digits on a 2 x 2 grid, with captions and questions about what is where.

The digits are the 1,797 8 x 8 images of the UCI "Optical Recognition of Handwritten Digits" test set (CC BY 4.0), the
same that scikit-learn ships as ``load_digits``; ``digits.safetensors`` beside this file holds them as uint8. They are
divided among the splits *before* any scene is composed, so a digit seen in one split never appears in another.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

SPLITS = ("train", "calibration", "validation", "test")
POSITIONS = ("top left", "top right", "bottom left", "bottom right")
COLOURS = {
    "red": (230, 40, 40),
    "orange": (240, 140, 30),
    "yellow": (235, 225, 50),
    "green": (50, 190, 60),
    "cyan": (50, 200, 220),
    "blue": (50, 80, 235),
    "purple": (160, 60, 210),
    "white": (235, 235, 235),
}
IMAGE_SIZE = 48
CELL = IMAGE_SIZE // 2
SIZES = (20, 22)  # side of a placed digit in pixels
SINGLES = len(COLOURS) * 10 * len(POSITIONS)  # number of different captions of one object

# How often a kind of question is asked, relative to the other kinds that a scene allows.
QUESTION_SHARES = {"digit": 0.40, "colour": 0.15, "digit by colour": 0.20, "colour by digit": 0.15, "count": 0.10}
PLAIN_KINDS = ("digit", "colour", "count")  # of positions and of the whole scene; the others need a search

_SHARE = {"train": 0.70, "calibration": 0.10, "validation": 0.10, "test": 0.10}
_SPLIT_SEED = 20240711
_NAMES = tuple(COLOURS)
_RGB = np.array(list(COLOURS.values()), dtype=np.float32)  # [C, 3]


@dataclass(frozen=True)
class Object:
    """One digit in a scene.

    Parameters
    ----------
    position : int
        Index into ``POSITIONS``.
    colour : int
        Index into ``COLOURS``.
    digit : int
        0 to 9.
    source : int
        Index of its image among the 1,797.
    """

    position: int
    colour: int
    digit: int
    source: int

    @property
    def phrase(self) -> str:
        """E.g. ``"a red 3 top left"``."""
        return describe(self.colour, self.digit, self.position)


@dataclass(frozen=True)
class Question:
    """One question about a scene.

    Parameters
    ----------
    text : str
        The question.
    answer : str
        Its only right answer, one word.
    kind : str
        A key of ``QUESTION_SHARES``.
    """

    text: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Scene:
    """One image and the digits in it.

    Parameters
    ----------
    image : array [48, 48, 3], uint8
        RGB.
    objects : tuple of 1 to 4 Object
        In reading order.
    """

    image: np.ndarray
    objects: tuple[Object, ...]

    @property
    def caption(self) -> str:
        """E.g. ``"a red 3 top left, a blue 7 bottom right"``."""
        return ", ".join(o.phrase for o in self.objects)

    @functools.cached_property
    def questions(self) -> tuple[Question, ...]:
        """All questions about the scene.

        Digit and colour of every position ("none" where it is empty), the digit of every colour and the colour of every
        digit that occur once, and the number of digits.
        """
        at = {o.position: o for o in self.objects}
        colours, shown = Counter(o.colour for o in self.objects), Counter(o.digit for o in self.objects)
        asked = []
        for position, place in enumerate(POSITIONS):
            o = at.get(position)
            asked.append(Question(f"what digit is {place} ?", str(o.digit) if o else "none", "digit"))
            asked.append(Question(f"what colour is {place} ?", _NAMES[o.colour] if o else "none", "colour"))
        for o in self.objects:
            if colours[o.colour] == 1:
                asked.append(Question(f"what digit is {_NAMES[o.colour]} ?", str(o.digit), "digit by colour"))
            if shown[o.digit] == 1:
                asked.append(Question(f"what colour is the {o.digit} ?", _NAMES[o.colour], "colour by digit"))
        asked.append(Question("how many digits are there ?", str(len(self.objects)), "count"))
        return tuple(asked)


def describe(colour: int, digit: int, position: int) -> str:
    """Return the phrase for one object, from indices into ``COLOURS``, the ten digits and ``POSITIONS``."""
    name = _NAMES[colour]
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name} {digit} {POSITIONS[position]}"


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Return all digit images [1797, 8, 8] uint8 (0 to 16) and their classes [1797] uint8."""
    stored = load_file(Path(__file__).with_name("digits.safetensors"))
    for array in stored.values():
        array.setflags(write=False)
    return stored["images"], stored["labels"]


@functools.cache
def split_indices(split: str) -> np.ndarray:
    """Return the digits [n] int64 of a split among the 1,797, ascending; the same ratio of each class."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    rng = np.random.default_rng(_SPLIT_SEED)
    labels = digits()[1]
    bounds = np.cumsum([_SHARE[name] for name in SPLITS])
    chosen = []
    for digit in range(10):
        members = rng.permutation(np.flatnonzero(labels == digit))
        edges = [0, *np.rint(bounds * len(members)).astype(int)]
        at = SPLITS.index(split)
        chosen.append(members[edges[at] : edges[at + 1]])
    return np.sort(np.concatenate(chosen))


@functools.cache
def _by_digit(split: str) -> tuple[np.ndarray, ...]:
    """Return the indices of a split's images for each of the ten digits."""
    indices = split_indices(split)
    labels = digits()[1][indices]
    return tuple(indices[labels == digit] for digit in range(10))


@functools.cache
def _enlarged(size: int) -> np.ndarray:
    """Return every digit upsampled linearly to ``size`` pixels: [1797, size, size] float32 in [0, 1]."""
    centre = np.clip((np.arange(size) + 0.5) * 8 / size - 0.5, 0, 7)
    low = np.minimum(centre.astype(int), 6)
    weight = np.zeros((size, 8), dtype=np.float32)
    weight[np.arange(size), low] = 1 - (centre - low)
    weight[np.arange(size), low + 1] = centre - low
    return np.einsum("yi,nij,xj->nyx", weight, digits()[0].astype(np.float32) / 16, weight, optimize=True)


def _paint(objects: Sequence[Object], rng: np.random.Generator) -> np.ndarray:
    """Render a scene [48, 48, 3] uint8 with random background, sizes, offsets, brightness and noise."""
    canvas = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), rng.uniform(0, 50), dtype=np.float32)
    for o in objects:
        size = SIZES[rng.integers(len(SIZES))]
        dy, dx = rng.integers(0, CELL - size + 1, 2)
        y, x = o.position // 2 * CELL + dy, o.position % 2 * CELL + dx
        colour = _RGB[o.colour] * rng.uniform(0.7, 1.0) + rng.integers(-15, 16, 3).astype(np.float32)
        patch = canvas[y : y + size, x : x + size]
        patch += _enlarged(size)[o.source][:, :, None] * (colour.astype(np.float32) - patch)
    canvas += rng.integers(-15, 16, canvas.shape, dtype=np.int8)
    return np.rint(np.clip(canvas, 0, 255)).astype(np.uint8)


class DigitScenes(Sequence[Scene]):
    """``n`` scenes of one to four digits, no two with the same caption.

    The same ``(split, seed, objects)`` gives the same scenes in the same order, and fewer scenes are the first of more.

    Parameters
    ----------
    split : {"train", "calibration", "validation", "test"}
        Which digit images are used; those of different splits are disjoint.
    n : int
        Number of scenes.
    seed : int
        Seed of the scenes' composition.
    objects : tuple of int
        Possible numbers of digits in a scene, equally likely. ``(1,)`` with n = 320 gives every colour, digit and
        position once.
    alike : int
        So many scenes in a row share positions and colours and differ in their digits alone: hard negatives for
        contrastive training, which otherwise learns digits poorly.

    Raises
    ------
    ValueError
        Unknown split, a negative seed, n below one, more scenes than there are different captions, or more alike than
        there are digits.
    """

    def __init__(
        self, split: str, n: int = 1000, seed: int = 0, objects: tuple[int, ...] = (1, 2, 3, 4), alike: int = 1
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
        if n < 1:
            raise ValueError(f"n is {n}, expected at least 1 scene")
        if seed < 0:
            raise ValueError(f"seed is {seed}, expected 0 or more")
        if not objects or not set(objects) <= {1, 2, 3, 4}:
            raise ValueError(f"objects is {objects!r}, expected numbers from 1 to 4")
        if set(objects) == {1} and n > SINGLES:
            raise ValueError(f"n is {n}, but only {SINGLES} scenes of one object have different captions")
        if not 1 <= alike <= 10:
            raise ValueError(f"alike is {alike}, expected 1 to 10")
        self.split, self.seed, self.objects, self.alike = split, seed, tuple(objects), alike
        self._scenes = tuple(self._compose(n))

    def _compose(self, n: int) -> Iterator[Scene]:
        """Yield the scenes, one random stream for all."""
        rng = np.random.default_rng([SPLITS.index(self.split), self.seed, *self.objects])
        pool = _by_digit(self.split)
        seen: set[tuple[tuple[int, int, int], ...]] = set()
        left = 0  # how many scenes are still to share positions and colours
        while len(seen) < n:
            if not left:
                count = self.objects[rng.integers(len(self.objects))]
                positions = sorted(rng.permutation(4)[:count].tolist())
                colours: list[int] = []
                left = self.alike
            placed = []
            for at, position in enumerate(positions):
                if at == len(colours):
                    colours.append(int(rng.integers(len(COLOURS))))
                colour, digit = colours[at], int(rng.integers(10))
                placed.append(Object(position, colour, digit, int(pool[digit][rng.integers(len(pool[digit]))])))
            what = tuple((o.position, o.colour, o.digit) for o in placed)
            left -= 1  # also for one already seen, so that positions and colours without new scenes come to an end
            if what not in seen:
                seen.add(what)
                yield Scene(_paint(placed, rng), tuple(placed))

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index):
        return self._scenes[index]

    @property
    def images(self) -> np.ndarray:
        """All images [n, 48, 48, 3] uint8."""
        return np.stack([scene.image for scene in self])

    @property
    def captions(self) -> list[str]:
        """One caption per scene, all different."""
        return [scene.caption for scene in self]

    @property
    def questions(self) -> list[tuple[Question, ...]]:
        """All questions of each scene."""
        return [scene.questions for scene in self]

    def asked(self, seed: int = 0, kinds: Sequence[str] = tuple(QUESTION_SHARES)) -> list[Question]:
        """Return one question per scene: a kind drawn by ``QUESTION_SHARES``, then any question of that kind.

        The questions of fewer scenes are the first of those of more.

        Parameters
        ----------
        seed : int
            Seed of the draws.
        kinds : sequence of str
            Keys of ``QUESTION_SHARES``; those of ``PLAIN_KINDS`` are in every scene.

        Raises
        ------
        ValueError
            A negative seed, or a scene without a question of these kinds.
        """
        if seed < 0:
            raise ValueError(f"seed is {seed}, expected 0 or more")
        rng = np.random.default_rng([SPLITS.index(self.split), self.seed, seed])
        chosen = []
        for scene in self:
            by_kind: dict[str, list[Question]] = {}
            for question in scene.questions:
                if question.kind in kinds:
                    by_kind.setdefault(question.kind, []).append(question)
            if not by_kind:
                raise ValueError(f"kinds is {kinds!r}, but the scene {scene.caption!r} has no such question")
            edges = np.cumsum([QUESTION_SHARES[kind] for kind in by_kind])
            kind = list(by_kind)[int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))]
            chosen.append(by_kind[kind][rng.integers(len(by_kind[kind]))])
        return chosen
