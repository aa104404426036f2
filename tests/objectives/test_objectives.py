"""Objectives against plain definitions."""

from __future__ import annotations

import pytest
import torch
from models import tiny
from torch.nn import functional as F

import vlprune_ext as vp
from vlprune_ext.anatomy import describe
from vlprune_ext.objectives import OBJECTIVES, Contrastive, LMLoss, Part, Retrieval, ZeroShot, objective_named


@pytest.fixture
def clip(device):
    model = tiny.build("clip").to(device)
    return describe(model), tiny.retrieval_data("clip", model, 12, texts_per_image=2)


def embeddings(anatomy, data):
    """(image [I, E], text [T, E]) by the model's own forward."""
    with torch.no_grad():
        out = anatomy.model(**data.images, **data.texts)
    return out.image_embeds, out.text_embeds


def test_recall(clip):
    anatomy, data = clip
    image, text = embeddings(anatomy, data)
    scores = image @ text.T  # [I, T]
    own = data.image_of_text == torch.arange(data.n_images, device=text.device)[:, None]
    report = Retrieval(at=(1, 5)).report(anatomy, data, 5)
    for k in (1, 5):
        to_text = [own[i][scores[i].topk(k).indices].any().item() for i in range(data.n_images)]
        to_image = [(data.image_of_text[t] in scores[:, t].topk(k).indices) for t in range(len(data))]
        expected = (sum(to_text) / len(to_text), sum(to_image) / len(to_image))
        assert report[f"image_to_text_recall@{k}"] == pytest.approx(expected[0])
        assert report[f"text_to_image_recall@{k}"] == pytest.approx(expected[1])
        assert report[f"recall@{k}"] == pytest.approx(sum(expected) / 2)


@pytest.mark.parametrize("at", [(1,), (1, 5, 10)])
def test_per_sample_recall_averages_to_the_report(clip, at):
    anatomy, data = clip
    image, text = embeddings(anatomy, data)
    objective = Retrieval(at=at)
    report = objective.report(anatomy, data, 4)
    mean = sum(report[f"recall@{k}"] for k in at) / len(at)
    for tower, outputs, other in (("vision", image, text), ("text", text, image)):
        values = objective.values(anatomy, tower, outputs, other, data)
        assert values.shape == (data.n_images,)
        assert values.mean().item() == pytest.approx(mean)


def test_contrastive_equals_the_models_own_loss(device):
    model = tiny.build("clip").to(device)
    data = tiny.retrieval_data("clip", model, 9)
    with torch.no_grad():
        loss = model(**data.images, **data.texts, return_loss=True).loss.item()
    assert vp.evaluate(model, data, "contrastive")["contrastive_loss"] == pytest.approx(loss, abs=1e-5)


def test_contrastive_with_several_texts(clip):
    anatomy, data = clip
    image, text = embeddings(anatomy, data)
    logits = anatomy.model.logit_scale.exp() * image @ text.T
    own = data.image_of_text == torch.arange(data.n_images, device=text.device)[:, None]
    to_text = logits.masked_fill(~own, -torch.inf).logsumexp(1) - logits.logsumexp(1)
    to_image = -F.cross_entropy(logits.T, data.image_of_text)
    expected = (to_text.mean() + to_image) / 2
    for tower, outputs, other in (("vision", image, text), ("text", text, image)):
        values = Contrastive().values(anatomy, tower, outputs, other, data)
        torch.testing.assert_close(values.mean(), expected, rtol=0, atol=1e-5)


def test_margin(clip):
    anatomy, data = clip
    image, text = embeddings(anatomy, data)
    scores = image @ text.T
    own = data.image_of_text == torch.arange(data.n_images, device=text.device)[:, None]
    to_text = scores.masked_fill(~own, -9).amax(1) - scores.masked_fill(own, -9).amax(1)
    to_image = scores.masked_fill(~own, -9).amax(0) - scores.masked_fill(own, -9).amax(0)
    values = Contrastive("margin").values(anatomy, "vision", image, text, data)
    torch.testing.assert_close(values.mean(), (to_text.mean() + to_image.mean()) / 2, rtol=0, atol=1e-5)


