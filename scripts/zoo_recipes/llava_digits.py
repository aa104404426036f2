"""llava-digits: captions and questions, on the vision tower of clip-digits."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    CLIPModel,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vlprune_ext import zoo
from vlprune_ext.zoo.digit_scenes import PLAIN_KINDS, QUESTION_SHARES, DigitScenes, Question

from .card import PURPOSE, table
from .recipe import CAPTION_WORDS, Recipe, Stage, image_processor, pixels_of, word_tokenizer

IGNORED = -100  # a label that the loss does not count


class LlavaDigits(Recipe):
    """LLaVA on the vision tower of clip-digits: captions and questions."""

    name = "llava-digits"
    stages = (Stage(steps=1200, batch=32, objects=(1, 2, 3, 4), alike=1, rate=1e-3),)
    tags = "llava, visual-question-answering, vlprune-ext"
    scored = "exact match"
    every = 100
    asked = 6  # questions a scene and step

    def __init__(self) -> None:
        clip = CLIPModel.from_pretrained(zoo.path("clip-digits"))
        vision = clip.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        self.tokenizer = self.make_tokenizer(max_length=96)
        self.processor = LlavaProcessor(
            image_processor(),
            self.tokenizer,
            patch_size=vision.patch_size,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
        self.prefix = [self.tokenizer.bos_token_id, *[self.tokenizer.image_token_id] * patches]
        self.model = self.make_model(self.tokenizer, vision, patches)
        self.model.model.vision_tower.load_state_dict(clip.vision_model.state_dict())

    @staticmethod
    def make_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
        """The words of captions, questions and answers, and a token for a patch of the picture."""
        asking = ("what", "digit", "colour", "is", "the", "how", "many", "digits", "are", "there", "?", "none")
        return word_tokenizer(
            ["<pad>", "<unk>", "<bos>", "<eos>", "<image>", *CAPTION_WORDS, *asking],
            "<bos> $A",
            model_max_length=max_length,
            padding_side="left",
            extra_special_tokens={"image_token": "<image>"},
        )

    @staticmethod
    def make_model(tokenizer: PreTrainedTokenizerFast, vision, patches: int) -> LlavaForConditionalGeneration:
        """Four LLaMA layers of width 128, four heads on two key-value heads of 32, 384 neurons; about 2.0M in all."""
        special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
        text = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            tie_word_embeddings=False,
            **special,
        )
        config = LlavaConfig(
            vision_config=copy.deepcopy(vision),
            text_config=text,
            image_token_index=tokenizer.image_token_id,
            image_seq_length=patches,
            vision_feature_layer=-1,  # with so few layers none is left unused
            vision_feature_select_strategy="default",
        )
        model = LlavaForConditionalGeneration(config)
        model.generation_config = GenerationConfig(do_sample=False, **special)
        return model

    def ids(self, text: str) -> list[int]:
        """Its words, nothing around them."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def packed(
        self, scenes: DigitScenes, questions: Sequence[Sequence[Question]], captions: bool = False
    ) -> dict[str, Tensor]:
        """Inputs with one row a scene: its picture, then its caption if asked for, then its questions with answers.

        Each text has positions as if it alone came after the picture, and sees only the picture and itself: the loss
        is that of a row for each text, at a fraction of the work. Labels are captions, answers and the EOS of both.
        """
        rows = []
        for scene, asked in zip(scenes, questions, strict=True):
            texts = [([], self.ids(scene.caption))] if captions else []
            texts += [(self.ids(question.text), self.ids(question.answer)) for question in asked]
            row = [(token, position, 0, IGNORED) for position, token in enumerate(self.prefix)]
            for owner, (given, wanted) in enumerate(texts, start=1):
                tokens = [*given, *wanted, self.tokenizer.eos_token_id]
                labels = [IGNORED] * len(given) + tokens[len(given) :]
                at = range(len(self.prefix), len(self.prefix) + len(tokens))
                row += zip(tokens, at, [owner] * len(tokens), labels, strict=True)
            rows.append(row)
        longest = max(map(len, rows))
        padding = (self.tokenizer.pad_token_id, 0, -1, IGNORED)
        whole = torch.tensor([row + [padding] * (longest - len(row)) for row in rows])  # [B, S, 4]
        tokens, positions, owner, labels = (part.contiguous() for part in whole.unbind(-1))  # [B, S] each
        seen = (owner[:, None, :] == 0) | (owner[:, None, :] == owner[:, :, None])  # [B, S, S], query by key
        return {
            "pixel_values": pixels_of(scenes),
            "input_ids": tokens,
            "position_ids": positions,
            "attention_mask": seen.tril()[:, None],
            "labels": labels,
        }

    def examined(
        self, split: str, kinds: Sequence[str] = tuple(QUESTION_SHARES)
    ) -> tuple[list[Question], dict[str, Tensor]]:
        """One question for each scene of a split, and the inputs that ask it."""
        scenes = DigitScenes(split, self.evaluated)
        questions = scenes.asked(kinds=kinds)
        return questions, self.packed(scenes, [[question] for question in questions])

    @staticmethod
    @torch.no_grad()
    def matches(model: LlavaForConditionalGeneration, inputs: dict[str, Tensor], batch: int = 250) -> Tensor:
        """Rows [N] bool in which every label is the likeliest token: those that greedy decoding gets right."""
        model.eval()
        right = []
        for start in range(0, len(inputs["input_ids"]), batch):
            part = {name: value[start : start + batch] for name, value in inputs.items()}
            label = part.pop("labels")[:, 1:]
            likeliest = model(**part).logits[:, :-1].argmax(-1)  # [B, S - 1]
            right.append(((likeliest == label) | (label == IGNORED)).all(1))
        return torch.cat(right)

    def loss(self, scenes: DigitScenes) -> Tensor:
        """Cross-entropy of captions and answers."""
        questions = zip(*(scenes.asked(seed) for seed in range(self.asked)), strict=True)
        return self.model(**self.packed(scenes, list(questions), captions=True)).loss

    @functools.cached_property
    def validation(self) -> dict[str, Tensor]:
        """The inputs of ``score``."""
        return self.examined("validation")[1]

    def score(self) -> float:
        """Exact match of the answers."""
        return self.matches(self.model, self.validation).double().mean().item()

    def measure(self, split: str) -> dict[str, float]:
        """Exact match over all kinds of question, of each kind, over plain kinds asked alone, and of captions."""
        questions, inputs = self.examined(split)
        right = self.matches(self.model, inputs).double()
        measured = {self.scored: right.mean().item()}
        for kind in QUESTION_SHARES:
            measured[kind] = right[[question.kind == kind for question in questions]].mean().item()
        plain = self.matches(self.model, self.examined(split, PLAIN_KINDS)[1])
        measured["plain kinds only"] = plain.double().mean().item()
        scenes = DigitScenes(split, self.evaluated)
        captioned = self.matches(self.model, self.packed(scenes, [()] * len(scenes), captions=True))
        return measured | {"caption": captioned.double().mean().item()}

    def about(self) -> str:
        """What it is."""
        return f"""\
A LLaVA of {self.parameters:,} parameters that answers questions about DigitScenes: one to four handwritten digits,
coloured and placed on a grid. The vision tower began as that of clip-digits (six layers of width 128, four heads of 32,
512 neurons; 48-pixel pictures in 8-pixel patches: 36 tokens); a projector; four LLaMA layers of width 128, four heads
on two key-value heads, 384 neurons; one token a word.
{PURPOSE}

    inputs = processor(images=[picture], text=["<image> what digit is top left ?"], return_tensors="pt")
    model.generate(**inputs, max_new_tokens=2)

A bare `<image>` asks for a caption, such as "a red 3 top left, a blue 7 bottom right"; give that 24 tokens."""

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
is `asked(kinds=PLAIN_KINDS)`: digit, colour and count, without the two that must be searched for. Captions are right
as a whole or wrong.

{table(["", "for example", *numbers], rows)}"""

    def method(self) -> str:
        """The loss."""
        return f"Cross-entropy of each scene's caption and of the answers to {self.asked} of its questions, all weights"
