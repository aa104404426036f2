"""What a model is judged by. Every value is per sample and higher is better; a module's score is how much it drops.

An objective says which rows of the data a tower is fed, what is read off the model for each row (`outputs`), and what
that is worth (`values`). Replay runs `outputs` under many interventions at once and hands all of them to `values`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .anatomy import Anatomy
from .data import Classes, Data
from .ops import retrieval_rank
from .patch import Patches, evaluation_mode

Inputs = dict[str, Tensor]

_IGNORED = -100
_LOGIT_BYTES = 64 << 20  # logits are computed this many bytes at a time


def _rows(inputs: Inputs, batch_size: int) -> Iterator[Inputs]:
    count = len(next(iter(inputs.values())))
    for start in range(0, count, batch_size):
        yield {name: value[start : start + batch_size] for name, value in inputs.items()}


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
    def values(self, anatomy: Anatomy, tower: str, outputs: Tensor, other: Tensor | None, data: Data) -> Tensor:
        """[S] float32: the value of each sample, from the outputs [N, ...] of all rows.

        other  what `other` returned for this tower
        """

    def other(self, anatomy: Anatomy, tower: str, data: Data, batch_size: int) -> Tensor | None:
        """What `values` needs of the towers that do not change."""
        return None

    @abstractmethod
    def report(self, anatomy: Anatomy, data: Data, batch_size: int) -> dict[str, float]:
        """The numbers a person reads."""

    def run(self, anatomy: Anatomy, tower: str, data: Data, batch_size: int) -> Tensor:
        """[N, ...]: the outputs of all rows."""
        return torch.cat([self.outputs(anatomy, tower, b) for b in self.batches(anatomy, tower, data, batch_size)])


# --- dual encoders ---------------------------------------------------------------------------------------------------


def _positives(data: Data) -> Tensor:
    """[I, P] int64: the texts of every image, padded with -1."""
    owner = data.image_of_text
    counts = torch.bincount(owner, minlength=data.n_images)
    order = torch.sort(owner, stable=True).indices
    start = counts.cumsum(0) - counts
    table = torch.full((data.n_images, int(counts.max())), -1, dtype=torch.long, device=owner.device)
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

    def _pair(self, tower: str, outputs: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """(image embeddings, text embeddings), whichever of the two was run."""
        return (outputs, other) if tower == "vision" else (other, outputs)

    @torch.no_grad()
    def _embeddings(self, anatomy: Anatomy, data: Data, batch_size: int) -> tuple[Tensor, Tensor]:
        self.towers(anatomy)
        with evaluation_mode(anatomy.model):
            image, text = (self.run(anatomy, tower, data, batch_size) for tower in ("vision", "text"))
            return image, text


def _per_image(per_text: Tensor, data: Data) -> Tensor:
    """[T] -> [I], scaled so that the mean over images is the mean over texts."""
    owner = data.image_of_text.to(per_text.device)
    return per_text.new_zeros(data.n_images).index_add(0, owner, per_text) * (data.n_images / len(data))


@dataclass
class Retrieval(_DualEncoder):
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

    def ranks(self, image: Tensor, text: Tensor, data: Data) -> tuple[Tensor, Tensor]:
        """Ranks of the best positive: of the texts for each image [I], of the image for each text [T]."""
        device = image.device
        to_text = retrieval_rank(image, text, _positives(data).to(device))
        to_image = retrieval_rank(text, image, data.image_of_text.to(device))
        return to_text, to_image

    def values(self, anatomy, tower, outputs, other, data) -> Tensor:
        to_text, to_image = self.ranks(*self._pair(tower, outputs, other), data)
        hits = [((to_text < k).float() + _per_image((to_image < k).float(), data)) / 2 for k in self.at]
        return torch.stack(hits).mean(0)

    def report(self, anatomy, data, batch_size) -> dict[str, float]:
        to_text, to_image = self.ranks(*self._embeddings(anatomy, data, batch_size), data)
        result: dict[str, float] = {}
        for k in self.at:
            both = [(ranks < k).double().mean().item() for ranks in (to_text, to_image)]
            result |= {f"recall@{k}": sum(both) / 2}
            result |= {f"image_to_text_recall@{k}": both[0], f"text_to_image_recall@{k}": both[1]}
        return result


@dataclass
class Contrastive(_DualEncoder):
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

    def values(self, anatomy, tower, outputs, other, data) -> Tensor:
        image, text = (x.float() for x in self._pair(tower, outputs, other))
        owner = data.image_of_text.to(image.device)
        positive = _positives(data).to(image.device)
        scale = _temperature(anatomy.model)
        to_text = self._direction(image, text, positive, scale)
        to_image = self._direction(text, image, owner[:, None], scale)
        return (to_text + _per_image(to_image, data)) / 2

    def _direction(self, query: Tensor, gallery: Tensor, positive: Tensor, scale: Tensor | float) -> Tensor:
        """[N]: value of each query; a few rows of the N x M score matrix at a time."""
        values = []
        step = max(1, _LOGIT_BYTES // (4 * len(gallery)))
        for start in range(0, len(query), step):
            scores = query[start : start + step] @ gallery.T
            index = positive[start : start + step]
            real = index >= 0
            own = scores.gather(1, index.clamp(min=0)).masked_fill(~real, -torch.inf)
            if self.loss == "cross_entropy":
                values.append((own * scale).logsumexp(1) - (scores * scale).logsumexp(1))
            else:
                taken = torch.zeros_like(scores, dtype=torch.bool)
                taken[real.nonzero()[:, 0], index[real]] = True
                values.append(own.amax(1) - scores.masked_fill(taken, -torch.inf).amax(1))
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

    def values(self, anatomy, tower, outputs, other, data) -> Tensor:
        classes, labels = self._classes(data)
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

    @staticmethod
    def _head(anatomy: Anatomy) -> nn.Module:
        if anatomy.head is None:
            raise ValueError(
                f"objective: 'lm_loss' needs a model that predicts tokens, {type(anatomy.model).__name__} does not"
            )
        return anatomy.head

    def towers(self, anatomy: Anatomy) -> tuple[str, ...]:
        self._head(anatomy)
        return tuple(anatomy.towers)

    def batches(self, anatomy: Anatomy, tower: str, data: Data, batch_size: int) -> list[Inputs]:
        self.towers(anatomy)
        if "labels" not in data.texts:
            raise ValueError(f"data: {data.name} has no labels, objective 'lm_loss' needs them")
        scored = (data.texts["labels"][:, 1:] != _IGNORED).any(1)
        if not bool(scored.all()):
            raise ValueError(f"data: sample {int((~scored).nonzero()[0])} of {data.name} has no labelled position")
        device = anatomy.device
        index = torch.arange(len(data))
        return [
            {name: value.to(device) for name, value in data.batch(part).items()} for part in index.split(batch_size)
        ]

    def outputs(self, anatomy: Anatomy, tower: str, inputs: Inputs) -> Tensor:
        """[B]: minus the loss of each sample."""
        labels = inputs["labels"]
        head = self._head(anatomy)
        hidden = _final_states(anatomy, head, inputs)
        sample, position = (labels[:, 1:] != _IGNORED).nonzero(as_tuple=True)
        target = labels[sample, position + 1]
        states = hidden[sample, position]
        rows = max(1, _LOGIT_BYTES // (4 * anatomy.text_config.vocab_size))
        losses = [
            F.cross_entropy(head(part).float(), wanted, reduction="none")
            for part, wanted in zip(states.split(rows), target.split(rows), strict=True)
        ]
        total = hidden.new_zeros(len(labels), dtype=torch.float32).index_add(0, sample, torch.cat(losses))
        return -total / torch.bincount(sample, minlength=len(labels))

    def values(self, anatomy, tower, outputs, other, data) -> Tensor:
        return outputs

    @torch.no_grad()
    def report(self, anatomy, data, batch_size) -> dict[str, float]:
        tower = self.towers(anatomy)[0]
        with evaluation_mode(anatomy.model):
            loss = -self.run(anatomy, tower, data, batch_size).double().mean()
        return {"lm_loss": loss.item(), "perplexity": loss.exp().item()}


def _final_states(anatomy: Anatomy, head: nn.Module, inputs: Inputs) -> Tensor:
    """[B, T, D]: what enters the language-model head, which itself does not run over all positions."""
    seen: list[Tensor] = []

    def keep(hidden: Tensor, *_, **__) -> Tensor:
        seen.append(hidden)
        return hidden

    arguments: dict[str, Tensor | bool] = {name: value for name, value in inputs.items() if name != "labels"}
    if anatomy.family.needs_decoder_ids:
        labels = inputs["labels"]
        arguments["decoder_input_ids"] = labels.masked_fill(labels == _IGNORED, anatomy.text_config.pad_token_id)
        arguments["decoder_attention_mask"] = (labels != _IGNORED).long()
    else:
        arguments["use_cache"] = False
    with Patches() as patches:
        patches.forward(head, keep)
        anatomy.model(**arguments)
    return seen[0]


OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "retrieval": Retrieval,
    "recall@1": lambda: Retrieval(at=(1,)),
    "contrastive": Contrastive,
    "margin": lambda: Contrastive("margin"),
    "zero_shot": ZeroShot,
    "lm_loss": LMLoss,
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
