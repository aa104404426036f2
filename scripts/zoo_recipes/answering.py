"""What the recipes of models that answer questions share: what they are asked, what counts, the table of the card."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from vlprune_ext.zoo.digit_scenes import PLAIN_KINDS, QUESTION_SHARES, DigitScenes, Question

from .card import table
from .recipe import CAPTION_WORDS, Recipe

IGNORED = -100  # a label that the loss does not count
ASKING = ("what", "digit", "colour", "is", "the", "how", "many", "digits", "are", "there", "?", "none")
WORDS = (*CAPTION_WORDS, *ASKING)
Inputs = dict[str, Tensor]


class Answering(Recipe):
    """Judged by exact match of greedy answers, kind by kind."""

    scored = "exact match"
    every = 100
    asked: int  # questions a scene and step
    tokenizer: PreTrainedTokenizerFast

    @abstractmethod
    def packed(self, scenes: DigitScenes, questions: Sequence[Sequence[Question]]) -> Inputs:
        """One row a scene: its picture, and its questions with answers, none of which sees another."""

    @staticmethod
    @abstractmethod
    def likeliest(model: torch.nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The likeliest token [B, T] at every labelled position, and the label [B, T]."""

    @classmethod
    @torch.no_grad()
    def matches(cls, model: torch.nn.Module, inputs: Inputs, batch: int = 250) -> Tensor:
        """Rows [N] bool in which every label is the likeliest token: those that greedy decoding gets right."""
        model.eval()
        right = []
        for start in range(0, len(inputs["input_ids"]), batch):
            found, label = cls.likeliest(model, {name: value[start : start + batch] for name, value in inputs.items()})
            right.append(((found == label) | (label == IGNORED)).all(1))
        return torch.cat(right)

    @functools.cache  # noqa: B019  a recipe lives as long as its run
    def ids(self, text: str) -> tuple[int, ...]:
        """Its words, nothing around them."""
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def questions(self, scenes: DigitScenes) -> list[tuple[Question, ...]]:
        """What is asked of each scene in training."""
        return list(zip(*(scenes.asked(seed) for seed in range(self.asked)), strict=True))

    def examined(self, split: str, kinds: Sequence[str] = tuple(QUESTION_SHARES)) -> tuple[list[Question], Inputs]:
        """One question for each scene of a split, and the inputs that ask it."""
        scenes = DigitScenes(split, self.evaluated)
        questions = scenes.asked(kinds=kinds)
        return questions, self.packed(scenes, [[question] for question in questions])

    @functools.cached_property
    def validation(self) -> Inputs:
        """The inputs of ``score``."""
        return self.examined("validation")[1]

    def score(self) -> float:
        """Exact match of the answers."""
        return self.matches(self.model, self.validation).double().mean().item()

    def measure(self, split: str) -> dict[str, float]:
        """Exact match over all kinds of question, of each kind, and over plain kinds asked alone."""
        questions, inputs = self.examined(split)
        right = self.matches(self.model, inputs).double()
        measured = {self.scored: right.mean().item()}
        for kind in QUESTION_SHARES:
            measured[kind] = right[[question.kind == kind for question in questions]].mean().item()
        plain = self.matches(self.model, self.examined(split, PLAIN_KINDS)[1])
        return measured | {"plain kinds only": plain.double().mean().item()}

    def results(self, numbers: dict[str, dict[str, float]]) -> str:
        """Exact match."""
        asks = {
            "digit": "what digit is top left ?",
            "colour": "what colour is top left ?",
            "digit by colour": "what digit is red ?",
            "colour by digit": "what colour is the 3 ?",
            "count": "how many digits are there ?",
        }
        rows = [
            [name, asks.get(name, ""), *(f"{found[name]:.3f}" for found in numbers.values())]
            for name in next(iter(numbers.values()))
        ]
        n = self.evaluated
        return f"""\
Exact match of greedy answers to one question for each of {n} scenes, `DigitScenes(split, {n}).asked()`;
for an empty place the answer is "none". The first row is over all kinds, mixed by `QUESTION_SHARES`; "plain kinds only"
is `asked(kinds=PLAIN_KINDS)`: digit, colour and count, without the two that must be searched for.

{table(["", "for example", *numbers], rows)}"""
