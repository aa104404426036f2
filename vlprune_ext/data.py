"""Image-text data as model inputs: ``load_data`` reads, ``Data`` is what everything else consumes."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, PreTrainedTokenizerBase
from transformers.image_processing_base import ImageProcessingMixin

from vlprune_ext import zoo
from vlprune_ext.zoo.digit_scenes import (
    COLOURS,
    PLAIN_KINDS,
    POSITIONS,
    SINGLES,
    SPLITS,
    DigitScenes,
    Question,
    describe,
)

IGNORED = -100  # a label that no loss counts
DIGITS = "digits"
DIGITS_CLASSES = "digits-classes"
DIGITS_QUESTIONS = "digits-questions"

_DEFAULT_SCENES = 1000
_CHUNK = 64  # images or texts handed to a processor at once


# --- what everything else consumes -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Classes:
    """Class prompts for zero-shot classification; several prompts may stand for one class.

    texts            dict of [P, S]  input_ids, attention_mask; empty for a model without a text side
    class_of_prompt  [P] int64       which class each prompt describes
    names            list of str     one name a class
    """

    texts: dict[str, Tensor]
    class_of_prompt: Tensor
    names: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def to(self, device: torch.device | str) -> Classes:
        """The same on another device."""
        return replace(self, texts=_moved(self.texts, device), class_of_prompt=self.class_of_prompt.to(device))


@dataclass(frozen=True, eq=False)
class Data:
    """Images, the texts that belong to them, and optionally classes, as tensors a model takes.

    name, split    str                   where they came from
    images         dict of [I * c, ...]  processor outputs, e.g. pixel_values [I, 3, H, W]; image i owns the c rows from
                                         i * c on (c is 1 for most processors). Empty for a text-only model
    texts          dict of [T, S]        input_ids, attention_mask and, for a model that generates, labels (-100 = not
                                         scored). Empty for a vision-only model
    image_of_text  [T] int64             the image each text belongs to; every image has at least one
    classes        Classes or None       prompts for zero-shot classification
    labels         [I] int64 or None     the class of each image

    Without texts, T = I and ``image_of_text`` counts the images. Raises ValueError if the tensors do not fit together.
    """

    name: str
    split: str
    images: dict[str, Tensor]
    texts: dict[str, Tensor]
    image_of_text: Tensor
    classes: Classes | None = None
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        owner = self.image_of_text
        if owner.ndim != 1 or owner.dtype != torch.int64 or not len(owner):
            raise ValueError(f"image_of_text is {owner.dtype} {list(owner.shape)}, expected int64 [T] with T >= 1")
        if owner.min() < 0 or len(torch.unique(owner)) != self.n_images:
            raise ValueError("image_of_text skips an image, expected every image from 0 on to have a text")
        for key, value in self.texts.items():
            if len(value) != len(self):
                raise ValueError(f"texts[{key!r}] has {len(value)} rows, expected {len(self)} as in image_of_text")
        for key, value in self.images.items():
            if not len(value) or len(value) % self.n_images:
                raise ValueError(
                    f"images[{key!r}] has {len(value)} rows, expected a multiple of {self.n_images} images"
                )
        if self.labels is not None and self.labels.shape != (self.n_images,):
            raise ValueError(f"labels is {list(self.labels.shape)}, expected [{self.n_images}], one class an image")

    def __len__(self) -> int:
        return len(self.image_of_text)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{k} {list(v.shape)}" for k, v in {**self.images, **self.texts}.items())
        classes = f", {len(self.classes)} classes" if self.classes is not None else ""
        return f"Data({self.name!r}, {self.split!r}: {self.n_images} images, {len(self)} texts{classes}; {shapes})"

    @cached_property
    def n_images(self) -> int:
        """How many images (for a text-only model: how many groups of texts)."""
        return int(self.image_of_text.max()) + 1

    @cached_property
    def hash(self) -> str:
        """sha256 over every tensor and class name; the same on any device, and without name and split."""
        digest = hashlib.sha256()
        parts: dict[str, Tensor | None] = {"image_of_text": self.image_of_text, "labels": self.labels}
        parts |= {f"images.{key}": value for key, value in self.images.items()}
        parts |= {f"texts.{key}": value for key, value in self.texts.items()}
        if self.classes is not None:
            digest.update(json.dumps(self.classes.names).encode())
            parts["class_of_prompt"] = self.classes.class_of_prompt
            parts |= {f"classes.{key}": value for key, value in self.classes.texts.items()}
        for key, value in sorted(parts.items()):
            if value is not None:
                digest.update(f"{key} {value.dtype} {list(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def subset(self, images: int | Sequence[int] | Tensor) -> Data:
        """Some images with all their texts, in the order given, renumbered from 0.

        images  int: the first so many; or the indices [K] int64; or a mask [I] bool. Raises ValueError if empty, out of
                range or repeated.
        """
        if isinstance(images, int):
            if not 1 <= images <= self.n_images:
                raise ValueError(f"subset of {images} images, expected 1 to {self.n_images}")
            images = range(images)
        device = self.image_of_text.device
        index = torch.as_tensor(images, device=device)
        if index.dtype == torch.bool:
            if index.shape != (self.n_images,):
                raise ValueError(f"the mask of a subset is {list(index.shape)}, expected [{self.n_images}]")
            index = index.nonzero().flatten()
        index = index.long()
        if index.ndim != 1 or not len(index):
            raise ValueError(f"the indices of a subset are {list(index.shape)}, expected [K] with K >= 1")
        if index.min() < 0 or index.max() >= self.n_images:
            raise ValueError(
                f"the indices of a subset reach {int(index.min())}..{int(index.max())}, expected 0..{self.n_images - 1}"
            )
        if len(torch.unique(index)) != len(index):
            raise ValueError("the indices of a subset name an image twice, expected each at most once")
        rows, owner = self.texts_of(index)
        return replace(
            self,
            images={key: self._image_rows(value, index) for key, value in self.images.items()},
            texts={key: value[rows] for key, value in self.texts.items()},
            image_of_text=owner,
            labels=None if self.labels is None else self.labels[index],
        )

    def texts_of(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(the texts [K] int64 of some images [n] int64, image by image; the position [K] in ``images`` of each one's).

        Texts of one image keep their order.
        """
        device = self.image_of_text.device
        place = torch.full((self.n_images,), -1, device=device)  # [I], where an image goes
        place[images.to(device)] = torch.arange(len(images), device=device)
        owner = place[self.image_of_text]  # [T]
        order = torch.argsort(owner, stable=True)
        rows = order[owner[order] >= 0]
        return rows, owner[rows]

    def batch(self, text_index: int | slice | Sequence[int] | Tensor) -> dict[str, Tensor]:
        """The texts asked for and, row by row, the image of each: the keyword arguments of a model's forward.

        text_index  which of the T texts: [B] int64, a slice, or one int. An image comes once for each of its texts.
        """
        if isinstance(text_index, int):
            text_index = [text_index]
        if not isinstance(text_index, slice):
            text_index = torch.as_tensor(text_index, device=self.image_of_text.device)
        owner = self.image_of_text[text_index]
        return {
            **{key: value[text_index] for key, value in self.texts.items()},
            **{key: self._image_rows(value, owner) for key, value in self.images.items()},
        }

    def to(self, device: torch.device | str) -> Data:
        """The same on another device."""
        return replace(
            self,
            images=_moved(self.images, device),
            texts=_moved(self.texts, device),
            image_of_text=self.image_of_text.to(device),
            classes=None if self.classes is None else self.classes.to(device),
            labels=None if self.labels is None else self.labels.to(device),
        )

    def _image_rows(self, value: Tensor, index: Tensor) -> Tensor:
        each = len(value) // self.n_images
        return value[index] if each == 1 else value.unflatten(0, (self.n_images, each))[index].flatten(0, 1)


