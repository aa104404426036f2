"""FastV on a whole LLaVA: what a prefill saves, what that takes in memory, and what the hooks cost when nothing leaves.

The model has LLaVA-1.5-7B's shape and random weights on a GPU, fewer and narrower blocks on a CPU; 576 visual tokens.

Run: ``make bench``, or ``pytest benchmarks -o python_files='bench_*.py'`` to only look.
"""

from __future__ import annotations

import functools
import multiprocessing
import statistics
from contextlib import nullcontext

import pytest
import torch
import transformers
from memory import peak_mb

import vlprune_ext as vp
from vlprune_ext.anatomy.flops import count_flops

IMAGE, TEXT = 4, 64
VISION = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}
SHAPES = {
    "cuda": {
        "name": "LLaVA-1.5-7B",
        "vision": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
        "text": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
        "dtype": torch.bfloat16,
    },
    "cpu": {
        "name": "LLaVA, 16 blocks of 768",
        "vision": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4},
        "text": {"hidden_size": 768, "intermediate_size": 2064, "num_hidden_layers": 16, "num_attention_heads": 12},
        "dtype": torch.float32,
    },
}
METHOD = vp.FastV(layer=2, keep=0.25)


@functools.cache
def build(device: str, copy: int = 0) -> torch.nn.Module:
    """The model, once; another ``copy`` has the same weights and memory of its own."""
    shape = SHAPES[device]
    config = transformers.LlavaConfig(
        vision_config={**VISION, **shape["vision"]},
        text_config={"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096, **shape["text"]},
        image_token_index=IMAGE,
    )
    config.dtype = shape["dtype"]
    with torch.device(device):
        torch.manual_seed(0)
        return transformers.AutoModelForImageTextToText.from_config(config, dtype=shape["dtype"]).eval()


def make(device: str) -> dict:
    """One image and a question."""
    torch.manual_seed(0)
    ids = torch.cat([torch.tensor([1]), torch.full((576,), IMAGE), torch.randint(10, 30000, (TEXT - 1,))])[None]
    pixels = torch.randn(1, 3, 336, 336, dtype=SHAPES[device]["dtype"])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return {name: value.to(device) for name, value in inputs.items()}


def prefill(model, inputs):
    return model(**inputs, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def peak_of_prefill(device: str, pruned: bool) -> float:
    model, inputs = build(device), make(device)
    with vp.prune_tokens(model, METHOD) if pruned else nullcontext():
        return peak_mb(lambda: prefill(model, inputs), device)


def peak_of_process(device: str, pruned: bool) -> float:
    if device == "cuda":
        return peak_of_prefill(device, pruned)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_of_prefill, (device, pruned))


@torch.no_grad()
def test_prefill(device, compare):
    """Time beside the FLOPs saved, and the memory that it takes."""
    kind = device.type
    turns = 1 if kind == "cuda" else 3  # an allocator counts, a process's memory varies
    memory = {
        pruned: statistics.median(peak_of_process(kind, pruned) for _ in range(turns)) for pruned in (False, True)
    }
    model, inputs = build(kind), make(kind)
    with vp.prune_tokens(model, METHOD):
        fewer = count_flops(lambda: prefill(model, inputs))
    every = count_flops(lambda: prefill(model, inputs))

    def pruned():
        with vp.prune_tokens(model, METHOD):
            prefill(model, inputs)

    compare(
        "prune_tokens prefill",
        f"{SHAPES[kind]['name']}, 576 visual tokens, FastV keep 0.25 after 2",
        pruned,
        lambda: prefill(model, inputs),
        graph=False,
        baseline_name="all tokens",
        dtype=SHAPES[kind]["dtype"],
        flops=fewer,
        flops_saved=1 - fewer / every,
        peak_mb=memory[True],
        dense_peak_mb=memory[False],
        notes=f"{1 - fewer / every:.1%} of the FLOPs saved; peak {memory[True]:.0f} MB, dense {memory[False]:.0f} MB",
    )


@torch.no_grad()
@pytest.mark.parametrize("what", ["prefill", "token"])
def test_hooks(what, device, compare):
    """Everything kept: the hooks alone, of a prefill and of one generated token."""
    kind = device.type
    model, inputs = build(kind), make(kind)
    method = vp.FastV(layer=2, keep=1.0)
    cache = prefill(model, inputs).past_key_values
    step = {"input_ids": inputs["input_ids"][:, -1:], "past_key_values": cache}

    def one_token():
        model(**step)
        cache.crop(-1)

    run = one_token if what == "token" else lambda: prefill(model, inputs)
    hooked = vp.prune_tokens(model, method)
    with hooked:
        # Hooks stay for all rounds; the baseline runs a model without any.
        bare = build(kind, 1)
        dense = prefill(bare, inputs).past_key_values
        other = {"input_ids": step["input_ids"], "past_key_values": dense}

        def bare_token():
            bare(**other)
            dense.crop(-1)

        compare(
            f"prune_tokens keep all, {what}",
            f"{SHAPES[kind]['name']}, 576 visual tokens",
            run,
            bare_token if what == "token" else lambda: prefill(bare, inputs),
            graph=False,
            baseline_name="no hooks",
            dtype=SHAPES[kind]["dtype"],
            rounds=15,
        )
