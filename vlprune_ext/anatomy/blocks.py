"""Residual blocks: locations of their heads and neurons, one small layout per class of block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, cast

from torch import nn


@dataclass(frozen=True)
class SitePaths:
    """Locations of one site in a block; module paths are relative to the block.

    Parameters
    ----------
    kind : {"head", "cross_head", "neurons"}
        Kind of units.
    module : str
        Module that returns the output projection's result.
    out : str
        The output projection, a linear layer.
    inputs : tuple of str
        Linear layers that produce its input.
    skip : tuple of str
        Modules that need not run once the output projection's result is known.
    owner : str
        Module that keeps the head counts.
    counts : tuple of str
        Attributes of ``owner`` equal to a number of heads.
    widths : tuple of str
        Attributes of ``owner`` equal to heads * head_dim.
    removable : bool
        Whether the class's own forward works with fewer units.
    free_head_dim : bool
        Whether the config can set head_dim apart from the number of heads.
    interface : bool
        Whether the attention calls the function that its config names (transformers' `AttentionInterface`).
    """

    kind: str
    module: str
    out: str
    inputs: tuple[str, ...]
    skip: tuple[str, ...] = ()
    owner: str = ""
    counts: tuple[str, ...] = ()
    widths: tuple[str, ...] = ()
    removable: bool = True
    free_head_dim: bool = False
    interface: bool = True


@dataclass(frozen=True)
class Layout:
    """One class of transformer block.

    Parameters
    ----------
    sites : tuple of SitePaths
        In the order in which they run.
    norm : str
        Path of the norm before the attention; "" for post-norm blocks.
    pre_norm : str
        Attribute of the block that is False where ``norm`` comes after the attention; "": it never does.
    fixed : str
        Why a block cannot be removed from its list; "": it can.
    """

    sites: tuple[SitePaths, ...]
    norm: str = ""
    pre_norm: str = ""
    fixed: str = ""


def _pre_norm(attention: str, qkv: tuple[str, ...], out: str, norms: tuple[str, str], up, down, **attention_fields):
    """Return the layout of a pre-norm block with one attention and one MLP."""
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
    """Return the site of a BERT self- or cross-attention below ``root``."""
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
    """Return the site of a T5 self- or cross-attention at ``root``."""
    # Every block adds the same position bias [heads, T, T], so that all must have the same number of heads.
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
    """Return the site of the T5 MLP that is the block's layer ``place``."""
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
# Pre- or post-norm by config, so that the norms always run.
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
    """Output projection whose input columns split into ``units`` removable slices of ``width``.

    Parameters
    ----------
    kind : {"head", "cross_head", "neurons"}
        Kind of units.
    out : nn.Linear
        The output projection, weight [D, units * width].
    inputs : tuple of nn.Linear
        Layers that produce its input.
    units : int
        Heads (key/value heads under grouped-query attention), or neurons.
    width : int
        Columns of ``out`` per unit: head_dim * query heads per key/value head, or 1.
    module : nn.Module
        Returns the output projection's result.
    skip : tuple of nn.Module
        Need not run once that result is known.
    paths : SitePaths
        The site's entry in the table.
    block : nn.Module
        The block.
    """

    kind: str
    out: nn.Linear
    inputs: tuple[nn.Linear, ...]
    units: int
    width: int
    module: nn.Module
    skip: tuple[nn.Module, ...]
    paths: SitePaths
    block: nn.Module

    @property
    def attention(self) -> Any:
        """The attention module."""
        return resolve(self.block, self.paths.owner)

    def input_segments(self, projection: nn.Linear) -> int:
        """Return how many stacked matrices ``projection`` holds: 3 for a fused qkv projection, else 1."""
        return 3 if self.kind != "neurons" and len(self.inputs) == 1 else 1

    @property
    def unit_params(self) -> int:
        """Number of parameters removed with one unit."""
        columns = self.width * self.out.out_features
        rows = sum(p.weight.numel() + (0 if p.bias is None else p.bias.numel()) for p in self.inputs) // self.units
        return columns + rows


@dataclass(frozen=True)
class Block:
    """One residual block of a tower.

    Parameters
    ----------
    module : nn.Module
        The block.
    sites : dict of Site
        By kind, in the order in which they run.
    norm : nn.Module or None
        The norm before the attention, of a pre-norm block.
    fixed : str
        Why it cannot be removed from its list; "": it can.
    """

    module: nn.Module
    sites: dict[str, Site]
    norm: nn.Module | None
    fixed: str = ""

    @property
    def params(self) -> int:
        """Number of the block's parameters."""
        return sum(p.numel() for p in self.module.parameters())


def resolve(root: nn.Module, path: str) -> nn.Module:
    """Return the submodule or attribute at a dotted path; ``root`` itself for ""."""
    return attrgetter(path)(root) if path else root


def _linear(root: nn.Module, path: str) -> nn.Linear:
    """Return the linear layer at a dotted path."""
    return cast(nn.Linear, resolve(root, path))


def has(root: nn.Module, *paths: str) -> bool:
    """Return whether all dotted paths exist below ``root``."""
    try:
        for path in paths:
            resolve(root, path)
    except AttributeError:
        return False
    return True


_HEAD_DIMS = ("head_dim", "attention_head_size", "key_value_proj_dim")  # its names in attention classes


def _bind_site(block: nn.Module, paths: SitePaths) -> Site:
    """Resolve the paths of a site in one block."""
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
    """Return a block with its sites; raise ValueError for a class without a layout."""
    layout = LAYOUTS.get(type(module).__name__)
    if layout is None:
        raise ValueError(
            f"unknown block {type(module).__name__}; known: {', '.join(sorted(LAYOUTS))}. "
            "Describe its layout in vlprune_ext.anatomy.LAYOUTS."
        )
    sites = {paths.kind: _bind_site(module, paths) for paths in layout.sites if has(module, paths.out, *paths.inputs)}
    in_front = bool(layout.norm) and (not layout.pre_norm or getattr(module, layout.pre_norm))
    return Block(module, sites, resolve(module, layout.norm) if in_front else None, layout.fixed)
