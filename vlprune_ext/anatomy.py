"""Where a model keeps its towers, blocks, heads, neurons and projections: one small entry per family.

A *tower* is a stack of residual blocks. A *site* is an output projection whose input splits into removable units: the
heads of an attention, the neurons of an MLP. Nothing here runs a model or changes one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import attrgetter
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

KINDS = ("head", "cross_head", "neurons", "layer")  # what can be removed
MATRIX = "matrix"  # what can be made sparse
IGNORED = -100  # the label of a position that no loss is computed on


# --- blocks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SitePaths:
    """Where a block keeps one site; paths are relative to the block."""

    kind: str  # "head", "cross_head" or "neurons"
    module: str  # returns what the output projection returns
    out: str  # the output projection
    inputs: tuple[str, ...]  # the projections that produce its input
    skip: tuple[str, ...] = ()  # need not run once the output projection's result is known
    owner: str = ""  # keeps the head counts
    counts: tuple[str, ...] = ()  # attributes of `owner` that count heads
    widths: tuple[str, ...] = ()  # attributes of `owner` that count heads * head_dim
    removable: bool = True  # False: the class's own forward cannot run with fewer units
    free_head_dim: bool = False  # the config can set head_dim apart from the number of heads
    interface: bool = True  # the attention calls the function that its config names


@dataclass(frozen=True)
class Layout:
    """One kind of transformer block: its sites in the order in which they run, and the norm in front of the first."""

    sites: tuple[SitePaths, ...]
    norm: str = ""  # the norm in front of the attention; "" for post-norm blocks
    pre_norm: str = ""  # attribute of the block that is False where `norm` comes after; "" = it never does
    fixed: str = ""  # why a block cannot be taken out of its list; "" = it can


def _pre_norm(attention: str, qkv: tuple[str, ...], out: str, norms: tuple[str, str], up, down, **attention_fields):
    heads = SitePaths(
        "head",
        module=attention,
        out=f"{attention}.{out}",
        inputs=tuple(f"{attention}.{name}" for name in qkv),
        skip=(norms[0],),
        owner=attention,
        **attention_fields,
    )
    neurons = SitePaths(
        "neurons", module="mlp", out=f"mlp.{down}", inputs=tuple(f"mlp.{name}" for name in up), skip=(norms[1],)
    )
    return Layout((heads, neurons), norm=norms[0])


def _bert_attention(kind: str, root: str) -> SitePaths:
    return SitePaths(
        kind,
        module=f"{root}.output.dense",
        out=f"{root}.output.dense",
        inputs=tuple(f"{root}.self.{name}" for name in ("query", "key", "value")),
        skip=(f"{root}.self",),
        owner=f"{root}.self",
        counts=("num_attention_heads",),
        widths=("all_head_size",),
        interface=False,
    )


def _t5_attention(kind: str, root: str) -> SitePaths:
    # Every block adds the same position bias, one for each head, so that all of them have the same number of heads.
    return SitePaths(
        kind,
        module=root,
        out=f"{root}.o",
        inputs=tuple(f"{root}.{name}" for name in "qkv"),
        skip=(f"{root.rpartition('.')[0]}.layer_norm",),
        owner=root,
        removable=False,
    )


def _t5_neurons(place: int, *inputs: str) -> SitePaths:
    root = f"layer.{place}.DenseReluDense"
    return SitePaths(
        "neurons",
        module=root,
        out=f"{root}.wo",
        inputs=tuple(f"{root}.{name}" for name in inputs),
        skip=(f"layer.{place}.layer_norm",),
    )


_QKV = ("q_proj", "k_proj", "v_proj")
_CLIP = _pre_norm("self_attn", _QKV, "out_proj", ("layer_norm1", "layer_norm2"), ("fc1",), "fc2", counts=("num_heads",))
_BLIP = _pre_norm(
    "self_attn",
    ("qkv",),
    "projection",
    ("layer_norm1", "layer_norm2"),
    ("fc1",),
    "fc2",
    counts=("num_heads",),
    removable=False,
    interface=False,
)
_VIT = _pre_norm(
    "attention",
    _QKV,
    "o_proj",
    ("layernorm_before", "layernorm_after"),
    ("fc1",),
    "fc2",
    counts=("num_attention_heads",),
    free_head_dim=True,
)
_LLAMA = _pre_norm(
    "self_attn",
    _QKV,
    "o_proj",
    ("input_layernorm", "post_attention_layernorm"),
    ("gate_proj", "up_proj"),
    "down_proj",
    free_head_dim=True,
)
_QWEN = _pre_norm(
    "self_attn",
    _QKV,
    "o_proj",
    ("input_layernorm", "post_attention_layernorm"),
    ("gate_proj", "up_proj"),
    "down_proj",
    counts=("num_heads", "num_key_value_heads"),
)
_BERT = Layout(
    (
        _bert_attention("head", "attention"),
        _bert_attention("cross_head", "crossattention"),
        SitePaths(
            "neurons", module="output.dense", out="output.dense", inputs=("intermediate.dense",), skip=("intermediate",)
        ),
    )
)

_T5 = Layout(
    (
        _t5_attention("head", "layer.0.SelfAttention"),
        _t5_attention("cross_head", "layer.1.EncDecAttention"),
        # Second in an encoder, third in a decoder; gated from version 1.1 on.
        *(_t5_neurons(place, *up) for place in (1, 2) for up in (("wi",), ("wi_0", "wi_1"))),
    ),
    norm="layer.0.layer_norm",
    fixed="T5's first block holds the position bias that all of them add",
)
# The norms come before or after, so that they always run.
_OPT = Layout(
    (
        SitePaths(
            "head",
            module="self_attn",
            out="self_attn.out_proj",
            inputs=tuple(f"self_attn.{name}" for name in _QKV),
            owner="self_attn",
            counts=("num_heads",),
        ),
        SitePaths("neurons", module="fc2", out="fc2", inputs=("fc1",), skip=("fc1", "activation_fn")),
    ),
    norm="self_attn_layer_norm",
    pre_norm="do_layer_norm_before",
)
_QWEN_VISION = _pre_norm(
    "attn", ("qkv",), "proj", ("norm1", "norm2"), ("gate_proj", "up_proj"), "down_proj", counts=("num_heads",)
)
_QWEN_VISION = replace(_QWEN_VISION, fixed="the config says by number which of them attend to whole images")

_INTERN_VISION = _pre_norm(
    "attention",
    _QKV,
    "projection_layer",
    ("layernorm_before", "layernorm_after"),
    ("fc1",),
    "fc2",
    counts=("num_heads",),
    widths=("embed_dim",),
)

# Block class -> layout.
LAYOUTS: dict[str, Layout] = {
    "CLIPEncoderLayer": _CLIP,
    "SiglipEncoderLayer": _CLIP,
    "BlipEncoderLayer": _BLIP,
    "BlipTextLayer": _BERT,
    "ViTLayer": _VIT,
    "Idefics3EncoderLayer": _CLIP,
    "SmolVLMEncoderLayer": _CLIP,
    "InternVLVisionLayer": _INTERN_VISION,
    "LlamaDecoderLayer": _LLAMA,
    "GemmaDecoderLayer": _LLAMA,
    "MistralDecoderLayer": _LLAMA,
    "Qwen2DecoderLayer": _LLAMA,
    "Qwen2_5_VLDecoderLayer": _QWEN,
    "Qwen2_5_VLVisionBlock": _QWEN_VISION,
    "Blip2EncoderLayer": _BLIP,
    "InstructBlipEncoderLayer": _BLIP,
    "OPTDecoderLayer": _OPT,
    "T5Block": _T5,
}


@dataclass(frozen=True)
class Site:
    """An output projection whose input columns come in ``units`` removable slices of ``width``."""

    kind: str
    out: nn.Linear  # [D, units * width]
    inputs: tuple[nn.Linear, ...]
    units: int  # heads (key/value heads under grouped queries), or neurons
    width: int  # columns of `out` per unit: head_dim * query heads per key/value head, or 1
    module: nn.Module
    skip: tuple[nn.Module, ...]
    paths: SitePaths
    block: nn.Module

    @property
    def attention(self) -> Any:
        """The module that computes the attention."""
        return _resolve(self.block, self.paths.owner)

    def input_segments(self, projection: nn.Linear) -> int:
        """How many stacked matrices ``projection`` holds: 3 for a fused qkv, else 1."""
        return 3 if self.kind != "neurons" and len(self.inputs) == 1 else 1

    @property
    def unit_params(self) -> int:
        """Parameters that go with one unit."""
        columns = self.width * self.out.out_features
        rows = sum(p.weight.numel() + (0 if p.bias is None else p.bias.numel()) for p in self.inputs) // self.units
        return columns + rows


@dataclass(frozen=True)
class Block:
    """One residual block of a tower."""

    module: nn.Module
    sites: dict[str, Site]  # in the order in which they run
    norm: nn.Module | None
    fixed: str = ""  # why it cannot be taken out of its list

    @property
    def params(self) -> int:
        return sum(p.numel() for p in self.module.parameters())


def _resolve(root: nn.Module, path: str) -> nn.Module:
    return attrgetter(path)(root) if path else root


def _linear(root: nn.Module, path: str) -> nn.Linear:
    return cast(nn.Linear, _resolve(root, path))


def _has(root: nn.Module, *paths: str) -> bool:
    try:
        for path in paths:
            _resolve(root, path)
    except AttributeError:
        return False
    return True


_HEAD_DIMS = ("head_dim", "attention_head_size", "key_value_proj_dim")  # what attention classes call it


def _bind_site(block: nn.Module, paths: SitePaths) -> Site:
    out = _linear(block, paths.out)
    inputs = tuple(_linear(block, path) for path in paths.inputs)
    if paths.kind == "neurons":
        units = out.in_features
    else:
        owner: Any = _resolve(block, paths.owner)
        head_dim: int = next(getattr(owner, name) for name in _HEAD_DIMS if getattr(owner, name, None))
        units = inputs[0].out_features // (3 * head_dim) if len(inputs) == 1 else inputs[1].out_features // head_dim
    return Site(
        kind=paths.kind,
        out=out,
        inputs=inputs,
        units=units,
        width=out.in_features // units if units else 0,
        module=_resolve(block, paths.module),
        skip=tuple(_resolve(block, path) for path in paths.skip),
        paths=paths,
        block=block,
    )


def bind_block(module: nn.Module) -> Block:
    """The sites of one block."""
    layout = LAYOUTS.get(type(module).__name__)
    if layout is None:
        raise ValueError(
            f"unknown block {type(module).__name__}; known: {', '.join(sorted(LAYOUTS))}. "
            "Describe its layout in vlprune_ext.anatomy.LAYOUTS."
        )
    sites = {paths.kind: _bind_site(module, paths) for paths in layout.sites if _has(module, paths.out, *paths.inputs)}
    in_front = bool(layout.norm) and (not layout.pre_norm or getattr(module, layout.pre_norm))
    return Block(module, sites, _resolve(module, layout.norm) if in_front else None, layout.fixed)


# --- towers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TowerPaths:
    """Where a family keeps one tower; paths are relative to the model, alternatives in order of preference."""

    blocks: tuple[str, ...]  # the nn.ModuleList of blocks
    config: str  # the tower's config, relative to model.config; "" = model.config
    before: tuple[str, ...] = ()  # modules whose output reaches nothing but the first block
    beside: tuple[str, ...] = ()  # modules that feed what comes after the first block and never change with the tower
    pool: str | None = None  # rows of the last block that are used: "first", "eot", "last", or what predicts "labels"
    feature_layer: str = ""  # config attribute (if it has it) that says whose output is used, if not the last's


@dataclass(frozen=True)
class Tower:
    """A stack of residual blocks of a model."""

    name: str
    blocks: tuple[Block, ...]
    container: nn.ModuleList
    prefix: str  # parameter names in the container start with "<prefix>."
    config: Any  # the tower's own
    root_config: Any  # the model's
    before: tuple[nn.Module, ...]
    beside: tuple[nn.Module, ...]
    paths: TowerPaths

    def __len__(self) -> int:
        return len(self.blocks)

    def shape(self) -> list[dict[str, int]]:
        """Units of every site, block by block."""
        return [{kind: site.units for kind, site in block.sites.items()} for block in self.blocks]

    def rows_read(self, inputs: Mapping[str, Tensor]) -> Tensor | int | None:
        """The rows of the last block's output that are used: one of each sample, or some [B, K]; None when all are."""
        if self.paths.pool == "first":
            return 0
        if self.paths.pool == "last":
            return -1
        if self.paths.pool == "eot":
            return self._eot_row(inputs)[:, None]
        if self.paths.pool == "labels" and "labels" in inputs:
            predicts = inputs["labels"][:, 1:] != IGNORED
            most = int(predicts.sum(1).max())
            # Their places first, then whatever fills the rows of samples that have fewer.
            return predicts.int().sort(dim=1, descending=True, stable=True).indices[:, :most]
        return None

    def _eot_row(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return _eot_position(inputs["input_ids"], self.config.eos_token_id)

    def taps(self) -> frozenset[int]:
        """Blocks whose output is read by more than the next block: the features that a language model sees."""
        value = getattr(self.root_config, self.paths.feature_layer, ()) if self.paths.feature_layer else ()
        layers = (value,) if isinstance(value, int) else tuple(value or ())
        # Entry 0 of `hidden_states` is what enters the first block, entry i + 1 is what leaves block i.
        return frozenset((layer if layer >= 0 else len(self) + 1 + layer) - 1 for layer in layers)

    @property
    def depth(self) -> int:
        """Blocks that are read: those after the last feature layer are not."""
        return max(self.taps(), default=len(self) - 1) + 1

    @property
    def cls(self) -> int:
        """How many class tokens are in front of the patches: what a vision tower is says that, not who reads it."""
        names = ("class_embedding", "cls_token")
        return int(any(hasattr(module, name) for module in self.before for name in names))

    def trim(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Drop the columns after the last end-of-text token of a batch: a causal tower never looks there."""
        if self.paths.pool != "eot":
            return inputs
        length = int(self._eot_row(inputs).max()) + 1
        return {name: value[:, :length] for name, value in inputs.items()}


def _eot_position(input_ids: Tensor, eos_token_id: int) -> Tensor:
    # CLIP checkpoints with the historical eos_token_id 2 pool at the highest token id.
    key = input_ids if eos_token_id == 2 else (input_ids == eos_token_id)
    return key.int().argmax(dim=-1)


# --- families --------------------------------------------------------------------------------------------------------


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


class TextConfig(Protocol):
    """What is read off the config of a language model."""

    vocab_size: int
    pad_token_id: int
    eos_token_id: int


@dataclass(frozen=True)
class Anatomy:
    """A model taken apart: its towers and its family's entry."""

    model: nn.Module
    family: Family

    @cached_property
    def towers(self) -> dict[str, Tower]:
        return {name: _bind_tower(self.model, name, paths) for name, paths in self.family.towers.items()}

    @property
    def head(self) -> nn.Module | None:
        return _resolve(self.model, self.family.head) if self.family.head else None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def text_config(self) -> TextConfig:
        config: Any = self.model.config
        return config.get_text_config()

    def embed(self, tower: str, inputs: dict[str, Tensor]) -> Tensor:
        """[B, E]: a tower's embeddings, before normalisation. Raises ValueError if it has none."""
        if tower not in self.family.embed:
            raise ValueError(f"tower: {type(self.model).__name__} has no embedding of tower {tower!r}")
        return self.family.embed[tower](self.model, inputs)

    def tower(self, name: str) -> Tower:
        if name not in self.towers:
            raise ValueError(
                f"tower: {type(self.model).__name__} has no tower {name!r}; its towers are {', '.join(self.towers)}"
            )
        return self.towers[name]

    def shape(self) -> dict[str, list[dict[str, int]]]:
        """Units of every site of every block: the fingerprint by which a plan knows its model."""
        return {name: tower.shape() for name, tower in self.towers.items()}


def _blocks_path(model: nn.Module, paths: TowerPaths) -> str | None:
    return next((path for path in paths.blocks if _has(model, path)), None)


def _bind_tower(model: nn.Module, name: str, paths: TowerPaths) -> Tower:
    prefix = _blocks_path(model, paths)
    if prefix is None:
        raise ValueError(f"{type(model).__name__}: no blocks of tower {name!r} at any of {', '.join(paths.blocks)}")
    container = cast(nn.ModuleList, _resolve(model, prefix))
    config: Any = model.config
    return Tower(
        name=name,
        blocks=tuple(bind_block(block) for block in container),
        container=container,
        prefix=prefix,
        config=_resolve(config, paths.config),
        root_config=config,
        before=tuple(_resolve(model, path) for path in paths.before if _has(model, path)),
        beside=tuple(_resolve(model, path) for path in paths.beside if _has(model, path)),
        paths=paths,
    )


def describe(model: nn.Module) -> Anatomy:
    """Take a transformers model apart.

    Raises ValueError for a class that is not in the table; `register` adds one.
    """
    name = type(model).__name__
    if name not in FAMILIES:
        raise ValueError(
            f"model: {name} is not known; known are {', '.join(sorted(FAMILIES))}. "
            "vlprune_ext.anatomy.register(class_name, Family(...)) adds one."
        )
    family = FAMILIES[name]
    while family.otherwise and not all(_blocks_path(model, paths) for paths in family.towers.values()):
        family = family.otherwise
    return Anatomy(model, family)
