"""Recovery: the loss by hand, and a pruned model that gets closer to the dense one."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from models import tiny
from torch.nn import functional as F

import vlprune_ext as vp
from vlprune_ext.anatomy import describe
from vlprune_ext.plan import Plan
from vlprune_ext.training.distillation import Weights, distillation_loss, kept_layers


def embedded(generator, depth):
    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return SimpleNamespace(
        embeddings={t: F.normalize(draw(6, 8), dim=-1) for t in ("vision", "text")},
        hidden={t: [draw(6, 5, 4) for _ in range(depth)] for t in ("vision", "text")},
    )


def test_the_loss_by_hand():
    generator = torch.Generator().manual_seed(0)
    student, teacher = embedded(generator, 2), embedded(generator, 3)
    kept = {"vision": [0, 2], "text": [1, 2]}
    a, b, c = 2.0, 30.0, 0.5
    loss = distillation_loss(student, teacher, torch.tensor(5.0), torch.tensor(7.0), kept, Weights(a, b, c))
    logits = 5 * student.embeddings["vision"] @ student.embeddings["text"].T
    wanted = 7 * teacher.embeddings["vision"] @ teacher.embeddings["text"].T
    diagonal = torch.arange(6)
    itc = -(logits.log_softmax(1)[diagonal, diagonal].mean() + logits.log_softmax(0)[diagonal, diagonal].mean()) / 2
    to_text = -(wanted.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    to_image = -(wanted.softmax(0) * logits.log_softmax(0)).sum(0).mean()
    feat = sum((student.embeddings[t] - teacher.embeddings[t]).square().mean() for t in ("vision", "text")) / 2
    hidden = sum(
        (student.hidden[t][i] - teacher.hidden[t][layer]).square().mean()
        for t in kept
        for i, layer in enumerate(kept[t])
    )
    expected = itc + a * (to_text + to_image) / 2 + b * feat + c * hidden / 2
    torch.testing.assert_close(loss, expected)


def test_kept_layers_follow_the_record():
    teacher = tiny.build("clip")
    student = copy.deepcopy(teacher)
    for layers in ([1], [2]):  # the second plan counts in what the first one left
        plan = Plan(describe(student).shape())
        plan.add("vision", "layer", layers[0], [])
        vp.apply(student, plan)
    assert kept_layers(student, teacher) == {"vision": [0, 2], "text": [0, 1, 2]}
    with pytest.raises(ValueError, match="expected the model that the student was pruned from"):
        kept_layers(tiny.build("siglip"), student)


def test_a_pruned_model_gets_closer_to_the_dense_one():
    teacher = tiny.build("clip")
    data = tiny.retrieval_data("clip", teacher, 32, texts_per_image=2)
    student = copy.deepcopy(teacher)
    plan = vp.Random(neurons_per_group=8, keep_layers=0.75).plan(student, data)
    vp.apply(student, plan)

    def distance():
        with torch.no_grad():
            a, b = (F.normalize(m.get_image_features(**data.images).pooler_output, dim=-1) for m in (student, teacher))
        return F.mse_loss(a, b).item()

    before, untouched = distance(), [p.clone() for p in teacher.parameters()]
    calls = []
    vp.distill(student, teacher, data, steps=30, batch_size=16, learning_rate=3e-3, progress=lambda *c: calls.append(c))
    assert distance() < 0.5 * before
    assert all(torch.equal(a, b) for a, b in zip(untouched, teacher.parameters(), strict=True))
    assert not student.training
    assert calls[-1][:2] == (30, 30)
    assert all(not m._forward_hooks for m in describe(student).tower("vision").container)


def test_the_same_seed_gives_the_same_student():
    teacher = tiny.build("clip")
    data = tiny.retrieval_data("clip", teacher, 12)
    students = [copy.deepcopy(teacher) for _ in range(2)]
    for student in students:
        vp.distill(student, teacher, data, steps=3, batch_size=4, learning_rate=1e-3, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(students[0].parameters(), students[1].parameters(), strict=True))


def test_bad_input():
    clip, llava = tiny.build("clip"), tiny.build("llava")
    data = tiny.retrieval_data("clip", clip, 4)
    with pytest.raises(ValueError, match="student: LlavaForConditionalGeneration does not embed"):
        vp.distill(llava, clip, data)
    with pytest.raises(ValueError, match="steps: 0"):
        vp.distill(clip, clip, data, steps=0)
