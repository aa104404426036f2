"""llava-digits: captions and questions, on the vision tower of clip-digits."""

from __future__ import annotations

import copy
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
from vlprune_ext.zoo.digit_scenes import DigitScenes, Question

from .answering import IGNORED, WORDS, Answering, Inputs
from .card import PURPOSE
from .recipe import Stage, image_processor, pixels_of, word_tokenizer


class LlavaDigits(Answering):
    """LLaVA on the vision tower of clip-digits: captions and questions."""

    name = "llava-digits"
    stages = (Stage(steps=1200, batch=32, objects=(1, 2, 3, 4), alike=1, rate=1e-3),)
    tags = "llava, visual-question-answering, vlprune-ext"
    asked = 6

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
        return word_tokenizer(
            ["<pad>", "<unk>", "<bos>", "<eos>", "<image>", *WORDS],
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

    def packed(self, scenes: DigitScenes, questions: Sequence[Sequence[Question]], captions: bool = False) -> Inputs:
        """Inputs with one row a scene: its picture, then its caption if asked for, then its questions with answers.

        Each text has positions as if it alone came after the picture, and sees only the picture and itself: the loss
        is that of a row for each text, at a fraction of the work. Labels are captions, answers and the EOS of both.
        """
        rows = []
        for scene, asked in zip(scenes, questions, strict=True):
            texts: list[tuple[Sequence[int], Sequence[int]]] = [((), self.ids(scene.caption))] if captions else []
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

    @staticmethod
    def likeliest(model: LlavaForConditionalGeneration, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The likeliest token after every position but the last, and the label there."""
        label = inputs.pop("labels")[:, 1:]
        return model(**inputs).logits[:, :-1].argmax(-1), label

    def loss(self, scenes: DigitScenes) -> Tensor:
        """Cross-entropy of captions and answers."""
        return self.model(**self.packed(scenes, self.questions(scenes), captions=True)).loss

    def measure(self, split: str) -> dict[str, float]:
        """And captions."""
        scenes = DigitScenes(split, self.evaluated)
        captioned = self.matches(self.model, self.packed(scenes, [()] * len(scenes), captions=True))
        return super().measure(split) | {"caption": captioned.double().mean().item()}

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
        """And of captions."""
        return f"{super().results(numbers)}\n\nCaptions are right as a whole or wrong."

    def method(self) -> str:
        """The loss."""
        return f"Cross-entropy of each scene's caption and of the answers to {self.asked} of its questions, all weights"