def test_zero_shot(clip):
    anatomy, data = clip
    image, _ = embeddings(anatomy, data)
    with torch.no_grad():
        prompt = F.normalize(anatomy.model.get_text_features(**data.classes.texts).pooler_output, dim=-1)
    centres = torch.stack([prompt[data.classes.class_of_prompt == c].mean(0) for c in range(len(data.classes))])
    expected = ((image @ F.normalize(centres, dim=-1).T).argmax(1) == data.labels).float().mean().item()
    assert vp.evaluate(anatomy.model, data, ZeroShot())["zero_shot_accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["llava", "llama"])
def test_lm_loss_equals_the_models_own(name, device):
    model = tiny.build(name).to(device)
    data = tiny.retrieval_data(name, model, 5)
    anatomy = describe(model)
    values = LMLoss().run(anatomy, "text", data, 2)
    for i in range(len(data)):  # alone, so that the model's own mean is over one sample
        with torch.no_grad():
            loss = model(**data.batch(torch.tensor([i]))).loss
        torch.testing.assert_close(-values[i], loss, rtol=0, atol=1e-4)


def test_lm_loss_of_blip(device):
    model = tiny.build("blip_vqa").to(device)
    data = tiny.retrieval_data("blip_vqa", model, 4)
    values = LMLoss().run(describe(model), "decoder", data, 3)
    for i in range(len(data)):
        batch = data.batch(torch.tensor([i]))
        labels = batch["labels"]
        batch["decoder_input_ids"] = labels.clamp(min=0)
        batch["decoder_attention_mask"] = (labels >= 0).long()
        text, image = model.text_encoder, model.vision_model
        with torch.no_grad():
            seen = image(batch["pixel_values"]).last_hidden_state
            question = text(batch["input_ids"], batch["attention_mask"], encoder_hidden_states=seen)[0]
            logits = model.text_decoder(
                input_ids=batch["decoder_input_ids"],
                attention_mask=batch["decoder_attention_mask"],
                encoder_hidden_states=question,
                encoder_attention_mask=batch["attention_mask"],
            ).logits
        loss = F.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100)
        torch.testing.assert_close(-values[i], loss, rtol=0, atol=1e-4)


def test_gradients_flow():
    model = tiny.build("clip")
    anatomy, data = describe(model), tiny.retrieval_data("clip", model, 6)
    for loss in ("cross_entropy", "margin"):
        objective = Contrastive(loss)
        other = objective.other(anatomy, "vision", data, 4).detach()
        out = objective.run(anatomy, "vision", data, 4)
        objective.values(anatomy, "vision", out, other, data).sum().backward()
        assert model.visual_projection.weight.grad.abs().sum() > 0
        model.zero_grad()


def test_names():
    for name in OBJECTIVES:
        assert objective_named(name).name == name
    with pytest.raises(ValueError, match="'accuracy', expected one of retrieval"):
        objective_named("accuracy")
    with pytest.raises(ValueError, match="'hinge', expected"):
        Contrastive("hinge")


@pytest.mark.parametrize(
    ("model", "objective", "message"),
    [
        ("llava", "contrastive", "needs a model with an image and a text embedding"),
        ("clip", "lm_loss", "needs a model that predicts tokens"),
        ("vit", "retrieval", "needs a model with an image and a text embedding"),
    ],
)
def test_objectives_that_do_not_fit(model, objective, message):
    built = tiny.build(model)
    with pytest.raises(ValueError, match=message):
        vp.evaluate(built, tiny.retrieval_data(model, built, 3), objective)


def test_data_that_does_not_fit():
    from dataclasses import replace

    model = tiny.build("llava")
    data = tiny.retrieval_data("llava", model, 3)
    blank = data.texts["labels"].clone()
    blank[1] = -100
    with pytest.raises(ValueError, match=r"sample 1 of .* no labelled position"):
        vp.evaluate(model, replace(data, texts={**data.texts, "labels": blank}))
    clip = tiny.build("clip")
    no_classes = replace(tiny.retrieval_data("clip", clip, 3), classes=None)
    with pytest.raises(ValueError, match="no class labels"):
        vp.evaluate(clip, no_classes, "zero_shot")


@pytest.mark.parametrize("tower", ["vision", "text"])
@pytest.mark.parametrize("name", ["contrastive", "margin", "recall@1", "zero_shot"])
def test_a_part_that_is_everything(clip, tower, name):
    """In any order, the values of all images are those without a part."""
    anatomy, data = clip
    if name == "zero_shot" and tower == "text":
        return  # class prompts are no part of the images
    objective = objective_named(name)
    with torch.no_grad():
        outputs = objective.run(anatomy, tower, data, 5)
        other = objective.other(anatomy, tower, data, 5)
    whole = objective.values(anatomy, tower, outputs, other, data)
    order = torch.randperm(data.n_images)
    rows = order if tower == "vision" else data.texts_of(order)[0]
    part = Part(order, torch.ones(len(order)))
    values = objective.values(anatomy, tower, outputs[rows], other, data, part)
    torch.testing.assert_close(values, whole[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_a_part_stands_for_the_rest(clip, tower):
    """Cross-entropy over some images, each standing for two or three, is near that over all of them."""
    anatomy, data = clip
    objective = Contrastive()
    with torch.no_grad():
        outputs = objective.run(anatomy, tower, data, 5)
        other = objective.other(anatomy, tower, data, 5)
    whole = objective.values(anatomy, tower, outputs, other, data)
    totals = []
    for seed in range(200):
        order = torch.randperm(data.n_images, generator=torch.Generator().manual_seed(seed))[:5]
        rows = order if tower == "vision" else data.texts_of(order)[0]
        part = Part(order, torch.full((5,), (data.n_images - 1) / 4))  # four negatives stand for all but one
        totals.append(objective.values(anatomy, tower, outputs[rows], other, data, part).mean())
    spread = torch.stack(totals).std()
    assert abs(torch.stack(totals).mean() - whole.mean()) < 0.5 * spread