def _moved(tensors: dict[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in tensors.items()}


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass
class _Record:
    """One image before processing: how to open it, its texts, its class."""

    open: Callable[[], Image.Image]
    texts: list[str]
    label: str | None = None
    question: str = ""  # what the texts answer


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
        ``"digits"``: DigitScenes, scenes of one to four digits with a caption each, all captions different.
        ``"digits-classes"``: scenes of one digit with the ten digits as classes, one prompt for every colour and place;
        at most 320, at which every colour, digit and place occurs once.
        ``"digits-questions"``: scenes with a question each ("what digit is top left ?") and its answer of one word, for
        a model with an image token.
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
    digits = source in (DIGITS, DIGITS_CLASSES, DIGITS_QUESTIONS)
    if digits:
        records, prompts = _digit_records(str(source), split, limit, seed)
        name = str(source)
    else:
        path = Path(source)
        records, prompts = _jsonl_records(path, split, limit, seed, templates)
        name = path.name
    prepare = _Preparer(model, processor, fallback=zoo.path("clip-digits") if digits and model is None else None)
    return prepare(name, split, records, prompts)


def _digit_records(
    source: str, split: str, limit: int | None, seed: int
) -> tuple[list[_Record], dict[str, list[str]] | None]:
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
        _Record(
            open=lambda image=scene.image: Image.fromarray(image),  # type: ignore[misc]
            texts=[question.answer if question else scene.caption],
            label=None if prompts is None else str(scene.objects[0].digit),
            question=question.text if question else "",
        )
        for scene, question in zip(scenes, questions or [None] * len(scenes), strict=True)
    ]
    return records, prompts


