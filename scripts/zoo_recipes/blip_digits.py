"""blip-digits: questions, on the vision tower of clip-digits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    BlipConfig,
    BlipForQuestionAnswering,
    BlipProcessor,
    BlipVisionModel,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from vlprune_ext import zoo
from vlprune_ext.zoo.digit_scenes import COLOURS, POSITIONS, DigitScenes, Question

from .answering import IGNORED, WORDS, Answering, Inputs, columns
from .card import PURPOSE
from .recipe import Stage, image_processor, pixels_of, word_tokenizer


class BlipDigits(Answering):
    """BLIP on the vision tower of clip-digits: questions with answers."""

    name = "blip-digits"
    stages = (
        Stage(steps=1200, batch=32, objects=(1, 2, 3, 4), alike=1, rate=1e-3),  # what is where, and colours
        Stage(steps=600, batch=32, objects=(1, 2, 3, 4), alike=1, rate=7e-4),  # digits, from any patch
    )
    tags = "blip, visual-question-answering, vlprune-ext"
    asked = 8

    def __init__(self) -> None:
        self.processor = BlipProcessor(image_processor(), self.make_tokenizer(max_length=24))
        self.tokenizer = self.processor.tokenizer
        clip = CLIPModel.from_pretrained(zoo.path("clip-digits")).vision_model
        self.model = self.make_model(self.tokenizer, clip.config)
        _adopt(self.model.vision_model, clip, pixels_of(DigitScenes("train", 64)))

    @staticmethod
    def make_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
        """The words of questions and answers."""
        tokens = ["<pad>", "<unk>", "<bos>", "<eos>", *WORDS]
        return word_tokenizer(tokens, "<bos> $A <eos>", model_max_length=max_length)

    @staticmethod
    def make_model(tokenizer: PreTrainedTokenizerFast, vision: CLIPVisionConfig) -> BlipForQuestionAnswering:
        """The shape of clip-digits' vision tower, three layers that read, three that write; about 2.4M."""
        special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
        sizes = "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
        same = *sizes, "image_size", "patch_size", "hidden_act", "layer_norm_eps"
        config = BlipConfig(
            vision_config={name: getattr(vision, name) for name in same},
            text_config={
                "hidden_size": 128,
                "num_attention_heads": 4,
                "initializer_range": 128**-0.5,  # of 0.02, made for width 768, attention stays blind for long
                "num_hidden_layers": 3,
                "intermediate_size": 256,
                "vocab_size": len(tokenizer),
                "max_position_embeddings": tokenizer.model_max_length,
                "sep_token_id": tokenizer.eos_token_id,
            }
            | special,
        )
        model = BlipForQuestionAnswering(config)
        model.generation_config = GenerationConfig(do_sample=False, **special)
        return model

    def packed(self, scenes: DigitScenes, questions: Sequence[Sequence[Question]]) -> Inputs:
        """One row a scene; each text has positions as if it were alone, each decoder text sees its own question."""
        special = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        asked: list[list[tuple[int, ...]]] = [[] for _ in scenes]
        answered: list[list[tuple[int, ...]]] = [[] for _ in scenes]
        for of_scene, read, written in zip(questions, asked, answered, strict=True):
            for owner, question in enumerate(of_scene):
                ids = [special[0], *self.ids(question.text), special[1]]
                read += zip(ids, range(len(ids)), [owner] * len(ids), strict=True)
                wanted = [*self.ids(question.answer), special[1]]
                given = [special[0], *wanted[:-1]]
                written += zip(given, range(len(given)), [owner] * len(given), wanted, strict=True)
        padding = self.tokenizer.pad_token_id, 0, -1
        ids, positions, owner = columns(asked, padding)
        said, said_positions, said_owner, labels = columns(answered, (*padding, IGNORED))
        return {
            "pixel_values": pixels_of(scenes),
            "input_ids": ids,
            "position_ids": positions,
            "attention_mask": _hidden(owner[:, :, None] == owner[:, None, :]),
            "decoder_input_ids": said,
            "decoder_position_ids": said_positions,
            "decoder_attention_mask": _hidden((said_owner[:, :, None] == said_owner[:, None, :]).tril()),
            "cross_attention_mask": _hidden(said_owner[:, :, None] == owner[:, None, :]),
            "labels": labels,
        }

    @staticmethod
    def seen(model: BlipForQuestionAnswering, inputs: Inputs) -> Tensor:
        """[B, 1 + patches, D]: the picture."""
        return model.vision_model(pixel_values=inputs["pixel_values"]).last_hidden_state

    @staticmethod
    def said(model: BlipForQuestionAnswering, inputs: Inputs, image: Tensor) -> Tensor:
        """[B, T, V]: what the decoder says. The model's own forward takes no positions, so its parts are called."""
        question = model.text_encoder(
            input_ids=inputs["input_ids"],
            position_ids=inputs["position_ids"],
            attention_mask=inputs["attention_mask"],
            encoder_hidden_states=image,
        ).last_hidden_state
        return model.text_decoder(
            input_ids=inputs["decoder_input_ids"],
            position_ids=inputs["decoder_position_ids"],
            attention_mask=inputs["decoder_attention_mask"],
            encoder_hidden_states=question,
            encoder_attention_mask=inputs["cross_attention_mask"],
            use_cache=False,
        ).logits

    @classmethod
    def likeliest(cls, model: BlipForQuestionAnswering, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The likeliest token at every position, and the label there."""
        return cls.said(model, inputs, cls.seen(model, inputs)).argmax(-1), inputs["labels"]

    @classmethod
    def of_answers(cls, model: BlipForQuestionAnswering, inputs: Inputs, image: Tensor | None = None) -> Tensor:
        """Cross-entropy of the answers."""
        said = cls.said(model, inputs, cls.seen(model, inputs) if image is None else image)
        return F.cross_entropy(said.flatten(0, 1), inputs["labels"].flatten())

    def shown(self, scenes: DigitScenes) -> Tensor:
        """[B, 4, 4]: the words for digit, colour, row and column of every place; "none" for the two that it lacks."""
        names = list(COLOURS)
        words = []
        for scene in scenes:
            at = {o.position: f"{o.digit} {names[o.colour]}" for o in scene.objects}
            words.append([self.ids(f"{at.get(i, 'none none')} {place}") for i, place in enumerate(POSITIONS)])
        return torch.tensor(words)

    def loss(self, scenes: DigitScenes) -> Tensor:
        """Cross-entropy of answers, and of the words for each place: what does not say where it is is hard to find.

        The words are those of the place's mean patch in the first stage, of each of its patches in the second.
        """
        inputs = self.packed(scenes, self.questions(scenes))
        image = self.seen(self.model, inputs)
        half = math.isqrt(image.shape[1] - 1) // 2
        patch = image[:, 1:].unflatten(1, (2, half, 2, half)).permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)
        if not self.stage:
            patch = patch.mean(2, keepdim=True)  # [B, 4, n, D], n = 1
        words = self.shown(scenes)[:, :, None].expand(-1, -1, patch.shape[2], -1)  # [B, 4, n, 4]
        named = -self.model.text_decoder.cls(patch).log_softmax(-1).gather(-1, words).mean()
        return self.of_answers(self.model, inputs, image) + named

    def about(self) -> str:
        """What it is."""
        return f"""\
A BLIP of {self.parameters:,} parameters that answers questions about DigitScenes: one to four handwritten digits,
coloured and placed on a grid. The vision tower began as that of clip-digits (six layers of width 128, four heads of 32,
512 neurons; 48-pixel pictures in 8-pixel patches: 36 tokens and the class token); three layers read the question and
look at the picture, three write the answer from what was read, all of width 128 with four heads and 256 neurons; one
token a word. {PURPOSE}

    inputs = processor(images=[picture], text=["what digit is top left ?"], return_tensors="pt")
    model.generate(**inputs)

Questions of one batch should have as many words as each other: transformers' `generate` looks at padding too."""

    def method(self) -> str:
        """The loss."""
        return (
            f"Cross-entropy of the answers to {self.asked} of each scene's questions, and of the words for digit,\n"
            "colour, row and column in what the decoder's head makes of the mean patch of each place (first\n"
            "stage) or of every patch (second), all weights"
        )


def _hidden(seen: Tensor) -> Tensor:
    """[B, Q, K] bool -> [B, 1, Q, K] to add to attention scores."""
    return torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)[:, None]


