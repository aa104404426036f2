"""Tiny randomly initialised models, one for each family, and inputs for them.

Every model has three or four blocks a tower, hidden size 32 and weights large enough that every unit matters. Biases
and norms are random too, so that nothing is right by being zero.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import random

import torch
import transformers
from torch import Tensor, nn

from vlprune_ext.anatomy import describe
from vlprune_ext.data import Classes, Data
from vlprune_ext.objectives import objective_named
from vlprune_ext.plan import Plan

NAMES = ("clip", "siglip", "blip_itr", "blip_vqa", "llava", "vit", "llama")
# Families whose configs cannot say yet what structured pruning leaves: all that scores them, and surgery in memory.
LAYERWISE = (
    "t5",
    "opt",
    "opt_post_norm",
    "blip2_opt",
    "blip2_t5",
    "instruct_t5",
    "instruct_llama",
    "llava_next",
    "qwen2_5_vl",
    "paligemma",
    "internvl",
    "idefics3",
)
ALL = NAMES + LAYERWISE
EVERY = (*ALL, "smolvlm")  # which is Idefics3 under another name: most tests do with one of them
DUAL = ("clip", "siglip", "blip_itr")  # two towers that embed
ENCODER_DECODER = ("blip_vqa", "t5", "blip2_t5", "instruct_t5")  # labels enter the decoder
GENERATIVE = ("blip_vqa", "llava", "llama", *LAYERWISE, "smolvlm")  # texts with labels
TEXT_ONLY = ("llama", "t5", "opt", "opt_post_norm")
# Surgery takes no blocks out of these: T5's first holds the position bias of all, Qwen's config says which attend how.
WHOLE = ("T5Block", "Qwen2_5_VLVisionBlock")
# Visual tokens among the text of a decoder, with a key-value cache.
DECODERS = ("llava", "llava_next", "qwen2_5_vl", "paligemma", "internvl", "idefics3", "smolvlm")

VOCAB = 64
LENGTH = 12  # of the longest text
PAD, BOS, EOS, IMAGE = 0, 60, 61, 62  # ids of ordinary tokens are 3 .. 59
PATCHES = 9
# Image tokens in a text. LLaVA-NeXT: the image whole, then 3 x 6 patches of its two halves with a newline a row.
# Qwen2.5-VL: 4 x 8 patches in 2 x 2 squares. InternVL, Idefics3, SmolVLM: 6 x 6 patches in 2 x 2 squares.
IMAGE_TOKENS = (
    {"llava": PATCHES, "llava_next": PATCHES + 3 * 7, "qwen2_5_vl": 8, "paligemma": PATCHES}
    | dict.fromkeys(("internvl", "idefics3", "smolvlm"), 9)
    | dict.fromkeys(("blip2_opt", "blip2_t5", "instruct_t5", "instruct_llama"), 5)
)

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


_T5 = {
    "model_type": "t5",
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "decoder_start_token_id": PAD,
}
_OPT = {
    "model_type": "opt",
    "hidden_size": 32,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    **{key: _TEXT[key] for key in ("num_hidden_layers", "num_attention_heads", "vocab_size", "pad_token_id")},
    "max_position_embeddings": 64,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_QFORMER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
}


def _t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**_T5))


def _opt() -> nn.Module:
    return transformers.OPTForCausalLM(transformers.OPTConfig(**_OPT))


def _opt_post_norm() -> nn.Module:
    """As OPT-350m: norms after, and embeddings of their own width."""
    config = transformers.OPTConfig(**{**_OPT, "word_embed_proj_dim": 24, "do_layer_norm_before": False})
    return transformers.OPTForCausalLM(config)


def _blip2(kind: str, text: dict) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(
        vision_config=dict(_VISION),
        qformer_config=dict(_QFORMER),
        text_config=dict(text),
        num_query_tokens=5,
        image_token_index=IMAGE,
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def _gated(text: dict) -> dict:
    """T5 v1.1, of which FLAN-T5 is made."""
    return {**text, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def _llava_next() -> nn.Module:
    config = transformers.LlavaNextConfig(
        vision_config={**_VISION, "model_type": "clip_vision_model"},
        text_config={**_LLAMA, "model_type": "llama"},
        image_token_index=IMAGE,
        image_grid_pinpoints=[[12, 24], [24, 12]],
        vision_feature_layer=-2,
    )
    return transformers.LlavaNextForConditionalGeneration(config)


def _qwen2_5_vl() -> nn.Module:
    vision = {"depth": 4, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}
    vision |= {"patch_size": 2, "window_size": 8, "fullatt_block_indexes": [1, 3]}
    text = {**_LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    config = transformers.Qwen2_5_VLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _paligemma() -> nn.Module:
    config = transformers.PaliGemmaConfig(
        vision_config={**_VISION, "model_type": "siglip_vision_model", "projection_dim": 32, "vision_use_head": False},
        text_config={**_LLAMA, "model_type": "gemma", "head_dim": 8},
        image_token_index=IMAGE,
        projection_dim=32,
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def _internvl() -> nn.Module:
    config = transformers.InternVLConfig(
        vision_config={**_VISION, "model_type": "internvl_vision", "image_size": [12, 12], "patch_size": [2, 2]},
        text_config={**_LLAMA, "model_type": "qwen2"},
        image_token_id=IMAGE,
        image_seq_length=9,
    )
    return transformers.InternVLForConditionalGeneration(config)


def _idefics3(kind: str) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(
        vision_config={**_VISION, "patch_size": 2},
        text_config={**_LLAMA, "model_type": "llama"},
        image_token_id=IMAGE,
        pad_token_id=PAD,
        scale_factor=2,
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


_BUILDERS = {
    "clip": _clip,
    "siglip": _siglip,
    "blip_itr": _blip_itr,
    "blip_vqa": _blip_vqa,
    "llava": _llava,
    "vit": _vit,
    "llama": _llama,
    "t5": _t5,
    "opt": _opt,
    "opt_post_norm": _opt_post_norm,
    "blip2_opt": lambda: _blip2("Blip2", _OPT),
    "blip2_t5": lambda: _blip2("Blip2", _gated(_T5)),
    "instruct_t5": lambda: _blip2("InstructBlip", _gated(_T5)),
    "instruct_llama": lambda: _blip2("InstructBlip", {**_LLAMA, "model_type": "llama"}),
    "llava_next": _llava_next,
    "qwen2_5_vl": _qwen2_5_vl,
    "paligemma": _paligemma,
    "internvl": _internvl,
    "idefics3": lambda: _idefics3("Idefics3"),
    "smolvlm": lambda: _idefics3("SmolVLM"),
}


def build(name: str, seed: int = 0) -> nn.Module:
    """A model of one of `EVERY`: fp32, in evaluation mode, the same for the same seed."""
    return _copy(_built(name, seed), {})


@functools.cache
def _built(name: str, seed: int) -> nn.Module:
    model = _BUILDERS[name]()
    randomise(model, seed)
    return model.eval()


def _copy(module: nn.Module, memo: dict[int, object]) -> nn.Module:
    """As copy.deepcopy, in less than half of its time, for it knows what most of a module is."""
    if id(module) in memo:
        return memo[id(module)]
    new = memo[id(module)] = module.__new__(type(module))
    for name, value in vars(module).items():
        if isinstance(value, (bool, int, float, str, type(None))):
            vars(new)[name] = value
        elif name == "_modules":
            vars(new)[name] = {key: None if m is None else _copy(m, memo) for key, m in value.items()}
        elif isinstance(value, dict) and not value:
            vars(new)[name] = type(value)()
        else:
            vars(new)[name] = copy.deepcopy(value, memo)
    return new


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


def _images(name: str, n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """What a processor gives for ``n`` images."""
    if name in TEXT_ONLY:
        return {}
    size = _VISION["image_size"]
    if name == "llava_next":  # the image and its two halves
        sizes = torch.tensor([[size, 2 * size]]).repeat(n, 1)
        return {"pixel_values": torch.randn(n, 3, 3, size, size, generator=generator), "image_sizes": sizes}
    if name == "qwen2_5_vl":  # 32 patches of two frames of 2 x 2 pixels
        grid = torch.tensor([[1, 4, 8]]).repeat(n, 1)
        return {"pixel_values": torch.randn(n * 32, 3 * 2 * 2 * 2, generator=generator), "image_grid_thw": grid}
    if name in ("idefics3", "smolvlm"):  # one tile
        return {"pixel_values": torch.randn(n, 1, 3, size, size, generator=generator)}
    return {"pixel_values": torch.randn(n, 3, size, size, generator=generator)}


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
    if name.startswith("instruct"):
        texts |= {"qformer_input_ids": ids.clone(), "qformer_attention_mask": mask.clone()}
    scored = ids.masked_fill((mask == 0) | (ids == BOS), -100)
    count = IMAGE_TOKENS.get(name, 0)
    if count:  # BOS, the image, the text
        image = torch.full((n, count), IMAGE)
        texts["input_ids"] = torch.cat([ids[:, :1], image, ids[:, 1:]], 1)
        texts["attention_mask"] = torch.cat([mask[:, :1], torch.ones_like(image), mask[:, 1:]], 1)
        scored = torch.cat([torch.full_like(image, -100), scored], 1)
        scored[:, count + 1] = -100  # a token of the question
    if name == "paligemma":  # what comes before the answer sees itself in both directions
        texts["token_type_ids"] = (scored != -100).long()
    if name == "qwen2_5_vl":
        texts["mm_token_type_ids"] = (texts["input_ids"] == IMAGE).int()
    if name in ENCODER_DECODER:
        answers, valid = _rows(n, generator, 3, 6)
        texts["labels"] = answers.masked_fill(valid == 0, -100)
    elif name in GENERATIVE:
        texts["labels"] = scored
    return texts


def inputs(name: str, model: nn.Module, n: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Keyword arguments of ``model``'s forward for ``n`` pairs, in its dtype; labels come with models that generate."""
    generator = _generator(seed)
    values = _images(name, n, generator)
    if name != "vit":
        values |= _texts(name, n, generator)
    if name in ENCODER_DECODER:
        labels = values["labels"]
        values["decoder_input_ids"] = labels.masked_fill(labels < 0, PAD)
        values["decoder_attention_mask"] = (labels >= 0).long()
    return {
        key: value.to(model.device, model.dtype if value.is_floating_point() else None) for key, value in values.items()
    }


