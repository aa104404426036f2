"""What a model of the zoo is trained by, and the parts that several of them are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vlprune_ext.zoo.digit_scenes import COLOURS, IMAGE_SIZE, POSITIONS, DigitScenes

CAPTION_WORDS = (",", "a", "an", *COLOURS, *map(str, range(10)), *sorted({w for p in POSITIONS for w in p.split()}))


@dataclass(frozen=True)
class Stage:
    """Some steps with one kind of batch and one cosine from ``rate`` to zero."""

    steps: int
    batch: int
    objects: tuple[int, ...]  # how many digits a scene may hold
    alike: int  # scenes in a row that differ in their digits alone
    rate: float


class Recipe(ABC):
    """A model with its processor, what it is trained for, and what its card says."""

    name: ClassVar[str]
    stages: ClassVar[tuple[Stage, ...]]
    tags: ClassVar[str]  # of the card
    scored: ClassVar[str]  # what ``score`` is, the number by which weights are kept
    every: ClassVar[int] = 50  # steps from one score to the next
    evaluated: ClassVar[int] = 1000  # scenes of the validation and test sets
    model: PreTrainedModel
    processor: ProcessorMixin

    @abstractmethod
    def loss(self, scenes: DigitScenes) -> Tensor:
        """The training loss [] of one batch."""

    def after_step(self) -> None:  # noqa: B027  most weights need nothing
        """Whatever the weights need after an update."""

    @abstractmethod
    def score(self) -> float:
        """Quality on the validation scenes, higher is better."""

    @abstractmethod
    def measure(self, split: str) -> dict[str, float]:
        """All that the card states of one split."""

    @abstractmethod
    def about(self) -> str:
        """The card's first paragraph."""

    @abstractmethod
    def results(self, numbers: dict[str, dict[str, float]]) -> str:
        """The card's tables, from what was measured of each split."""

    @abstractmethod
    def method(self) -> str:
        """The loss, for the card."""

    @property
    def parameters(self) -> int:
        """How many, tied ones once."""
        return sum(p.numel() for p in self.model.parameters())


def word_tokenizer(tokens: Sequence[str], template: str, **arguments) -> PreTrainedTokenizerFast:
    """One token a word, ids in the order of ``tokens``; ``template`` says where <bos> and <eos> go around ``$A``."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(t, vocabulary[t]) for t in ("<bos>", "<eos>") if t in template]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_input_names=["input_ids", "attention_mask"],
        **arguments,
    )


def image_processor() -> CLIPImageProcessorPil:
    """48 pixels, to [-1, 1]; needs only Pillow."""
    return CLIPImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def pixels_of(scenes: DigitScenes) -> Tensor:
    """What ``image_processor`` gives for these scenes [N, 3, 48, 48], without going through Pillow one by one."""
    return torch.from_numpy(scenes.images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()
