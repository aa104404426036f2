"""Tiny randomly initialised models, one for each family, and inputs for them.

Every model has three or four blocks a tower, hidden size 32 and weights large enough that every unit matters. Biases
and norms are random too, so that nothing is right by being zero.
"""

from __future__ import annotations

import random

import torch
import transformers
from torch import Tensor, nn

from vlprune_ext.anatomy import describe
from vlprune_ext.data import Classes, Data
from vlprune_ext.plan import Plan

NAMES = ("clip", "siglip", "blip_itr", "blip_vqa", "llava", "vit", "llama")
DUAL = ("clip", "siglip", "blip_itr")  # two towers that embed
GENERATIVE = ("blip_vqa", "llava", "llama")  # texts with labels

VOCAB = 64
LENGTH = 12  # of the longest text
PAD, BOS, EOS, IMAGE = 0, 60, 61, 62  # ids of ordinary tokens are 3 .. 59
PATCHES = 9

_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 12,
    "patch_size": 4,
}
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_LLAMA = {**_TEXT, "num_hidden_layers": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def _clip() -> nn.Module:
    config = transformers.CLIPConfig(
        vision_config={**_VISION, "projection_dim": 24}, text_config={**_TEXT, "projection_dim": 24}, projection_dim=24
    )
    return transformers.CLIPModel(config)


def _siglip() -> nn.Module:
    return transformers.SiglipModel(transformers.SiglipConfig(vision_config=dict(_VISION), text_config=dict(_TEXT)))


def _blip_config() -> transformers.BlipConfig:
    text = {**_TEXT, "sep_token_id": EOS}
    return transformers.BlipConfig(vision_config=dict(_VISION), text_config=text, image_text_hidden_size=24)


def _blip_itr() -> nn.Module:
    return transformers.BlipForImageTextRetrieval(_blip_config())


def _blip_vqa() -> nn.Module:
    return transformers.BlipForQuestionAnswering(_blip_config())


def _llava() -> nn.Module:
    config = transformers.LlavaConfig(
        vision_config={**_VISION, "model_type": "clip_vision_model"},
        text_config={**_LLAMA, "model_type": "llama"},
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
        vision_feature_layer=-2,
    )
    return transformers.LlavaForConditionalGeneration(config)


def _vit() -> nn.Module:
    return transformers.ViTModel(transformers.ViTConfig(**_VISION))


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(**_LLAMA, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config)


_BUILDERS = {
    "clip": _clip,
    "siglip": _siglip,
    "blip_itr": _blip_itr,
    "blip_vqa": _blip_vqa,
    "llava": _llava,
    "vit": _vit,
    "llama": _llama,
}


def build(name: str, seed: int = 0) -> nn.Module:
    """A model of one of `NAMES`: fp32, in evaluation mode, the same for the same seed."""
    model = _BUILDERS[name]()
    randomise(model, seed)
    return model.eval()


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Fill every parameter: matrices with deviation 0.2, vectors with 0.3 around 0 or (norm weights) 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if parameter.dim() > 1:
                parameter.copy_(0.2 * noise)
            elif parameter.dim() == 1:
                around = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
                parameter.copy_(around + 0.3 * noise)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + seed)


def _pixels(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, 3, _VISION["image_size"], _VISION["image_size"], generator=generator)


def _rows(n: int, generator: torch.Generator, shortest: int, longest: int) -> tuple[Tensor, Tensor]:
    """BOS, words, exactly one EOS, padding: ids and mask [n, longest]; one row has the full length."""
    lengths = torch.randint(shortest, longest + 1, (n,), generator=generator)
    lengths[int(torch.randint(n, (1,), generator=generator))] = longest
    ids = torch.randint(3, BOS, (n, longest), generator=generator)
    place = torch.arange(longest)
    ids[:, 0] = BOS
    ids[torch.arange(n), lengths - 1] = EOS
    mask = (place < lengths[:, None]).long()
    return ids * mask + PAD * (1 - mask), mask