def _jsonl_records(
    path: Path, split: str, limit: int | None, seed: int, templates: Sequence[str]
) -> tuple[list[_Record], dict[str, list[str]] | None]:
    if not path.exists():
        raise FileNotFoundError(f"no file {path}; give a JSONL file, {DIGITS!r} or {DIGITS_CLASSES!r}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a JSONL file")
    lines = _read_jsonl(path)
    if not lines:
        raise ValueError(f"{path} is empty, expected a line for each image")
    for key in ("label", "split"):
        missing = [where for where, entry in lines if key not in entry]
        if 0 < len(missing) < len(lines):
            raise ValueError(f"{missing[0]}: no {key!r}, which other lines have; expected it on every line or on none")
    if "split" in lines[0][1]:
        known = sorted({entry["split"] for _, entry in lines})
        lines = [(where, entry) for where, entry in lines if entry["split"] == split]
        if not lines:
            raise ValueError(f"split is {split!r}, but {path} has {', '.join(known)}")
    elif split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)} for {path}, whose lines name none")

    merged: dict[Path, _Record] = {}
    for where, entry in lines:
        image = path.parent / entry["image"]
        texts = [entry["text"]] if isinstance(entry["text"], str) else entry["text"]
        if image in merged:
            if merged[image].label != entry.get("label"):
                raise ValueError(f"{where}: {image} has another label here than on an earlier line")
            merged[image].texts.extend(texts)
        else:
            merged[image] = _Record(_opener(image, where), list(texts), entry.get("label"))
    records = list(merged.values())
    if limit is not None and limit < len(records):
        chosen = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed))[:limit]
        records = [records[i] for i in chosen.sort().values.tolist()]
    if "label" not in lines[0][1]:
        return records, None
    # Every class of the split, also those that the limit left without an image: the task stays the same.
    names = sorted({entry["label"] for _, entry in lines})
    return records, {name: [template.format(name) for template in templates] for name in names}


