"""`Data`: images, texts and classes as model inputs."""

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
    """Class prompts for zero-shot classification; a class may have several prompts.

    Parameters
    ----------
    texts : dict of Tensor [P, S], int64
        ``input_ids`` and ``attention_mask``; empty for a vision-only model.
    class_of_prompt : Tensor [P], int64
        Class of each prompt.
    names : list of str
        Class names.
    """

    texts: dict[str, Tensor]
    class_of_prompt: Tensor
    names: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def to(self, device: torch.device | str) -> Classes:
        """Return the classes on another device."""
        return replace(self, texts=_moved(self.texts, device), class_of_prompt=self.class_of_prompt.to(device))


@dataclass(frozen=True, eq=False)
class Data:
    """Images, their texts and optionally classes, as model inputs.

    I is the number of images, T that of texts; without texts, T = I and ``image_of_text`` is 0, 1, ...

    Parameters
    ----------
    name, split : str
        Source and split.
    images : dict of Tensor [I * c, ...]
        Processor outputs, e.g. ``pixel_values`` [I, 3, H, W]; image i owns the c rows from i * c on (c is 1 for most
        processors). Empty for a text-only model.
    texts : dict of Tensor [T, S]
        ``input_ids``, ``attention_mask`` and, for a generative model, ``labels`` (-100 = ignored). Empty for a
        vision-only model.
    image_of_text : Tensor [T], int64
        The image of each text; every image has at least one.
    classes : Classes, optional
        Prompts for zero-shot classification.
    labels : Tensor [I], int64, optional
        The class of each image.

    Raises
    ------
    ValueError
        Tensors that do not fit together.
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
        """Name, split, hash and number of images, for records."""
        return {"name": self.name, "split": self.split, "hash": self.hash, "images": self.n_images}

    def __len__(self) -> int:
        return len(self.image_of_text)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{k} {list(v.shape)}" for k, v in {**self.images, **self.texts}.items())
        classes = f", {len(self.classes)} classes" if self.classes is not None else ""
        return f"Data({self.name!r}, {self.split!r}: {self.n_images} images, {len(self)} texts{classes}; {shapes})"

    @cached_property
    def n_images(self) -> int:
        """Number of images (for a text-only model: of groups of texts)."""
        return int(self.image_of_text.max()) + 1

    @cached_property
    def hash(self) -> str:
        """SHA-256 over every tensor and class name; independent of device, name and split."""
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
        """Return some images with all their texts, in the order given, renumbered from 0.

        Parameters
        ----------
        images : int, sequence of int, or Tensor
            The first so many, indices [K] int64, or a mask [I] bool.

        Raises
        ------
        ValueError
            No image, an index out of range or repeated.
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
        """Return the texts of some images, image by image; texts of one image keep their order.

        Parameters
        ----------
        images : Tensor [n], int64
            Indices of images.

        Returns
        -------
        texts : Tensor [K], int64
            Indices of texts.
        position : Tensor [K], int64
            Index into ``images`` of each text's image.
        """
        device = self.image_of_text.device
        place = torch.full((self.n_images,), -1, device=device)  # [I], where an image goes
        place[images.to(device)] = torch.arange(len(images), device=device)
        owner = place[self.image_of_text]  # [T]
        order = torch.argsort(owner, stable=True)
        rows = order[owner[order] >= 0]
        return rows, owner[rows]

    def batch(self, text_index: int | slice | Sequence[int] | Tensor) -> dict[str, Tensor]:
        """Return the selected texts and, row by row, the image of each: keyword arguments of a model's forward.

        Parameters
        ----------
        text_index : int, slice, sequence of int, or Tensor [B], int64
            Indices of texts. An image is repeated for each of its texts.
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
        """Return the data on another device."""
        return replace(
            self,
            images=_moved(self.images, device),
            texts=_moved(self.texts, device),
            image_of_text=self.image_of_text.to(device),
            classes=None if self.classes is None else self.classes.to(device),
            labels=None if self.labels is None else self.labels.to(device),
        )

    def _image_rows(self, value: Tensor, index: Tensor) -> Tensor:
        """Gather the rows of some images; each owns the same number of consecutive rows."""
        each = len(value) // self.n_images
        return value[index] if each == 1 else value.unflatten(0, (self.n_images, each))[index].flatten(0, 1)


def _moved(tensors: dict[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """Move all tensors to a device."""
    return {key: value.to(device) for key, value in tensors.items()}
