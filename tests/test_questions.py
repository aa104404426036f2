"""llava-digits, the questions it is asked, and what counts as an answer."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import vlprune_ext as vp
from vlprune_ext.models import load_model
from vlprune_ext.objectives import objective_named
from vlprune_ext.zoo.digit_scenes import PLAIN_KINDS


@pytest.fixture(scope="module")
def llava():
    return load_model("llava-digits")


@pytest.fixture(scope="module")
def data(llava):
    return vp.load_data("digits-questions", "test", model=llava.model, limit=60, seed=3)


def test_labels_cover_the_answer_alone(llava, data):
    tokenizer = llava.processor.tokenizer
    questions = vp.zoo.DigitScenes("test", 60, 3).asked(3, PLAIN_KINDS)
    for row, labels, question in zip(data.texts["input_ids"], data.texts["labels"], questions, strict=True):
        scored = labels[labels != -100].tolist()
        assert tokenizer.decode([i for i in scored if i != tokenizer.eos_token_id]).strip() == question.answer
        assert question.text in tokenizer.decode(row, skip_special_tokens=True)


def test_exact_match_is_what_generate_answers(llava, data):
    """A row at a time, greedily, with the processor as a user would call it."""
    anatomy = vp.describe(llava.model)
    objective = objective_named("exact_match")
    found = objective.run(anatomy, "text", data, 32)
    scenes = vp.zoo.DigitScenes("test", 60, 3)
    for i, (scene, question) in enumerate(zip(scenes, scenes.asked(3, PLAIN_KINDS), strict=True)):
        if i % 6:
            continue
        text = f"{llava.processor.image_token} {question.text}"
        inputs = llava.processor(images=[Image.fromarray(scene.image)], text=[text], return_tensors="pt")
        inputs = {name: value for name, value in inputs.items() if name != "token_type_ids"}
        if inputs["input_ids"][0, -1] == llava.processor.tokenizer.eos_token_id:
            inputs = {n: v[:, :-1] if v.shape == inputs["input_ids"].shape else v for n, v in inputs.items()}
        with torch.no_grad():
            said = llava.model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1:]
        answer = llava.processor.tokenizer.decode(said, skip_special_tokens=True).strip()
        assert (answer == question.answer) == bool(found[i])


def test_it_is_right_nine_times_in_ten(llava, data):
    assert vp.evaluate(llava.model, data, "exact_match")["exact_match"] > 0.9


def test_questions_need_a_model_that_can_answer():
    clip = load_model("clip-digits").model
    with pytest.raises(ValueError, match="digits-questions asks questions, expected a model that reads an image token"):
        vp.load_data("digits-questions", "test", model=clip, limit=2)
