"""Objectives of models that predict tokens: loss, exact match under teacher forcing, and generated answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..anatomy import IGNORED, Anatomy
from ..anatomy.patch import Patches, evaluation_mode
from ..data import Data
from .base import LOGIT_BYTES, Inputs, Objective


@dataclass
class LMLoss(Objective):
    """Negative next-token cross-entropy of each sample, mean over its labelled positions."""

    name: str = field(default="lm_loss", init=False)
    whole_runs = True

    def _head(self, anatomy: Anatomy) -> nn.Module:
        """Return the language-model head; raise ValueError for a model without one."""
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
        """Return the negative loss [B] of each sample."""
        losses, sample = self._of_tokens(anatomy, inputs)
        total = losses.new_zeros(len(inputs["labels"])).index_add(0, sample, losses)
        return -total / torch.bincount(sample, minlength=len(total))

    @staticmethod
    def _of_token(logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss [P] of each position from its logits [P, V]."""
        return F.cross_entropy(logits, target, reduction="none")

    def _of_tokens(self, anatomy: Anatomy, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Return (`_of_token` [P] of every labelled position, the sample [P] int64 of each)."""
        labels = inputs["labels"]
        head = self._head(anatomy)
        hidden = _final_states(anatomy, head, inputs)
        sample, position = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        target = labels[sample, position + 1]
        states = hidden[sample, position]
        rows = max(1, LOGIT_BYTES // (4 * anatomy.text_config.vocab_size))
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
    """Exact match under teacher forcing: 1 if every labelled token of a sample has the highest logit, else 0."""

    name: str = field(default="exact_match", init=False)
    differentiable = False

    def outputs(self, anatomy: Anatomy, tower: str, inputs: Inputs) -> Tensor:
        """Return 1 for each sample [B] whose labels all have the highest logit given the labels before them, else 0."""
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
    """Exact match of greedy `generate`: 1 if it yields every labelled token of a sample, else 0.

    Equal to `ExactMatch`, which needs one forward only, unless KV-cache entries are evicted.
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
        """Return 1 for each sample [B] whose generated answer equals its labels, else 0."""
        ids, labels = inputs["input_ids"], inputs["labels"]
        labelled = labels != IGNORED
        first, count = labelled.int().argmax(1, keepdim=True), labelled.sum(1, keepdim=True)
        # Left-padded prompts, so that all end at the same position.
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
        """Return the id that pads generated answers: the pad token, or EOS."""
        config = anatomy.text_config
        return config.pad_token_id if config.pad_token_id is not None else config.eos_token_id


def _final_states(anatomy: Anatomy, head: nn.Module, inputs: Inputs) -> Tensor:
    """Return the input [B, T, D] of the language-model head, without computing logits at all positions."""
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
            # `prune_tokens` finds the end of the instruction by the labels; transformers' own loss is not computed.
            arguments["labels"] = inputs["labels"]
            patches.attribute(model, "loss_function", lambda **_: None)
        model(**arguments)
    return seen[0]
