"""Table of model families: one entry per model class, with the paths of its towers and heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from .towers import TowerPaths


@dataclass(frozen=True)
class VisualPaths:
    """How visual tokens enter a language model: among the text of a tower, or by cross-attention.

    Parameters
    ----------
    tower : str
        The tower whose blocks they enter.
    placeholders : tuple of str
        Attributes of the config: ids of their placeholders in ``input_ids``.
    projector : str
        Module that maps the vision tower's patches to visual tokens, one to one; "": they do not match one to one.
    reader : str
        Module called with ``encoder_hidden_states`` where visual tokens are read by cross-attention; "": they are not.
    prefix : bool
        Whether tokens with ``token_type_ids`` 0 attend to each other bidirectionally (prefix-LM mask).
    """

    tower: str = "text"
    placeholders: tuple[str, ...] = ("image_token_id",)
    projector: str = ""
    reader: str = ""
    prefix: bool = False


@dataclass(frozen=True)
class Family:
    """One entry of the table: the locations of a model family's parts.

    Parameters
    ----------
    towers : dict of TowerPaths
        By name.
    embed : dict of callable (model, inputs) -> Tensor [B, E]
        Tower -> embedding before normalisation; both towers of a dual encoder have one.
    head : str
        Module that maps hidden states to logits; "": none.
    needs_decoder_ids : bool
        Whether labels are passed as ``decoder_input_ids``.
    visual : VisualPaths, optional
        How visual tokens enter the language model; None: there are none.
    otherwise : Family, optional
        Entry for models of this class that lack a tower of this one.
    """

    towers: dict[str, TowerPaths]
    # tower -> (model, inputs) -> [B, E], before normalisation; both towers of a dual encoder have one
    embed: dict[str, Callable[[nn.Module, dict[str, Tensor]], Tensor]] = field(default_factory=dict)
    head: str = ""
    needs_decoder_ids: bool = False
    visual: VisualPaths | None = None
    otherwise: Family | None = None


def _image_features(model, inputs):
    """Return the image embeddings [B, E] of CLIP and SigLIP."""
    return model.get_image_features(**inputs).pooler_output


def _text_features(model, inputs):
    """Return the text embeddings [B, E] of CLIP and SigLIP."""
    return model.get_text_features(**inputs).pooler_output


def _blip_image_features(model, inputs):
    """Return the projected class token [B, E] of BLIP's vision tower."""
    return model.vision_proj(model.vision_model(**inputs).last_hidden_state[:, 0])


def _blip_text_features(model, inputs):
    """Return the projected class token [B, E] of BLIP's text encoder, without cross-attention."""
    return model.text_proj(model.text_encoder(**inputs).last_hidden_state[:, 0])


def _pooled(model, inputs):
    """Return the pooled output [B, E] of a vision-only model."""
    return model(**inputs).pooler_output


def _stack(*roots: str) -> tuple[str, ...]:
    """Return the possible paths of a stack of blocks below each of these roots."""
    return tuple(f"{root}{path}" for root in roots for path in ("encoder.layers", "layers", "encoder.layer"))


def _vision(*roots: str, config: str = "vision_config", **fields) -> TowerPaths:
    """Return the paths of a vision tower below any of these roots."""
    before = tuple(f"{root}{name}" for root in roots for name in ("embeddings", "pre_layrnorm"))
    return TowerPaths(_stack(*roots), config, before=before, **fields)


def _text(*roots: str, config: str = "text_config", **fields) -> TowerPaths:
    """Return the paths of a text tower below any of these roots."""
    return TowerPaths(_stack(*roots), config, before=tuple(f"{root}embeddings" for root in roots), **fields)


def _t5(root: str, config: str, before: tuple[str, ...] = ()) -> dict[str, TowerPaths]:
    """Return the paths of a T5's encoder and decoder."""
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

# Model class -> entry. Classes of one model type differ in their towers and heads, hence an entry for each.
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
    """Add a model class to the table of families.

    Parameters
    ----------
    model_class : str
        Name of the transformers class.
    family : Family
        Its entry.
    """
    FAMILIES[model_class] = family
