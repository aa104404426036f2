"""Images, texts and classes as the tensors a model takes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


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

    @property
    def origin(self) -> dict[str, Any]:
        """Where the data came from, for records: name, split, hash, and how many images."""
        return {"name": self.name, "split": self.split, "hash": self.hash, "images": self.n_images}

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
