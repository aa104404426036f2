"""What a model is judged by. Every value is per sample and higher is better; a module's score is how much it drops.

An objective says which rows of the data a tower is fed, what is read off the model for each row (`outputs`), and what
that is worth (`values`). Replay runs `outputs` under many interventions at once and hands all of them to `values`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .anatomy import IGNORED, Anatomy
from .data import Classes, Data
from .ops import retrieval_rank
from .patch import Patches, evaluation_mode

Inputs = dict[str, Tensor]

_LOGIT_BYTES = 64 << 20  # logits are computed this many bytes at a time


def _rows(inputs: Inputs, batch_size: int) -> Iterator[Inputs]:
    count = len(next(iter(inputs.values())))
    for start in range(0, count, batch_size):
        yield {name: value[start : start + batch_size] for name, value in inputs.items()}


@dataclass(frozen=True)
class Part:
    """Some images of the data [n] int64, and how many images each of them stands for [n]."""

    images: Tensor
    weight: Tensor


class Objective(ABC):
    """One way to judge a model. Subclasses are stateless: one object serves any model and data."""

    name: str
    differentiable = True
    sees_cross_attention = True

    @abstractmethod
    def towers(self, anatomy: Anatomy) -> tuple[str, ...]:
        """The towers that take part; ValueError if the model cannot be judged this way."""

    @abstractmethod
    def batches(self, anatomy: Anatomy, tower: str, data: Data, batch_size: int) -> list[Inputs]:
        """The rows that a tower is fed, as model inputs on the model's device."""

    @abstractmethod
    def outputs(self, anatomy: Anatomy, tower: str, inputs: Inputs) -> Tensor:
        """[B, ...]: what is read off the model for each row."""

    @abstractmethod
    def values(
        self,
        anatomy: Anatomy,
        tower: str,
        outputs: Tensor,
        other: Tensor | None,
        data: Data,
        part: Part | None = None,
    ) -> Tensor:
        """[S] float32: the value of each sample, from the outputs [N, ...] of the tower's rows.

        other  what `other` returned for this tower
        part   the images whose rows ``outputs`` holds, in that order; values are those of their samples, and what these
               are compared with is estimated from what is there. None: all
        """

    @abstractmethod
    def sample_of_row(self, tower: str, data: Data) -> Tensor | None:
        """[N] int64: the sample that each row of a tower belongs to; None where rows serve all samples."""

    @abstractmethod
    def samples(self, data: Data, images: Tensor) -> tuple[Tensor, Tensor]:
        """(the samples [K] of some images [n] int64, in that order; the position [K] in ``images`` of each one's)."""

    def other(self, anatomy: Anatomy, tower: str, data: Data, batch_size: int) -> Tensor | None:
        """What `values` needs of the towers that do not change."""
        return None

    @abstractmethod
    def report(self, anatomy: Anatomy, data: Data, batch_size: int) -> dict[str, float]:
        """The numbers a person reads."""

    def runner(self, anatomy: Anatomy, tower: str) -> Callable[[nn.Module, Inputs], Tensor]:
        """`outputs` as `Replay` wants it."""
        return lambda _, inputs: self.outputs(anatomy, tower, inputs)

    def run(self, anatomy: Anatomy, tower: str, data: Data, batch_size: int) -> Tensor:
        """[N, ...]: the outputs of all rows."""
        return torch.cat([self.outputs(anatomy, tower, b) for b in self.batches(anatomy, tower, data, batch_size)])


# --- dual encoders ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Search:
    """One direction of retrieval.

    query [N, E], gallery [M, E], positive [N, P] int64 padded with -1
    weight [M]  how many items each negative of the gallery stands for; None: one, the gallery is complete
    """

    query: Tensor
    gallery: Tensor
    positive: Tensor
    weight: Tensor | None = None


def _positives(owner: Tensor, n_images: int) -> Tensor:
    """[T] image of each text -> [I, P] int64: the texts of every image, padded with -1."""
    counts = torch.bincount(owner, minlength=n_images)
    order = torch.sort(owner, stable=True).indices
    start = counts.cumsum(0) - counts
    table = torch.full((n_images, int(counts.max())), -1, dtype=torch.long, device=owner.device)
    column = torch.arange(len(owner), device=owner.device) - start[owner[order]]
    table[owner[order], column] = order
    return table


