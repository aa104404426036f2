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

from .answering import WORDS, Answering, Inputs
from .card import PURPOSE
from .recipe import Stage, image_processor, pixels_of, word_tokenizer


class BlipDigits(Answering):
    """BLIP on the vision tower of clip-digits: questions with answers."""

    name = "blip-digits"
    stages = (Stage(steps=700, batch=32, objects=(1, 2, 3, 4), alike=1, rate=1e-3),)
    tags = "blip, visual-question-answering, vlprune-ext"
    asked = 6

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
        """One row a scene, with as many questions each: ids and mask [B, Q, S], what the decoder reads [B, Q, 3]."""
        shape = len(questions), len(questions[0]), -1
        asked = self.tokenizer([question.text for of_scene in questions for question in of_scene], padding=True)
        answers = self.tokenizer([question.answer for of_scene in questions for question in of_scene])
        return {
            "pixel_values": pixels_of(scenes),
            "input_ids": torch.tensor(asked["input_ids"]).view(shape),
            "attention_mask": torch.tensor(asked["attention_mask"]).view(shape),
            "labels": torch.tensor(answers["input_ids"]).view(shape),
        }

    @staticmethod
    def seen(model: BlipForQuestionAnswering, inputs: Inputs) -> Tensor:
        """[B, 1 + patches, D]: the picture."""
        return model.vision_model(pixel_values=inputs["pixel_values"]).last_hidden_state

    @staticmethod
    def said(model: BlipForQuestionAnswering, inputs: Inputs, image: Tensor) -> Tensor:
        """[B, Q, 2, V]: what the decoder says after each token but the last.

        The model's own forward would look at a picture anew for each question. Here all lie in one row, where each sees
        itself alone. They are taken apart before they are decoded, since BLIP's cross-attention ignores masks.
        """
        ids, mask, labels = inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
        batch, asked, length = ids.shape
        owner = torch.arange(asked).repeat_interleave(length)
        hidden = (owner[:, None] != owner) | (mask.flatten(1) == 0)[:, None]  # [B, Q * S, Q * S]
        question = model.text_encoder(
            input_ids=ids.flatten(1),
            position_ids=torch.arange(length).repeat(asked)[None],
            attention_mask=torch.zeros(hidden.shape).masked_fill_(hidden, torch.finfo(torch.float32).min)[:, None],
            encoder_hidden_states=image,
        ).last_hidden_state
        decoded = model.text_decoder(
            input_ids=labels.flatten(0, 1)[:, :-1],
            encoder_hidden_states=question.view(batch * asked, length, -1),
            use_cache=False,
        )
        return decoded.logits.view(batch, asked, labels.shape[-1] - 1, -1)

    @classmethod
    def likeliest(cls, model: BlipForQuestionAnswering, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The likeliest token at every position, and the label there."""
        said = cls.said(model, inputs, cls.seen(model, inputs))
        return said.argmax(-1).flatten(1), inputs["labels"][..., 1:].flatten(1)

    @classmethod
    def of_answers(cls, model: BlipForQuestionAnswering, inputs: Inputs, image: Tensor | None = None) -> Tensor:
        """Cross-entropy of the answers."""
        said = cls.said(model, inputs, cls.seen(model, inputs) if image is None else image)
        return F.cross_entropy(said.flatten(0, 2), inputs["labels"][..., 1:].flatten())

    def shown(self, scenes: DigitScenes) -> Tensor:
        """[B, 4, 4]: the words for digit, colour, row and column of every place; "none" for the two that it lacks."""
        names = list(COLOURS)
        words = []
        for scene in scenes:
            at = {o.position: f"{o.digit} {names[o.colour]}" for o in scene.objects}
            words.append([self.ids(f"{at.get(i, 'none none')} {place}") for i, place in enumerate(POSITIONS)])
        return torch.tensor(words)

    def loss(self, scenes: DigitScenes) -> Tensor:
        """Cross-entropy of answers, and of the words for each place in its patches, where questions then find them."""
        inputs = self.packed(scenes, self.questions(scenes))
        image = self.seen(self.model, inputs)
        half = math.isqrt(image.shape[1] - 1) // 2
        patch = image[:, 1:].unflatten(1, (2, half, 2, half)).transpose(2, 3)  # [B, 2, 2, half, half, D]
        words = self.shown(scenes).view(-1, 2, 2, 1, 1, 4).expand(*patch.shape[:-1], 4)
        named = -self.model.text_decoder.cls(patch).log_softmax(-1).gather(-1, words).mean()
        return self.of_answers(self.model, inputs, image) + named

    def about(self) -> str:
        """What it is."""
        return f"""\
A BLIP of {self.parameters:,} parameters that answers questions about DigitScenes: one to four handwritten digits,
coloured and placed on a grid. The vision tower began as that of clip-digits (six layers of width 128, four heads of 32,
512 neurons; 48-pixel pictures in 8-pixel patches: 36 tokens and the class token); three layers read the question and
look at the picture, three write the answer from what was read, all of width 128 with four heads and 256 neurons; one
token a word.
{PURPOSE}

    inputs = processor(images=[picture], text=["what digit is top left ?"], return_tensors="pt")
    model.generate(**inputs, max_new_tokens=2)

The decoder of transformers' BLIP sees the padding of a batch's questions; the recipe trains with padding too."""

    def method(self) -> str:
        """The loss."""
        return (
            f"Cross-entropy of the answers to {self.asked} of each scene's questions, and of the words for digit,\n"
            "colour, row and column in what the decoder's head makes of every patch, all weights"
        )


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