def _texts(name: str, n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """input_ids, attention_mask and, for models that generate, labels."""
    ids, mask = _rows(n, generator, 4, LENGTH)
    if name == "siglip":  # pools the last position: padded to full length, and padding counts
        return {"input_ids": ids, "attention_mask": torch.ones_like(mask)}
    texts = {"input_ids": ids, "attention_mask": mask}
    if name == "blip_vqa":
        answers, valid = _rows(n, generator, 3, 6)
        texts["labels"] = answers.masked_fill(valid == 0, -100)
    elif name == "llama":
        texts["labels"] = ids.masked_fill((mask == 0) | (ids == BOS), -100)
    elif name == "llava":  # BOS, the image, the text
        image = torch.full((n, PATCHES), IMAGE)
        scored = ids.masked_fill((mask == 0) | (ids == BOS), -100)
        texts["labels"] = torch.cat([torch.full_like(image, -100), scored], 1)
        texts["labels"][:, PATCHES + 1] = -100  # a token of the question
        texts["input_ids"] = torch.cat([ids[:, :1], image, ids[:, 1:]], 1)
        texts["attention_mask"] = torch.cat([mask[:, :1], torch.ones_like(image), mask[:, 1:]], 1)
    return texts


def _has_images(name: str) -> bool:
    return name != "llama"


def inputs(name: str, model: nn.Module, n: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Keyword arguments of ``model``'s forward for ``n`` pairs; labels come with models that generate."""
    generator = _generator(seed)
    values: dict[str, Tensor] = {}
    if _has_images(name):
        values["pixel_values"] = _pixels(n, generator)
    if name != "vit":
        values |= _texts(name, n, generator)
    if name == "blip_vqa":
        labels = values["labels"]
        values["decoder_input_ids"] = labels.masked_fill(labels < 0, PAD)
        values["decoder_attention_mask"] = (labels >= 0).long()
    return {key: value.to(model.device) for key, value in values.items()}


def retrieval_data(name: str, model: nn.Module, n: int = 6, seed: int = 0, *, texts_per_image: int = 1) -> Data:
    """``n`` images and their texts as `Data`; with classes where images and texts embed, with labels for ViT too."""
    generator = _generator(seed)
    owner = torch.arange(n).repeat_interleave(1 if name == "vit" else texts_per_image)
    images = {"pixel_values": _pixels(n, generator)} if _has_images(name) else {}
    texts = {} if name == "vit" else _texts(name, len(owner), generator)
    classes = labels = None
    if name in DUAL or name == "vit":
        labels = torch.randint(3, (n,), generator=generator)
    if name in DUAL:
        prompts = _texts(name, 5, generator)  # two prompts for each of the first two classes, one for the third
        classes = Classes(prompts, torch.tensor([0, 0, 1, 1, 2]), ["one", "two", "three"])
    return Data(f"tiny-{name}", "calibration", images, texts, owner, classes, labels).to(model.device)


def uneven_plan(model: nn.Module, seed: int = 0, *, layers: bool = True) -> Plan:
    """Another number of heads and neurons in every block, and (``layers``) one block fewer in every tower."""
    draw = random.Random(seed)
    plan = Plan(describe(model).shape())
    for tower, blocks in plan.shape.items():
        for layer, units in enumerate(blocks):
            for kind, count in units.items():
                removed = draw.randrange(min(layer == 0, count - 1), count)
                plan.add(tower, kind, layer, draw.sample(range(count), removed))
        if layers:
            plan.add(tower, "layer", draw.randrange(len(blocks)), [])
    return plan


def outputs(name: str, model: nn.Module, values: dict[str, Tensor]) -> Tensor:
    """Everything the model computes from these inputs, flattened: what two models must agree on."""
    with torch.no_grad():
        result = model(**values)
    if name == "clip" or name == "siglip":
        parts = [result.image_embeds, result.text_embeds, result.vision_model_output.last_hidden_state]
        parts.append(result.text_model_output.last_hidden_state)
    elif name == "blip_itr":
        with torch.no_grad():
            plain = model(**values, use_itm_head=False)
        parts = [result.itm_score, result.question_embeds, result.last_hidden_state, plain.itm_score]
    elif name == "blip_vqa":
        with torch.no_grad():
            encoded = model.text_encoder(
                values["input_ids"],
                attention_mask=values["attention_mask"],
                encoder_hidden_states=result.image_embeds,
            ).last_hidden_state
            logits = model.text_decoder(
                values["decoder_input_ids"],
                attention_mask=values["decoder_attention_mask"],
                encoder_hidden_states=encoded,
                encoder_attention_mask=values["attention_mask"],
            ).logits
        parts = [result.image_embeds, result.loss, encoded, logits]
    elif name == "vit":
        parts = [result.last_hidden_state, result.pooler_output]
    else:
        # Positions that are padding attend to nothing of worth; they are left out.
        parts = [result.logits[values["attention_mask"].bool()], result.loss]
    return torch.cat([part.flatten() for part in parts])
