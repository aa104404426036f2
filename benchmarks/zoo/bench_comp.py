"""CoMP on the zoo's models: what it adds to a training step, and what a model pruned by it gains in time and memory.

Run: ``make bench``, or ``pytest benchmarks -o python_files='bench_*.py'`` to only look.
"""

from __future__ import annotations

import copy
import functools
import multiprocessing
import statistics
from pathlib import Path

import pytest
import torch
import transformers
from memory import peak_mb
from safetensors.torch import load_file, save_file

import vlprune_ext as vp
from vlprune_ext.anatomy.flops import count_flops
from vlprune_ext.checkpoint.models import load_model
from vlprune_ext.tokens.planned import PlannedTokens
from vlprune_ext.training.trainer import WithLoss

SOURCES = {"clip-digits": "digits", "blip-digits": "digits-questions", "llava-digits": "digits-questions"}
METRICS = {"clip-digits": "recall@1", "blip-digits": "exact_match", "llava-digits": "exact_match"}
BATCH, VALIDATION, SCORED = 64, 256, 64
FLOPS = 0.3


@functools.cache
def load(name: str, device: str) -> tuple[torch.nn.Module, dict[str, vp.Data]]:
    loaded = load_model(name, device=device)
    limits = {"train": BATCH, "validation": VALIDATION, "calibration": SCORED}
    given = {"model": loaded.model, "processor": loaded.processor}
    data = {split: vp.load_data(SOURCES[name], split, limit=limit, **given) for split, limit in limits.items()}
    return loaded.model, data