class _DualEncoder(Objective):
    """Objectives on the embeddings of an image tower and a text tower, each computed without the other."""

    sees_cross_attention = False

    def towers(self, anatomy: Anatomy) -> tuple[str, ...]:
        if set(anatomy.family.embed) != {"vision", "text"}:
            raise ValueError(
                f"objective: {self.name!r} needs a model with an image and a text embedding, "
                f"{type(anatomy.model).__name__} has none; try 'lm_loss'"
            )
        return ("vision", "text")

    def _texts(self, data: Data) -> Inputs:
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
        return [trim({name: value.to(device) for name, value in batch.items()}) for batch in _rows(inputs, batch_size)]

    def outputs(self, anatomy: Anatomy, tower: str, inputs: Inputs) -> Tensor:
        """[B, E]: the normalised embedding of each row."""
        return F.normalize(anatomy.embed(tower, inputs), dim=-1)

    def other(self, anatomy: Anatomy, tower: str, data: Data, batch_size: int) -> Tensor:
        """[M, E]: the other tower's embeddings."""
        return self.run(anatomy, "text" if tower == "vision" else "vision", data, batch_size)

    def sample_of_row(self, tower: str, data: Data) -> Tensor | None:
        return torch.arange(data.n_images) if tower == "vision" else data.image_of_text.cpu()

    def samples(self, data: Data, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, torch.arange(len(images))

    def _pair(self, tower: str, outputs: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """(image embeddings, text embeddings), whichever of the two was run."""
        return (outputs, other) if tower == "vision" else (other, outputs)

    @torch.no_grad()
    def _embeddings(self, anatomy: Anatomy, data: Data, batch_size: int) -> tuple[Tensor, Tensor]:
        self.towers(anatomy)
        with evaluation_mode(anatomy.model):
            image, text = (self.run(anatomy, tower, data, batch_size) for tower in ("vision", "text"))
            return image, text


class _Ranking(_DualEncoder):
    """Objectives that look for texts by image and for images by text."""

    def _searches(
        self, tower: str, outputs: Tensor, other: Tensor, data: Data, part: Part | None
    ) -> tuple[_Search, _Search, Tensor]:
        """(texts for each image, images for each text, the image of each text); images are those of ``part``.

        The other tower's side of a search is always complete. What is there of this tower's side stands for all of it.
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
    """[T] -> [I], scaled so that the mean over images is the mean over texts."""
    return per_text.new_zeros(n_images).index_add(0, owner, per_text) * (n_images / len(owner))


@dataclass
class Retrieval(_Ranking):
    """Recall@k in both directions: the mean over ``at`` and over image-to-text and text-to-image.

    The kind of Z that MoPE-CLIP uses (arXiv 2403.07839, section 3.1). Ties count as found.
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
        """[N]: how many items of the gallery score higher than the query's best positive."""
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
    """Smooth stand-ins for recall.

    loss  "cross_entropy": minus the symmetric contrastive cross-entropy of the whole set at the model's temperature;
          "margin": cosine of the best positive minus that of the hardest negative, mean of both directions
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
        """[N]: value of each query; a few rows of the N x M score matrix at a time."""
        values = []
        step = max(1, _LOGIT_BYTES // (4 * len(search.gallery)))
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
    """The factor in front of cosine scores; 1/0.07, CLIP's initial value, for a model that keeps none."""
    scale = getattr(model, "logit_scale", None)
    return 1 / 0.07 if scale is None else scale.detach().float().exp()


@dataclass
class ZeroShot(_DualEncoder):
    """Accuracy of classifying images by the nearest class prompt; a class is the mean of its prompts' embeddings."""

    name: str = field(default="zero_shot", init=False)
    differentiable = False

    @staticmethod
    def _classes(data: Data) -> tuple[Classes, Tensor]:
        """The classes, and the one [I] of each image."""
        if data.classes is None or data.labels is None:
            raise ValueError(f"data: {data.name} has no class labels, objective 'zero_shot' needs them")
        return data.classes, data.labels

    def _texts(self, data: Data) -> Inputs:
        return self._classes(data)[0].texts

    def sample_of_row(self, tower: str, data: Data) -> Tensor | None:
        return super().sample_of_row(tower, data) if tower == "vision" else None  # a class prompt serves all images

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


# --- language models -------------------------------------------------------------------------------------------------


@dataclass
class LMLoss(Objective):
    """Minus the next-token cross-entropy of each sample, averaged over its labelled positions."""

    name: str = field(default="lm_loss", init=False)

    def _head(self, anatomy: Anatomy) -> nn.Module:
        if anatomy.head is None:
            raise ValueError(
                f"objective: {self.name!r} needs a model that predicts tokens, {type(anatomy.model).__name__} does not"
            )
        return anatomy.head

    def towers(self, anatomy: Anatomy) -> tuple[str, ...]:
        self._head(anatomy)
        return tuple(anatomy.towers)

    def batches(self, anatomy: Anatomy, tower: str, data: Data, batch_size: int) -> list[Inputs]:
        self.towers(anatomy)
        if "labels" not in data.texts:
            raise ValueError(f"data: {data.name} has no labels, objective {self.name!r} needs them")
        scored = (data.texts["labels"][:, 1:] != IGNORED).any(1)
        if not bool(scored.all()):
            raise ValueError(f"data: sample {int((~scored).nonzero()[0])} of {data.name} has no labelled position")
        device = anatomy.device
        index = torch.arange(len(data))
        return [
            {name: value.to(device) for name, value in data.batch(part).items()} for part in index.split(batch_size)
        ]

    def outputs(self, anatomy: Anatomy, tower: str, inputs: Inputs) -> Tensor:
        """[B]: minus the loss of each sample."""
        losses, sample = self._of_tokens(anatomy, inputs)
        total = losses.new_zeros(len(inputs["labels"])).index_add(0, sample, losses)
        return -total / torch.bincount(sample, minlength=len(total))

    @staticmethod
    def _of_token(logits: Tensor, target: Tensor) -> Tensor:
        """[P]: the loss of each position, from its logits [P, V]."""
        return F.cross_entropy(logits, target, reduction="none")

    def _of_tokens(self, anatomy: Anatomy, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """(`_of_token` of every labelled position [P], the sample [P] that each belongs to)."""
        labels = inputs["labels"]
        head = self._head(anatomy)
        hidden = _final_states(anatomy, head, inputs)
        sample, position = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        target = labels[sample, position + 1]
        states = hidden[sample, position]
        rows = max(1, _LOGIT_BYTES // (4 * anatomy.text_config.vocab_size))
        found = [
            self._of_token(head(part).float(), wanted)
            for part, wanted in zip(states.split(rows), target.split(rows), strict=True)
        ]
        return torch.cat(found), sample

    def values(self, anatomy, tower, outputs, other, data, part=None) -> Tensor:
        return outputs

    def sample_of_row(self, tower: str, data: Data) -> Tensor:
        return torch.arange(len(data))

    def samples(self, data: Data, images: Tensor) -> tuple[Tensor, Tensor]:
        texts, position = data.texts_of(images)
        return texts.cpu(), position.cpu()

    @torch.no_grad()
    def report(self, anatomy, data, batch_size) -> dict[str, float]:
        tower = self.towers(anatomy)[0]
        with evaluation_mode(anatomy.model):
            loss = -self.run(anatomy, tower, data, batch_size).double().mean()
        return {"lm_loss": loss.item(), "perplexity": loss.exp().item()}


@dataclass
class ExactMatch(LMLoss):
    """1 where a greedy decoder gives every labelled token of a sample, else 0."""

    name: str = field(default="exact_match", init=False)
    differentiable = False

    def outputs(self, anatomy: Anatomy, tower: str, inputs: Inputs) -> Tensor:
        """[B]: whether all labelled tokens of each sample are the most likely ones, given those before."""
        wrong, sample = self._of_tokens(anatomy, inputs)
        return (wrong.new_zeros(len(inputs["labels"])).index_add(0, sample, wrong) == 0).float()

    @staticmethod
    def _of_token(logits: Tensor, target: Tensor) -> Tensor:
        return (logits.argmax(-1) != target).float()

    @torch.no_grad()
    def report(self, anatomy, data, batch_size) -> dict[str, float]:
        tower = self.towers(anatomy)[0]
        with evaluation_mode(anatomy.model):
            return {self.name: self.run(anatomy, tower, data, batch_size).double().mean().item()}


@dataclass
class Generated(ExactMatch):
    """1 where ``generate`` (greedy, with a key-value cache) gives every labelled token of a sample, else 0.

    What `ExactMatch` is, told from the labels in one forward, if nothing happens to the cache.
    """

    name: str = field(default="generated", init=False)

    def towers(self, anatomy: Anatomy) -> tuple[str, ...]:
        if anatomy.family.needs_decoder_ids:
            raise ValueError(
                f"objective: {self.name!r} is for models that answer behind their prompt; for"
                f" {type(anatomy.model).__name__}, expected 'exact_match'"
            )
        return super().towers(anatomy)

    def outputs(self, anatomy: Anatomy, tower: str, inputs: Inputs) -> Tensor:
        """[B]: whether each sample's answer is its labels."""
        ids, labels = inputs["input_ids"], inputs["labels"]
        labelled = labels != IGNORED
        first, count = labelled.int().argmax(1, keepdim=True), labelled.sum(1, keepdim=True)
        # Prompts end side by side.
        place = first - int(first.max()) + torch.arange(int(first.max()), device=ids.device)
        prompt = {
            name: value.gather(1, place.clamp(min=0)) if value.shape == ids.shape else value
            for name, value in inputs.items()
            if name != "labels"
        }
        prompt["attention_mask"] = prompt.get("attention_mask", torch.ones_like(place)) * (place >= 0)
        longest = int(count.max())
        model: Any = anatomy.model
        eos = anatomy.text_config.eos_token_id
        found = model.generate(
            **prompt, max_new_tokens=longest, do_sample=False, eos_token_id=eos, pad_token_id=self._pad(anatomy)
        )[:, place.shape[1] :]
        found = F.pad(found, (0, longest - found.shape[1]), value=IGNORED)
        step = torch.arange(longest, device=ids.device)
        wanted = labels.gather(1, (first + step).clamp(max=ids.shape[1] - 1))
        return ((found == wanted) | (step >= count)).all(1).float()

    @staticmethod
    def _pad(anatomy: Anatomy) -> int:
        config = anatomy.text_config
        return config.pad_token_id if config.pad_token_id is not None else config.eos_token_id


def _final_states(anatomy: Anatomy, head: nn.Module, inputs: Inputs) -> Tensor:
    """[B, T, D]: what enters the language-model head, which itself does not run over all positions."""
    seen: list[Tensor] = []

    def keep(hidden: Tensor, *_, **__) -> Tensor:
        seen.append(hidden)
        return hidden

    arguments: dict[str, Tensor | bool] = {name: value for name, value in inputs.items() if name != "labels"}
    model: Any = anatomy.model
    visual = anatomy.family.visual
    if anatomy.family.needs_decoder_ids:
        labels = inputs["labels"]
        arguments["decoder_input_ids"] = labels.masked_fill(labels == IGNORED, anatomy.text_config.pad_token_id)
        arguments["decoder_attention_mask"] = (labels != IGNORED).long()
    else:
        arguments["use_cache"] = False
    with Patches() as patches:
        patches.forward(head, keep)
        if visual is not None and not visual.reader:
            # They tell the instruction from the answer, for `prune_tokens`. The loss is ours.
            arguments["labels"] = inputs["labels"]
            patches.attribute(model, "loss_function", lambda **_: None)
        model(**arguments)
    return seen[0]


OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "retrieval": Retrieval,
    "recall@1": lambda: Retrieval(at=(1,)),
    "contrastive": Contrastive,
    "margin": lambda: Contrastive("margin"),
    "zero_shot": ZeroShot,
    "lm_loss": LMLoss,
    "exact_match": ExactMatch,
    "generated": Generated,
}


def objective_named(objective: str | Objective | None, anatomy: Anatomy | None = None) -> Objective:
    """An objective from its name; None is the smooth one that suits the model. Raises ValueError listing the names."""
    if isinstance(objective, Objective):
        return objective
    if objective is None:
        return Contrastive() if anatomy is None or set(anatomy.family.embed) == {"vision", "text"} else LMLoss()
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: {objective!r}, expected one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[objective]()
