"""Families of models: what each keeps where, one small entry for each class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from .towers import TowerPaths


@dataclass(frozen=True)
class VisualPaths:
    """Where visual tokens meet language: among the text of a tower, or as what its cross-attention reads."""

    tower: str = "text"  # whose blocks they enter
    placeholders: tuple[str, ...] = ("image_token_id",)  # attributes of the config: ids that they take in input_ids
    projector: str = ""  # takes the vision tower's patches and gives the tokens, one by one; "" = they do not match
    reader: str = ""  # cross-attention: the module that is called with encoder_hidden_states
    prefix: bool = False  # tokens whose token_type_ids are 0 see each other in both directions


@dataclass(frozen=True)
class Family:
    """One entry of the table: what a family of models keeps where."""

    towers: dict[str, TowerPaths]
    # tower -> (model, inputs) -> [B, E], before normalisation; both towers of a dual encoder have one
    embed: dict[str, Callable[[nn.Module, dict[str, Tensor]], Tensor]] = field(default_factory=dict)
    head: str = ""  # the module that turns hidden states into logits; "" = the model has none
    needs_decoder_ids: bool = False  # labels enter as decoder_input_ids
    visual: VisualPaths | None = None  # where visual tokens meet language; None = nowhere
    otherwise: Family | None = None  # the entry for models of this class that lack a tower of this one


def _image_features(model, inputs):
    return model.get_image_features(**inputs).pooler_output


def _text_features(model, inputs):
    return model.get_text_features(**inputs).pooler_output


def _blip_image_features(model, inputs):
    return model.vision_proj(model.vision_model(**inputs).last_hidden_state[:, 0])


def _blip_text_features(model, inputs):
    return model.text_proj(model.text_encoder(**inputs).last_hidden_state[:, 0])


def _pooled(model, inputs):
    return model(**inputs).pooler_output


def _stack(*roots: str) -> tuple[str, ...]:
    """Where a stack of blocks may lie below each of these roots."""
    return tuple(f"{root}{path}" for root in roots for path in ("encoder.layers", "layers", "encoder.layer"))


def _vision(*roots: str, config: str = "vision_config", **fields) -> TowerPaths:
    before = tuple(f"{root}{name}" for root in roots for name in ("embeddings", "pre_layrnorm"))
    return TowerPaths(_stack(*roots), config, before=before, **fields)


def _text(*roots: str, config: str = "text_config", **fields) -> TowerPaths:
    return TowerPaths(_stack(*roots), config, before=tuple(f"{root}embeddings" for root in roots), **fields)


def _t5(root: str, config: str, before: tuple[str, ...] = ()) -> dict[str, TowerPaths]:
    return {
        "encoder": TowerPaths((f"{root}encoder.block",), config, before=before),
        "decoder": TowerPaths((f"{root}decoder.block",), config, before=before, beside=(f"{root}encoder",)),
    }


_BLIP2_VISION = {"vision": _vision("vision_model.")}
_BLIP2_BEFORE = ("vision_model", "qformer", "language_projection")
_BLIP2 = Family(
    {
        **_BLIP2_VISION,
        "text": TowerPaths(
            ("language_model.model.decoder.layers", "language_model.model.layers"),  # OPT, LLaMA
            "text_config",
            before=_BLIP2_BEFORE,
        ),
    },
    head="language_model.lm_head",
    otherwise=Family(
        {**_BLIP2_VISION, **_t5("language_model.", "text_config", _BLIP2_BEFORE)},
        head="language_model.lm_head",
        needs_decoder_ids=True,
    ),
)
_LLAVA = Family(
    {
        "vision": _vision(
            "model.vision_tower.", "model.vision_tower.vision_model.", feature_layer="vision_feature_layer"
        ),
        "text": TowerPaths(
            ("model.language_model.layers",),
            "text_config",
            before=("model.vision_tower", "model.multi_modal_projector", "model.language_model.embed_tokens"),
            pool="labels",
        ),
    },
    head="lm_head",
    visual=VisualPaths(projector="model.multi_modal_projector"),
)
_IDEFICS3 = Family(
    {
        "vision": _vision("model.vision_model."),
        "text": TowerPaths(
            ("model.text_model.layers",),
            "text_config",
            before=("model.vision_model", "model.connector", "model.text_model.embed_tokens"),
            pool="labels",
        ),
    },
    head="lm_head",
    visual=VisualPaths(),
)
_DUAL_EMBED = {"vision": _image_features, "text": _text_features}
_LLAMA_TOWER = {
    "text": TowerPaths(("layers", "model.layers"), "", before=("embed_tokens", "model.embed_tokens"), pool="labels")
}

# Model class -> entry. One class, one entry: what differs between the classes of a model type is just what counts here.
FAMILIES: dict[str, Family] = {
    "CLIPModel": Family(
        {"vision": _vision("vision_model.", pool="first"), "text": _text("text_model.", pool="eot")}, _DUAL_EMBED
    ),
    "CLIPVisionModel": Family({"vision": _vision("", "vision_model.", config="", pool="first")}, {"vision": _pooled}),
    "SiglipModel": Family({"vision": _vision("vision_model."), "text": _text("text_model.", pool="last")}, _DUAL_EMBED),
    "SiglipVisionModel": Family({"vision": _vision("", "vision_model.", config="")}, {"vision": _pooled}),
    "BlipForImageTextRetrieval": Family(
        {"vision": _vision("vision_model.", pool="first"), "text": _text("text_encoder.", pool="first")},
        {"vision": _blip_image_features, "text": _blip_text_features},
    ),
    "BlipForQuestionAnswering": Family(
        {
            "vision": _vision("vision_model."),
            "text": _text("text_encoder.", beside=("vision_model",)),
            "decoder": _text("text_decoder.bert.", beside=("vision_model", "text_encoder")),
        },
        head="text_decoder.cls",
        needs_decoder_ids=True,
        visual=VisualPaths(reader="text_encoder"),
    ),
    "LlavaForConditionalGeneration": _LLAVA,
    "LlavaNextForConditionalGeneration": replace(_LLAVA, visual=VisualPaths()),  # newlines among its tokens
    "PaliGemmaForConditionalGeneration": replace(
        _LLAVA, visual=VisualPaths(projector="model.multi_modal_projector", prefix=True)
    ),
    "InternVLForConditionalGeneration": replace(_LLAVA, visual=VisualPaths()),  # four patches a token
    "Idefics3ForConditionalGeneration": _IDEFICS3,
    "SmolVLMForConditionalGeneration": _IDEFICS3,
    "Qwen2_5_VLForConditionalGeneration": Family(
        {
            # Packed patches of all images, [B * patches, D]; copies of them are packed likewise.
            "vision": TowerPaths(("model.visual.blocks",), "vision_config", before=("model.visual.patch_embed",)),
            "text": TowerPaths(
                ("model.language_model.layers",), "text_config", before=("model.visual",), pool="labels"
            ),
        },
        head="lm_head",
        visual=VisualPaths(placeholders=("image_token_id", "video_token_id")),
    ),
    "Blip2ForConditionalGeneration": _BLIP2,
    "InstructBlipForConditionalGeneration": _BLIP2,
    "T5ForConditionalGeneration": Family(_t5("", ""), head="lm_head", needs_decoder_ids=True),
    "OPTForCausalLM": Family(
        {
            "text": TowerPaths(
                ("model.decoder.layers",), "", before=("model.decoder.embed_tokens", "model.decoder.embed_positions")
            )
        },
        head="lm_head",
    ),
    "ViTModel": Family({"vision": _vision("", config="")}, {"vision": _pooled}),
    "ViTForImageClassification": Family({"vision": _vision("vit.", config="", pool="first")}),
    "LlamaForCausalLM": Family(_LLAMA_TOWER, head="lm_head"),
    "LlamaModel": Family(_LLAMA_TOWER),
}


def register(model_class: str, family: Family) -> None:
    """Teach the package a new model class (the name of the transformers class)."""
    FAMILIES[model_class] = family
