"""Residual blocks: where their heads and neurons are, one small layout for each class of block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, cast

from torch import nn


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
        return resolve(self.block, self.paths.owner)

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


def resolve(root: nn.Module, path: str) -> nn.Module:
    return attrgetter(path)(root) if path else root


def _linear(root: nn.Module, path: str) -> nn.Linear:
    return cast(nn.Linear, resolve(root, path))


def has(root: nn.Module, *paths: str) -> bool:
    try:
        for path in paths:
            resolve(root, path)
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
        owner: Any = resolve(block, paths.owner)
        head_dim: int = next(getattr(owner, name) for name in _HEAD_DIMS if getattr(owner, name, None))
        units = inputs[0].out_features // (3 * head_dim) if len(inputs) == 1 else inputs[1].out_features // head_dim
    return Site(
        kind=paths.kind,
        out=out,
        inputs=inputs,
        units=units,
        width=out.in_features // units if units else 0,
        module=resolve(block, paths.module),
        skip=tuple(resolve(block, path) for path in paths.skip),
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
    sites = {paths.kind: _bind_site(module, paths) for paths in layout.sites if has(module, paths.out, *paths.inputs)}
    in_front = bool(layout.norm) and (not layout.pre_norm or getattr(module, layout.pre_norm))
    return Block(module, sites, resolve(module, layout.norm) if in_front else None, layout.fixed)
