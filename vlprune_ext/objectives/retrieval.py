"""Objectives of dual encoders: recall@k, contrastive loss, margin, zero-shot accuracy."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..anatomy import Anatomy
from ..anatomy.patch import evaluation_mode
from ..data import Classes, Data
from ..ops import retrieval_rank
from .base import LOGIT_BYTES, Inputs, Objective, Part, batched


@dataclass(frozen=True)
class _Search:
    """One direction of retrieval.

    Parameters
    ----------
    query : Tensor [N, E]
        Normalised embeddings.
    gallery : Tensor [M, E]
        Normalised embeddings.
    positive : Tensor [N, P], int64
        Matching gallery items of each query, padded with -1.
    weight : Tensor [M], optional
        How many items each negative of the gallery represents; None: the gallery is complete.
    """

    query: Tensor
    gallery: Tensor
    positive: Tensor
    weight: Tensor | None = None


def _positives(owner: Tensor, n_images: int) -> Tensor:
    """Return the texts [I, P] int64 of every image, padded with -1, from the image [T] of each text."""
    counts = torch.bincount(owner, minlength=n_images)
    order = torch.sort(owner, stable=True).indices
    start = counts.cumsum(0) - counts
    table = torch.full((n_images, int(counts.max())), -1, dtype=torch.long, device=owner.device)
    column = torch.arange(len(owner), device=owner.device) - start[owner[order]]
    table[owner[order], column] = order
    return table


class _DualEncoder(Objective):
    """Base of objectives on embeddings of an image tower and a text tower, each computed without the other."""

    sees_cross_attention = False

    def towers(self, anatomy: Anatomy) -> tuple[str, ...]:
        if not anatomy.is_dual_encoder:
            raise ValueError(
                f"objective: {self.name!r} needs a model with an image and a text embedding, "
                f"{type(anatomy.model).__name__} has none; try 'lm_loss'"
            )
        return ("vision", "text")

    def _texts(self, data: Data) -> Inputs:
        """Return the inputs of the text tower, without labels; raise ValueError if the data has none."""
        if not data.texts:
            raise ValueError(f"data: {data.name} has no texts, objective {self.name!r} needs them")
        return {name: value for name, value in data.texts.items() if name != "labels"}

    def batches(self, anatomy: Anatomy, tower: str, data: Data, batch_size: int) -> list[Inputs]:
        self.towers(anatomy)
        inputs = data.images if tower == "vision" else self._texts(data)
        if not inputs:
            raise ValueError(f"data: {data.name} has no images, objective {self.name!r} needs them")
        trim = anatomy.tower(tower).trim
        device = anatomy.device
        return [
            trim({name: value.to(device) for name, value in batch.items()}) for batch in batched(inputs, batch_size)
        ]

    def outputs(self, anatomy: Anatomy, tower: str, inputs: Inputs) -> Tensor:
        """Return the L2-normalised embedding [B, E] of each row."""
        return F.normalize(anatomy.embed(tower, inputs), dim=-1)

    def other(self, anatomy: Anatomy, tower: str, data: Data, batch_size: int) -> Tensor:
        """Return the other tower's embeddings [M, E]."""
        return self.run(anatomy, "text" if tower == "vision" else "vision", data, batch_size)

    def sample_of_row(self, tower: str, data: Data) -> Tensor | None:
        return torch.arange(data.n_images) if tower == "vision" else data.image_of_text.cpu()

    def samples(self, data: Data, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, torch.arange(len(images))

    def _pair(self, tower: str, outputs: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """Return (image embeddings, text embeddings), whichever of the two towers was run."""
        return (outputs, other) if tower == "vision" else (other, outputs)

    @torch.no_grad()
    def _embeddings(self, anatomy: Anatomy, data: Data, batch_size: int) -> tuple[Tensor, Tensor]:
        """Return the embeddings of all images [I, E] and of all texts [T, E]."""
        self.towers(anatomy)
        with evaluation_mode(anatomy.model):
            image, text = (self.run(anatomy, tower, data, batch_size) for tower in ("vision", "text"))
            return image, text


class _Ranking(_DualEncoder):
    """Base of objectives on image-to-text and text-to-image retrieval."""

    def _searches(
        self, tower: str, outputs: Tensor, other: Tensor, data: Data, part: Part | None
    ) -> tuple[_Search, _Search, Tensor]:
        """Return (image-to-text search, text-to-image search, the image [T] of each text), for the images of ``part``.

        The other tower's side of a search is always complete; this tower's side is the weighted subset of ``part``.
        """
        image, text = self._pair(tower, outputs, other)
        owner = data.image_of_text.to(image.device)
        if part is None:
            return _Search(image, text, _positives(owner, data.n_images)), _Search(text, image, owner[:, None]), owner
        images, weight = part.images.to(image.device), part.weight.to(image)
        texts, local = (t.to(image.device) for t in data.texts_of(part.images))
        if tower == "vision":
            to_text = _Search(image, text, _positives(owner, data.n_images)[images])
            return to_text, _Search(text[texts], image, local[:, None], weight), local
        to_text = _Search(image[images], text, _positives(local, len(images)), weight[local])
        return to_text, _Search(text, image, owner[texts][:, None]), local


def _per_image(per_text: Tensor, owner: Tensor, n_images: int) -> Tensor:
    """Sum values of texts [T] per image [I], scaled so that the mean over images is the mean over texts."""
    return per_text.new_zeros(n_images).index_add(0, owner, per_text) * (n_images / len(owner))


@dataclass
class Retrieval(_Ranking):
    """Recall@k, mean over ``at`` and over image-to-text and text-to-image retrieval.

    The Z of MoPE-CLIP (arXiv 2403.07839, section 3.1). Ties count as hits.

    Parameters
    ----------
    at : tuple of int
        The ks, each at least 1.

    Raises
    ------
    ValueError
        No k, or one below 1.
    """

    at: tuple[int, ...] = (1, 5, 10)
    name: str = field(default="retrieval", init=False)
    differentiable = False

    def __post_init__(self) -> None:
        if not self.at or any(k < 1 for k in self.at):
            raise ValueError(f"at: {self.at}, expected ranks of at least 1")
        self.name = f"recall@{self.at[0]}" if len(self.at) == 1 else "retrieval"

    @staticmethod
    def _ranks(search: _Search) -> Tensor:
        """Return the rank [N] of each query's best positive: the number of gallery items of higher score."""
        rank = retrieval_rank(search.query, search.gallery, search.positive)
        return rank if search.weight is None else rank * search.weight.mean()

    def values(self, anatomy, tower, outputs, other, data, part=None) -> Tensor:
        *searches, owner = self._searches(tower, outputs, other, data, part)
        to_text, to_image = (self._ranks(search) for search in searches)
        count = len(to_text)
        hits = [((to_text < k).float() + _per_image((to_image < k).float(), owner, count)) / 2 for k in self.at]
        return torch.stack(hits).mean(0)

    def report(self, anatomy, data, batch_size) -> dict[str, float]:
        *searches, _ = self._searches("vision", *self._embeddings(anatomy, data, batch_size), data, None)
        to_text, to_image = (self._ranks(search) for search in searches)
        result: dict[str, float] = {}
        for k in self.at:
            both = [(ranks < k).double().mean().item() for ranks in (to_text, to_image)]
            result |= {f"recall@{k}": sum(both) / 2}
            result |= {f"image_to_text_recall@{k}": both[0], f"text_to_image_recall@{k}": both[1]}
        return result


@dataclass
class Contrastive(_Ranking):
    """Differentiable surrogates of recall, mean over both directions.

    Parameters
    ----------
    loss : {"cross_entropy", "margin"}
        "cross_entropy": negative symmetric contrastive cross-entropy over the whole data set at the model's
        temperature. "margin": cosine similarity of the best positive minus that of the hardest negative.

    Raises
    ------
    ValueError
        An unknown loss.
    """

    loss: str = "cross_entropy"
    name: str = field(default="contrastive", init=False)

    def __post_init__(self) -> None:
        if self.loss not in ("cross_entropy", "margin"):
            raise ValueError(f"loss: {self.loss!r}, expected 'cross_entropy' or 'margin'")
        self.name = "contrastive" if self.loss == "cross_entropy" else "margin"

    def values(self, anatomy, tower, outputs, other, data, part=None) -> Tensor:
        *searches, owner = self._searches(tower, outputs.float(), other.float(), data, part)
        scale = _temperature(anatomy.model)
        to_text, to_image = (self._direction(search, scale) for search in searches)
        return (to_text + _per_image(to_image, owner, len(to_text))) / 2

    def _direction(self, search: _Search, scale: Tensor | float) -> Tensor:
        """Return the value [N] of each query, computing the N x M score matrix a chunk of rows at a time."""
        values = []
        step = max(1, LOGIT_BYTES // (4 * len(search.gallery)))
        for query, index in zip(search.query.split(step), search.positive.split(step), strict=True):
            scores = query @ search.gallery.T
            real = index >= 0
            own = scores.gather(1, index.clamp(min=0)).masked_fill(~real, -torch.inf)
            weight = search.weight
            if self.loss == "cross_entropy" and weight is None:
                values.append((own * scale).logsumexp(1) - (scores * scale).logsumexp(1))
                continue
            taken = torch.zeros_like(scores, dtype=torch.bool)
            taken[real.nonzero()[:, 0], index[real]] = True
            negative = scores.masked_fill(taken, -torch.inf)
            if weight is not None and self.loss == "cross_entropy":
                positive = (own * scale).logsumexp(1)
                rest = (negative * scale + weight.log()).logsumexp(1)
                values.append(positive - torch.logaddexp(positive, rest))
            else:
                values.append(own.amax(1) - negative.amax(1))
        return torch.cat(values)

    def report(self, anatomy, data, batch_size) -> dict[str, float]:
        image, text = self._embeddings(anatomy, data, batch_size)
        value = self.values(anatomy, "vision", image, text, data).double().mean().item()
        return {"contrastive_loss": -value} if self.loss == "cross_entropy" else {"margin": value}


def _temperature(model: nn.Module) -> Tensor | float:
    """Return the logit scale: the inverse temperature of the model, or 1/0.07, CLIP's initial value, if it has none."""
    scale = getattr(model, "logit_scale", None)
    return 1 / 0.07 if scale is None else scale.detach().float().exp()


@dataclass
class ZeroShot(_DualEncoder):
    """Zero-shot accuracy: images classified by the nearest class, the mean embedding of its prompts."""

    name: str = field(default="zero_shot", init=False)
    differentiable = False

    @staticmethod
    def _classes(data: Data) -> tuple[Classes, Tensor]:
        """Return the classes and the class [I] of each image."""
        if data.classes is None or data.labels is None:
            raise ValueError(f"data: {data.name} has no class labels, objective 'zero_shot' needs them")
        return data.classes, data.labels

    def _texts(self, data: Data) -> Inputs:
        """Return the class prompts as inputs of the text tower."""
        return self._classes(data)[0].texts

    def sample_of_row(self, tower: str, data: Data) -> Tensor | None:
        return super().sample_of_row(tower, data) if tower == "vision" else None  # every image uses all class prompts

    def values(self, anatomy, tower, outputs, other, data, part=None) -> Tensor:
        classes, labels = self._classes(data)
        labels = labels if part is None else labels[part.images.to(labels.device)]
        image, prompt = self._pair(tower, outputs, other)
        owner = classes.class_of_prompt.to(image.device)
        centres = prompt.new_zeros(len(classes), prompt.shape[1]).index_add(0, owner, prompt)
        rank = retrieval_rank(image, F.normalize(centres, dim=-1), labels.to(image.device))
        return (rank == 0).float()

    def report(self, anatomy, data, batch_size) -> dict[str, float]:
        image, prompt = self._embeddings(anatomy, data, batch_size)
        values = self.values(anatomy, "vision", image, prompt, data)
        return {"zero_shot_accuracy": values.double().mean().item()}
