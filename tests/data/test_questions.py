"""llava-digits and blip-digits, the questions they are asked, and what counts as an answer."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

import vlprune_ext as vp
from vlprune_ext.checkpoint.models import load_model
from vlprune_ext.objectives import objective_named
from vlprune_ext.zoo.digit_scenes import PLAIN_KINDS


@pytest.fixture(scope="module", params=["llava-digits", "blip-digits"])
def answering(request):
    return load_model(request.param)


@pytest.fixture(scope="module")
def data(answering):
    return vp.load_data("digits-questions", "test", model=answering.model, limit=60, seed=3)


def test_labels_cover_the_answer_alone(answering, data):
    tokenizer = answering.processor.tokenizer
    questions = vp.zoo.DigitScenes("test", 60, 3).asked(3, PLAIN_KINDS)
    for row, labels, question in zip(data.texts["input_ids"], data.texts["labels"], questions, strict=True):
        scored = labels[1:][labels[1:] != -100].tolist()
        assert tokenizer.decode([i for i in scored if i != tokenizer.eos_token_id]).strip() == question.answer
        assert question.text in tokenizer.decode(row, skip_special_tokens=True)


def test_exact_match_is_what_generate_answers(answering, data):
    """A row at a time, greedily, with the processor as a user would call it."""
    anatomy = vp.describe(answering.model)
    objective = objective_named("exact_match")
    found = objective.run(anatomy, "text", data, 32)
    scenes = vp.zoo.DigitScenes("test", 60, 3)
    for i, (scene, question) in enumerate(zip(scenes, scenes.asked(3, PLAIN_KINDS), strict=True)):
        if i % 6:
            continue
        text = f"{getattr(answering.processor, 'image_token', '')} {question.text}"
        inputs = answering.processor(images=[Image.fromarray(scene.image)], text=[text], return_tensors="pt")
        with torch.no_grad():
            said = answering.model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1:]
        answer = answering.processor.tokenizer.decode(said, skip_special_tokens=True).strip()
        assert (answer == question.answer) == bool(found[i])


def test_it_is_right_nine_times_in_ten(answering, data):
    assert vp.evaluate(answering.model, data, "exact_match")["exact_match"] > 0.9


def test_questions_need_a_model_that_can_answer():
    clip = load_model("clip-digits").model
    with pytest.raises(ValueError, match="digits-questions asks questions, expected a model that reads an image token"):
        vp.load_data("digits-questions", "test", model=clip, limit=2)


def test_a_model_made_for_questions_is_asked_some(tmp_path):
    """The decoder reads its first token and the answer; where a source asks nothing, the question is empty."""
    blip = load_model("blip-digits")
    tokenizer = blip.processor.tokenizer
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    data = vp.load_data("digits", "test", model=blip.model, limit=3)
    assert data.name == "digits-questions"
    asked = vp.zoo.DigitScenes("test", 3).asked(0, PLAIN_KINDS)
    answers = [tokenizer(question.answer, add_special_tokens=False)["input_ids"] for question in asked]
    assert data.texts["labels"].tolist() == [[begin, *ids, end] for ids in answers]
    assert tokenizer.batch_decode(data.texts["input_ids"], skip_special_tokens=True) == [q.text for q in asked]

    Image.new("RGB", (48, 48)).save(tmp_path / "a.png")
    (tmp_path / "data.jsonl").write_text(json.dumps({"image": "a.png", "text": " ".join(["red"] * 40)}))
    data = vp.load_data(tmp_path / "data.jsonl", model=blip.model)
    assert data.texts["input_ids"].tolist() == [[begin, end]]
    red = tokenizer.convert_tokens_to_ids("red")
    assert data.texts["labels"].tolist() == [[begin, *[red] * 22, end]]  # cut to the decoder's 24 positions
    assert vp.evaluate(blip.model, data)["lm_loss"] > 0
