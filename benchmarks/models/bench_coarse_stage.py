"""ECoFLaP's coarse stage: zeroth-order scores by replay, beside perturbing a copy and running the whole model."""

from __future__ import annotations

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from vlprune_ext import ops
from vlprune_ext.anatomy import describe
from vlprune_ext.data import Data
from vlprune_ext.objectives import LMLoss
from vlprune_ext.weights.matrices import matrices
from vlprune_ext.weights.sensitivity import perturbation, zeroth_order


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