@torch.no_grad()
def _adopt(blip: BlipVisionModel, clip: CLIPVisionModel, pictures: Tensor) -> None:
    """Give BLIP's vision tower the weights of CLIP's, which has the same layers.

    CLIP normalises what enters the first; BLIP does not, so that norm becomes a part of the embeddings, with the mean
    over ``pictures`` of the deviation that it divides by.
    """
    norm = clip.pre_layrnorm
    embedded = clip.embeddings(pictures)  # [N, 1 + patches, D]
    deviation = embedded.std(-1, correction=0).mean(0)[None, :, None]  # [1, 1 + patches, 1]
    patch = clip.embeddings.patch_embedding.weight  # [D, 3, P, P]
    place = clip.embeddings.position_embedding.weight  # [1 + patches, D]
    own, scale = blip.embeddings, norm.weight[:, None, None, None] / deviation[:, 1:].mean()
    own.patch_embedding.weight.copy_((patch - patch.mean(0)) * scale)
    own.patch_embedding.bias.zero_()
    own.class_embedding.zero_()
    place = place.clone()
    place[0] += clip.embeddings.class_embedding
    own.position_embedding.copy_((place - place.mean(-1, keepdim=True)) / deviation * norm.weight + norm.bias)
    for layer, given in zip(blip.encoder.layers, clip.encoder.layers, strict=True):
        attention = given.self_attn
        for part in ("weight", "bias"):
            three = [getattr(getattr(attention, f"{name}_proj"), part) for name in "qkv"]
            getattr(layer.self_attn.qkv, part).copy_(torch.cat(three))
        layer.self_attn.projection.load_state_dict(attention.out_proj.state_dict())
        for name in ("layer_norm1", "layer_norm2", "mlp"):
            getattr(layer, name).load_state_dict(getattr(given, name).state_dict())