def trainer(model: torch.nn.Module, data: vp.Data):
    """One training step: loss, gradients, AdamW."""
    loss = WithLoss(model, data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    device = next(model.parameters()).device
    batch = {key: value.to(device) for key, value in data.batch(torch.arange(BATCH)).items()}

    def step() -> None:
        optimizer.zero_grad()
        loss(**batch)["loss"].backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("name", SOURCES)
def test_training_step(name, device, compare, record, stopwatch):
    """Every mask of the model at work, beside the plain step; and the share of a stage that falls on each step."""
    dense, data = load(name, device.type)
    model, plain = (copy.deepcopy(dense).train() for _ in range(2))
    method = vp.CoMP(flops=FLOPS, objective=METRICS[name], calibration=data["calibration"])
    run = method._begin(model, data["validation"])
    try:
        assert run.open_stage()
        run.close_stage(0)

        def stage() -> None:
            run.open_stage()
            run.close_stage(0)

        seconds = statistics.median(stopwatch(stage) for _ in range(5))
        scoring = statistics.median(stopwatch(run._examine) for _ in range(5))
        found = run._examine()
        for mode in run.modes.values():
            mode.raise_threshold(found, run._budget(), run._goal())
            mode.soften(0.5)
        row = compare(
            "CoMP training step",
            f"{name}, batch {BATCH}, all of its masks half faded",
            trainer(model, data["train"]),
            trainer(plain, data["train"]),
            graph=False,
            baseline_name="plain step",
            dtype=torch.float32,
            rounds=15,
        )
    finally:
        method.detach()
    plain, interval = row["baseline ms"], method.interval
    shares = {
        "masks": row["ms"] / plain - 1,
        "scoring": 1e3 * scoring / interval / plain,
        "trying and judging modes": 1e3 * (seconds - scoring) / interval / plain,
    }
    every = plain * (1 + sum(shares.values()))
    record(
        "CoMP training step and its share of a stage",
        f"{name}, batch {BATCH}, a stage every {interval} steps",
        dtype="float32",
        ms=every,
        baseline="plain step",
        **{"baseline ms": plain, "ratio": plain / every},
        notes=f"{every / plain - 1:.1%} more: {', '.join(f'{what} {share:.1%}' for what, share in shares.items())}; a"
        f" stage, with {VALIDATION} scenes to judge and {SCORED} to score, takes {1e3 * seconds:.0f} ms",
    )


@functools.cache
def prune(name: str, device: str, tokens: str) -> torch.nn.Module:
    """A model of a third of the FLOPs; its accuracy is not at issue."""
    dense, data = load(name, device)
    method = vp.CoMP(flops=FLOPS, train=False, objective=METRICS[name], tokens=tokens, rho=0.0, step=0.1)
    model = copy.deepcopy(dense)
    return vp.apply(model, method.plan(model, data["calibration"]), round_to=1)


def inputs(name: str, device: str, rows: int) -> dict[str, torch.Tensor]:
    """What a model's loss takes."""
    _, data = load(name, device)
    return {key: value.to(device) for key, value in data["train"].batch(torch.arange(rows)).items()}


@torch.no_grad()
def forward(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> None:
    images = {"pixel_values": batch["pixel_values"]}
    texts = {key: value for key, value in batch.items() if key not in images}
    WithLoss(model, vp.Data("", "", images, texts, torch.arange(len(batch["pixel_values"]))))(**batch)


def peak_of_forward(folder: str, device: str) -> float:
    model = load_model(folder, device=device).model
    batch = {key: value.to(device) for key, value in load_file(f"{folder}/batch.bin").items()}
    with vp.prune_tokens(model):
        return peak_mb(lambda: forward(model, batch), device)


def peak_of_process(model: torch.nn.Module, batch: dict[str, torch.Tensor], folder: Path) -> float:
    """`peak_of_forward` in a process of its own, whose memory nothing else has raised before."""
    vp.save_pruned(model, folder)
    save_file({key: value.cpu().contiguous() for key, value in batch.items()}, folder / "batch.bin")
    device = next(model.parameters()).device.type
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_of_forward, (str(folder), device))


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("tokens", ["threshold", "keep"])
@pytest.mark.parametrize("name", SOURCES)
def test_pruned(name, tokens, rows, device, compare, tmp_path):
    """A forward of the pruned model beside that of the dense one."""
    dense, model = load(name, device.type)[0].eval(), prune(name, device.type, tokens).eval()
    batch = inputs(name, device.type, rows)
    left = model.vlprune["plans"][-1]["plan"]["method"]["reached"]["flops"]
    pair = (model, dense) if rows > 1 else ()
    memory = [peak_of_process(m, batch, tmp_path / str(i)) for i, m in enumerate(pair)]
    peaks = {"peak_mb": memory[0], "dense_peak_mb": memory[1]} if memory else {}
    with vp.prune_tokens(model):
        compare(
            "CoMP forward",
            f"{name}, batch {rows}, tokens by {tokens}",
            functools.partial(forward, model, batch),
            functools.partial(forward, dense, batch),
            graph=False,
            baseline_name="dense",
            dtype=torch.float32,
            flops_left=left,
            notes=f"{left:.0%} of the FLOPs"
            + (f"; peak {memory[0]:.0f} MB, dense {memory[1]:.0f} MB" if memory else ""),
            **peaks,
        )


@functools.cache
def tower(device: str) -> torch.nn.Module:
    """A ViT-B/16 as CLIP has it, of random weights."""
    torch.manual_seed(0)
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(patch_size=16)).eval().to(device)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 8])
def test_tokens_of_a_large_tower(rows, device, compare):
    """Half of the tokens leave behind the fourth block, half of the rest behind the eighth."""
    model = tower(device.type)
    layers = model.config.num_hidden_layers
    plan = PlannedTokens({"vision": {"keep": [4 ** -(layer // 4 / 2) for layer in range(1, layers + 1)]}})
    pixels = torch.randn(rows, 3, 224, 224, device=device)
    dense = count_flops(lambda: model(pixel_values=pixels))
    with vp.prune_tokens(model, plan):
        left = count_flops(lambda: model(pixel_values=pixels)) / dense

    def pruned() -> None:  # the baseline is the same model: hooks come and go each time
        with vp.prune_tokens(model, plan):
            model(pixel_values=pixels)

    compare(
        "CoMP's tokens in a ViT-B/16",
        f"batch {rows}, 197 tokens, then half, then a quarter",
        pruned,
        lambda: model(pixel_values=pixels),
        graph=False,
        baseline_name="dense",
        flops_left=left,
        notes=f"{left:.0%} of the FLOPs",
    )
