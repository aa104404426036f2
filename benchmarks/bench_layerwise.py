"""Layer-wise pruning ops beside the published code, and beside a plain copy, at LLaVA-1.5-7B's shapes.

Each op has two rows: against what it replaces, and against copying (or reading) the same tensor, which bounds what any
kernel can do. Pruning needs a weight that is whole before each round, and the harness has no untimed place to restore
it between the baseline and ours: so "copy + prune" is timed on both sides, into a tensor of its own, and the row beside
a copy says what the copy costs (ratio 0.5: pruning costs as much again). Ours looks at the data for NaNs, too, as users
call it. Scores are random, nearly without ties; how long ours takes depends on them little.
"""

from __future__ import annotations

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from vlprune_ext import _native, ops
from vlprune_ext.anatomy import describe
from vlprune_ext.data import Data
from vlprune_ext.matrices import matrices
from vlprune_ext.objectives import LMLoss
from vlprune_ext.sensitivity import perturbation, zeroth_order

SHAPES = [(4096, 4096), (11008, 4096)]
DTYPE = torch.bfloat16


def make(shape, device):
    """The weight of a layer and a scale of its columns."""
    return (torch.randn(shape, device=device) * 0.02).to(DTYPE), torch.rand(shape[1], device=device) + 0.1


def bytes_of(*tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def rounds_of(device, on_cpu):
    return 15 if device.type == "cuda" else on_cpu


def smallest_by_sort(weight, scale, k):
    """As Wanda's published code (arXiv 2306.11695) does, with the scale instead of its square."""
    metric = weight.float().abs() * scale
    mask = torch.zeros_like(metric, dtype=torch.bool)
    indices = torch.sort(metric, dim=-1, stable=True)[1][:, :k]
    mask.scatter_(1, indices, True)
    weight[mask] = 0


def nm_by_loop(weight, scale, n, m):
    """As Wanda's published code does: one topk for every m columns."""
    metric = weight.float().abs() * scale
    mask = torch.zeros_like(metric, dtype=torch.bool)
    for ii in range(0, metric.shape[1], m):
        tmp = metric[:, ii : ii + m].float()
        mask.scatter_(1, ii + torch.topk(tmp, n, dim=1, largest=False)[1], True)
    weight[mask] = 0


PRUNE = {
    "prune_smallest_ row": (
        lambda weight, scale: ops.prune_smallest_(weight, scale, weight.shape[1] // 2),
        lambda weight, scale: smallest_by_sort(weight, scale, weight.shape[1] // 2),
        "stable sort, scatter, index",
    ),
    "prune_nm_ 2:4": (
        lambda weight, scale: ops.prune_nm_(weight, scale, 2, 4),
        lambda weight, scale: nm_by_loop(weight, scale, 2, 4),
        "topk in a loop",
    ),
}


@pytest.mark.parametrize("beside", ["published", "copy"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("what", PRUNE)
def test_prune(what, shape, beside, device, compare):
    weight, scale = make(shape, device)
    work, other = torch.empty_like(weight), torch.empty_like(weight)
    ours, published, name = PRUNE[what]

    def copy_and_prune():
        ours(work.copy_(weight), scale)

    def copy_and_published():
        published(other.copy_(weight), scale)

    alone = beside == "copy"
    compare(
        f"copy + {what} / copy" if alone else f"copy + {what}",
        f"{shape[0]}x{shape[1]}",
        copy_and_prune,
        (lambda: other.copy_(weight)) if alone else copy_and_published,
        baseline_name="copy_" if alone else f"copy + {name}",
        dtype=DTYPE,
        moved=2 * bytes_of(weight, work),  # read and written by the copy, then by the op
        rounds=rounds_of(device, 9 if alone else 3),
        notes="both sides start with the copy" if not alone else "the baseline is the copy alone",
    )
    if not alone:
        assert int((work == 0).sum()) == int((other == 0).sum()) >= work.numel() // 2


@pytest.mark.parametrize("beside", ["published", "copy"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_perturb(shape, beside, device, compare):
    weight, _ = make(shape, device)
    # Into given outputs, all of them: on a CPU, the page faults of new ones would hide what is compared.
    z, plus, minus = (torch.empty_like(weight) for _ in range(3))

    def published():
        z.normal_()
        torch.add(weight, z, alpha=1e-3, out=plus)
        torch.sub(weight, z, alpha=1e-3, out=minus)

    def copy():  # both ends, as ours
        plus.copy_(weight)
        minus.copy_(weight)

    alone = beside == "copy"
    compare(
        "perturb / copy" if alone else "perturb",
        f"{shape[0]}x{shape[1]}",
        lambda: _native.perturb(weight, plus, minus, 1, 2, 1e-3),
        copy if alone else published,
        baseline_name="copy_, twice" if alone else "normal_, w + eps z, w - eps z",
        dtype=DTYPE,
        moved=3 * bytes_of(weight),
        rounds=rounds_of(device, 5),
    )


@pytest.mark.parametrize("beside", ["published", "reading"])
def test_column_norm_sq(beside, device, compare):
    x = torch.randn(2048, 4096, device=device).to(DTYPE)
    acc = torch.zeros(x.shape[1], device=device)
    as_integers = x.view(torch.int16)
    alone = beside == "reading"
    compare(
        "column_norm_sq_ / reading" if alone else "column_norm_sq_",
        "x=[2048, 4096]",
        lambda: ops.column_norm_sq_(acc, x),
        as_integers.amax if alone else lambda: acc.add_(x.float().pow(2).sum(0)),
        baseline_name="amax of int16" if alone else "x.float().pow(2).sum(0)",
        dtype=DTYPE,
        moved=bytes_of(x),
        rounds=rounds_of(device, 9),
    )


# --- ECoFLaP's coarse stage ------------------------------------------------------------------------------------------


def llava_of_12_and_12(device):
    """A LLaVA of 12 vision and 12 language blocks of width 256, random weights, and questions about pictures."""
    image_id, patches = 90, (96 // 8) ** 2
    block = {"hidden_size": 256, "num_hidden_layers": 12, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **block, "intermediate_size": 1024}
        | {"image_size": 96, "patch_size": 8},
        text_config={"model_type": "llama", **block, "intermediate_size": 688, "vocab_size": 100}
        | {"max_position_embeddings": 512},
        image_token_id=image_id,
        image_seq_length=patches,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval().to(device)
    rows, words = 8, 16
    ids = torch.cat([torch.full((rows, patches), image_id), torch.randint(3, 80, (rows, words))], dim=1)
    labels = ids.clone()
    labels[:, : patches + words // 2] = -100
    texts = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    data = Data("random", "calibration", {"pixel_values": torch.randn(rows, 3, 96, 96)}, texts, torch.arange(rows))
    return model, data


@torch.no_grad()
def perturb_a_copy(anatomy, objective, data, chosen):
    """As published: one matrix and one sign at a time, the whole model. [M]"""
    found = []
    for matrix in chosen:
        ends = []
        for sign in (1, -1):
            change = perturbation(matrix, 0, sign, draws=1)
            pair = ops.perturb(matrix.weight, change.seed, change.tensor_id, change.eps)
            kept, matrix.module.weight.data = matrix.module.weight.data, pair[0 if sign > 0 else 1]
            ends.append(objective.run(anatomy, matrix.tower, data, 8))
            matrix.module.weight.data = kept
        found.append((ends[0] - ends[1]).abs().mean().item() / (2 * change.eps))
    return found


def test_coarse_stage(device, stopwatch, record):
    """Zeroth order for all matrices of every third block (on a GPU of all), one draw, both ways."""
    model, data = llava_of_12_and_12(device)
    anatomy, objective = describe(model), LMLoss()
    every = matrices(anatomy)
    chosen = every if device.type == "cuda" else [m for m in every if m.layer % 3 == 1]  # on average as deep as all
    stack = 128 if device.type == "cuda" else 8

    def replayed(of):
        return zeroth_order(anatomy, objective, data, of, draws=1, realised=False, batch_size=8, stacked_rows=stack)

    perturb_a_copy(anatomy, objective, data, chosen[:1])  # warm up, both
    replayed(chosen[:2])
    naive, by_replay = [], []
    seconds = stopwatch(lambda: naive.append(perturb_a_copy(anatomy, objective, data, chosen)))
    ours = stopwatch(lambda: by_replay.append(replayed(chosen)))
    torch.testing.assert_close(by_replay[0].slope, torch.tensor(naive[0], dtype=torch.float64), rtol=0.05, atol=2e-3)
    naive_runs = 2 * len(chosen) * len(data) * 24
    record(
        "coarse stage, zeroth order",
        f"LLaVA of 12 + 12 blocks of width 256, {len(chosen)} of {len(every)} matrices, {len(data)} samples",
        dtype="float32",
        **{"ms": ours * 1e3, "baseline": "perturb a copy, whole model", "baseline ms": seconds * 1e3},
        ratio=seconds / ours,
        block_runs=by_replay[0].block_runs,
        naive_block_runs=naive_runs,
        notes=f"of its own tower {by_replay[0].block_runs} block runs; naively {naive_runs} of both",
    )