def retrieval_data(name: str, model: nn.Module, n: int = 6, seed: int = 0, *, texts_per_image: int = 1) -> Data:
    """``n`` images and their texts as `Data`; with classes where images and texts embed, with labels for ViT too."""
    generator = _generator(seed)
    owner = torch.arange(n).repeat_interleave(1 if name == "vit" else texts_per_image)
    images = _images(name, n, generator)
    texts = {} if name == "vit" else _texts(name, len(owner), generator)
    classes = labels = None
    if name in DUAL or name == "vit":
        labels = torch.randint(3, (n,), generator=generator)
    if name in DUAL:
        prompts = _texts(name, 5, generator)  # two prompts for each of the first two classes, one for the third
        classes = Classes(prompts, torch.tensor([0, 0, 1, 1, 2]), ["one", "two", "three"])
    return Data(f"tiny-{name}", "calibration", images, texts, owner, classes, labels).to(model.device)


def setting(name: str, n: int = 6):
    """A model, its anatomy, the objective it gets if none is asked for, and data of ``n`` images."""
    model = build(name)
    anatomy = describe(model)
    return model, anatomy, objective_named(None, anatomy), retrieval_data(name, model, n)


def digest(model: nn.Module) -> str:
    """sha256 over the names and values of all that a model holds."""
    sha = hashlib.sha256()
    for name, value in model.state_dict().items():
        sha.update(name.encode() + value.detach().float().numpy().tobytes())
    return sha.hexdigest()


def whole(model: nn.Module, tower: str) -> bool:
    """Whether the blocks of a tower have to stay."""
    return type(describe(model).tower(tower).container[0]).__name__ in WHOLE


def uneven_plan(model: nn.Module, seed: int = 0, *, layers: bool = True) -> Plan:
    """Another number of heads and neurons in every block, and (``layers``) one block fewer in a tower."""
    draw = random.Random(seed)
    plan = Plan(describe(model).shape())
    for tower, blocks in plan.shape.items():
        for layer, units in enumerate(blocks):
            for kind, count in units.items():
                removed = draw.randrange(min(layer == 0, count - 1), count)
                plan.add(tower, kind, layer, draw.sample(range(count), removed))
        if layers and not whole(model, tower):
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
        mask = values["decoder_attention_mask" if name in ENCODER_DECODER else "attention_mask"]
        parts = [result.logits[mask.bool()], result.loss]
    return torch.cat([part.flatten() for part in parts])