def _read_jsonl(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Every line with its place ("file, line 3") and checked types; blank lines are skipped."""
    lines = []
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}, line {number}"
            if not raw.strip():
                continue
            try:
                entry = json.loads(raw.decode("utf-8-sig"))
            except ValueError as error:  # also UnicodeDecodeError
                raise ValueError(f"{where}: not JSON ({error})") from None
            if not isinstance(entry, dict):
                raise ValueError(f"{where}: a {type(entry).__name__}, expected an object with 'image' and 'text'")
            for key in ("image", "text"):
                if key not in entry:
                    raise ValueError(f"{where}: no {key!r}, expected 'image' and 'text'")
            for key in ("image", "label", "split"):
                if key in entry and not (isinstance(entry[key], str) and entry[key]):
                    raise ValueError(f"{where}: {key!r} is {entry[key]!r}, expected a non-empty string")
            text = entry["text"]
            texts = [text] if isinstance(text, str) else text
            if not (isinstance(texts, list) and texts and all(isinstance(t, str) and t.strip() for t in texts)):
                raise ValueError(f"{where}: 'text' is {text!r}, expected a non-empty string or a list of them")
            lines.append((where, entry))
    return lines


def _opener(image: Path, where: str) -> Callable[[], Image.Image]:
    def open_image() -> Image.Image:
        if not image.is_file():
            raise FileNotFoundError(f"{where}: no image {image}")
        try:
            with Image.open(image) as opened:
                return opened.convert("RGB")
        except Exception as error:  # Pillow raises many kinds, none of which names the line
            raise ValueError(f"{where}: {image} is not an image that can be read ({error})") from None

    return open_image


# --- making model inputs ---------------------------------------------------------------------------------------------


class _Preparer:
    """Turns records into ``Data`` for one model: knows its processor and which inputs its forward takes."""

    def __init__(self, model: Any, processor: Any, fallback: Path | None) -> None:
        if processor is None:
            processor = _find_processor(model, fallback)
        self.processor = processor
        self.tokenizer: Any = getattr(processor, "tokenizer", None)
        self.image_processor: Any = getattr(processor, "image_processor", None)
        if isinstance(processor, PreTrainedTokenizerBase):
            self.tokenizer = processor
        elif isinstance(processor, ImageProcessingMixin):
            self.image_processor = processor
        if self.tokenizer is None and self.image_processor is None:
            raise ValueError(
                f"processor is a {type(processor).__name__}, expected a processor, tokenizer or image processor"
            )

        self.accepts: set[str] | None = None
        if model is not None:
            self.accepts = set(inspect.signature(model.forward).parameters)
            for key, part, what in (
                ("pixel_values", self.image_processor, "image processor"),
                ("input_ids", self.tokenizer, "tokenizer"),
            ):
                if key in self.accepts and part is None:
                    raise ValueError(f"{type(model).__name__} takes {key}, but the processor has no {what}")
        self.has_images = self.image_processor is not None and self._taken("pixel_values")
        self.has_texts = self.tokenizer is not None and self._taken("input_ids")
        if not (self.has_images or self.has_texts):
            raise ValueError(f"{type(model).__name__} takes neither pixel_values nor input_ids")

        token = getattr(processor, "image_token", None)
        self.image_token = str(token) if token and self.has_images and self.has_texts else ""
        # Processors whose placeholder is wrapped: Gemma3 writes the wrapping itself, Qwen-VL expects it in the text.
        start, end = (getattr(processor, f"vision_{side}_token", "") for side in ("start", "end"))
        self.image_prefix = f"{start or ''}{self.image_token}{end or ''}"
        self.adds_image = hasattr(processor, "num_query_tokens")  # BLIP-2's: its texts are to have no placeholder
        self.scored = bool(self.image_token) or (model is not None and getattr(model, "can_generate", lambda: False)())
        config = getattr(model, "config", None)
        text_config: Any = getattr(config, "text_config", config)
        # Of an encoder-decoder such as T5, the decoder reads this token and then the labels.
        seq2seq = self.scored and getattr(text_config, "is_encoder_decoder", False)
        self.decoder_start: int | None = text_config.decoder_start_token_id if seq2seq else None
        if seq2seq and self.decoder_start is None:
            raise ValueError(
                f"{type(model).__name__}: its config has no decoder_start_token_id, which labels begin with"
            )
        self.max_length = min(
            getattr(self.tokenizer, "model_max_length", None) or 10**9,
            getattr(text_config, "max_position_embeddings", None) or 10**9,
        )
        # SigLIP pools the last position and was trained with every text padded to full length, without a mask.
        kind = getattr(config, "model_type", type(processor).__name__)
        self.full_length = str(kind).lower().startswith("siglip")

    def _taken(self, key: str) -> bool:
        return self.accepts is None or key in self.accepts

    def __call__(self, name: str, split: str, records: Sequence[_Record], prompts: dict[str, list[str]] | None) -> Data:
        owner = [i for i, record in enumerate(records) for _ in record.texts]
        texts = [text for record in records for text in record.texts]
        images: dict[str, Tensor] = {}
        rows: dict[str, Tensor] = {}
        if any(record.question for record in records) and (not self.image_token or self.decoder_start is not None):
            raise ValueError(
                f"{name} asks questions, expected a model that reads an image token and goes on from there"
            )
        if self.image_token:
            images, rows = self._images_with_texts(records)
        else:
            if self.has_images:
                images = self._images(records)
            if self.has_texts:
                rows = self._texts(texts, scored=self.scored)
        if not self.has_texts:
            owner = list(range(len(records)))
        classes = labels = None
        if prompts is not None:
            names = list(prompts)
            labels = torch.tensor([names.index(str(record.label)) for record in records])
            if not self.has_texts:
                classes = Classes({}, torch.arange(len(names)), names)
            elif not self.image_token and self.has_images:
                of_prompt = [i for i, name in enumerate(names) for _ in prompts[name]]
                every = [prompt for name in names for prompt in prompts[name]]
                classes = Classes(self._texts(every), torch.tensor(of_prompt), names)
        return Data(name, split, images, rows, torch.tensor(owner), classes, labels)

    def _images(self, records: Sequence[_Record]) -> dict[str, Tensor]:
        outputs = []
        for chunk in _chunks(records):
            output = self.image_processor(images=[record.open() for record in chunk], return_tensors="pt")
            outputs.append({key: value for key, value in output.items() if self._is_input(key, value)})
        return _concatenated(outputs, len(records))

    def _texts(self, texts: Sequence[str], scored: bool = False) -> dict[str, Tensor]:
        limits = {"truncation": True, "max_length": self.max_length} if self.max_length < 10**6 else {}
        if self.full_length:
            limits["padding"] = "max_length"
        output = self.tokenizer(list(texts), **limits)
        rows = [
            {key: torch.tensor(value[i]) for key, value in output.items() if self._is_input(key)}
            for i in range(len(texts))
        ]
        for row in rows:
            row.setdefault("attention_mask", torch.ones_like(row["input_ids"]))
            if self.full_length:
                row["attention_mask"].fill_(1)
            if scored and self.decoder_start is not None:
                row["labels"] = self._decoder_labels(row["input_ids"])
        return self._padded(rows, scored)

    def _images_with_texts(self, records: Sequence[_Record]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One call of the processor a text, since how often it repeats the image token depends on the image."""
        images, rows = [], []
        for record in records:
            image = record.open()
            for at, text in enumerate(record.texts):
                prompt, token, answer = text.rpartition(self.image_token)
                if self.decoder_start is not None:  # the encoder reads the image, the decoder the text
                    text = prompt + token
                if self.adds_image:
                    text = text.replace(self.image_token, "")
                elif self.image_token not in text:
                    text = self.image_prefix + (f"{record.question} {text}" if record.question else text)
                output = self.processor(images=[image], text=[text], return_tensors="pt")
                ids = output["input_ids"]
                aligned = {k for k, v in output.items() if isinstance(v, Tensor) and v.shape == ids.shape}
                aligned |= {k for k in output if k.startswith("qformer_")}  # the text in the Q-Former's own tokens
                rows.append({key: output[key][0] for key in aligned if self._is_input(key)})
                if record.question:
                    rows[-1]["labels"] = self._answer_labels(rows[-1], record.texts[at])
                if self.decoder_start is not None:
                    rows[-1]["labels"] = self._decoder_labels(torch.tensor(self.tokenizer(answer)["input_ids"]))
                if at == 0:
                    images.append({k: v for k, v in output.items() if k not in aligned and self._is_input(k, v)})
        return _concatenated(images, len(records)), self._padded(rows, scored=True)

    def _is_input(self, key: str, value: Any = None) -> bool:
        always = key in ("input_ids", "attention_mask", "pixel_values")
        return (always or self._taken(key)) and (value is None or isinstance(value, Tensor))

    def _padded(self, rows: list[dict[str, Tensor]], scored: bool) -> dict[str, Tensor]:
        """Rows of different lengths as [T, S], padded on the right; with labels if ``scored``."""
        tokenizer = self.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        fill = {"input_ids": 0 if pad is None else pad, "labels": IGNORED}
        if scored:
            for row in rows:
                row.setdefault("labels", self._labels(row))
        return {
            key: torch.nn.utils.rnn.pad_sequence(
                [row[key] for row in rows], batch_first=True, padding_value=fill.get(key, 0)
            )
            for key in rows[0]
        }

    def _decoder_labels(self, ids: Tensor) -> Tensor:
        return torch.cat([ids.new_tensor([self.decoder_start]), ids])

    def _answer_labels(self, row: dict[str, Tensor], answer: str) -> Tensor:
        """The ids of the answer, at the end of the text, and EOS where the tokenizer puts it there."""
        labels = self._labels(row)
        words = len(self.tokenizer(answer, add_special_tokens=False)["input_ids"])
        ends = bool(labels[-1] == self.tokenizer.eos_token_id)
        labels[: len(labels) - words - ends] = IGNORED
        return labels

    def _labels(self, row: dict[str, Tensor]) -> Tensor:
        """The ids after the image, EOS included; other special tokens and what is not attended do not count."""
        ids = row["input_ids"]
        special = torch.tensor([i for i in self.tokenizer.all_special_ids if i != self.tokenizer.eos_token_id])
        ignored = (row["attention_mask"] == 0) | torch.isin(ids, special)
        if self.image_token:
            image_id = getattr(self.processor, "image_token_id", None)
            if image_id is None:
                image_id = self.tokenizer.convert_tokens_to_ids(self.image_token)
            places = (ids == image_id).nonzero()
            if len(places):
                ignored[: int(places.max()) + 1] = True
        return ids.masked_fill(ignored, IGNORED)


def _find_processor(model: Any, fallback: Path | None) -> Any:
    where = fallback if fallback is not None else getattr(model, "name_or_path", None)
    if not where:
        whose = "no model or processor was given" if model is None else "the model was not loaded from a folder"
        raise ValueError(f"{whose}, so its processor cannot be found; expected processor=")
    try:
        return AutoProcessor.from_pretrained(where, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"no processor could be loaded from {where} ({reason}); expected processor=") from error


def _chunks(records: Sequence[_Record]) -> Iterable[Sequence[_Record]]:
    return (records[start : start + _CHUNK] for start in range(0, len(records), _CHUNK))


def _concatenated(outputs: list[dict[str, Tensor]], n_images: int) -> dict[str, Tensor]:
    """Processor outputs as one tensor a key; every image must give the same shape."""
    joined = {}
    for key in outputs[0]:
        values = [output[key] for output in outputs]
        if len({value.shape[1:] for value in values}) > 1:
            shapes = ", ".join(sorted({str(list(value.shape[1:])) for value in values})[:3])
            raise ValueError(f"the processor gives {key} of different shapes ({shapes}), expected one size of image")
        joined[key] = torch.cat(values)
        counts = {len(value) for value in values}
        if len(joined[key]) % n_images or (len(values) == n_images and len(counts) > 1):
            raise ValueError(f"the processor gives {key} of uneven length ({counts} rows), expected one size of image")
    return joined
