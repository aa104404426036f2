"""What token pruning costs and is worth, as people see it: trials, accuracy, pictures, pages, the command."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from cli.invoke import refused, run
from PIL import Image

import vlprune_ext as vp
from vlprune_ext.anatomy import describe
from vlprune_ext.checkpoint.models import load_model
from vlprune_ext.objectives import objective_named, usual_objective
from vlprune_ext.report.figures.style import svg
from vlprune_ext.report.figures.tokens import kept_squares, quality_against_tokens
from vlprune_ext.report.tokens import write_token_report
from vlprune_ext.tokens import DropTokens
from vlprune_ext.workflow.token_trials import (
    Judged,
    TokenComparison,
    Trial,
    ask,
    judge,
    run_trial,
    seen_picture,
    squares,
)


@pytest.fixture(scope="module")
def llava():
    return load_model("llava-digits")


@pytest.fixture(scope="module")
def data(llava):
    return vp.load_data("digits-questions", "test", model=llava.model, limit=40, seed=3)


@pytest.fixture(scope="module")
def scene():
    scenes = vp.zoo.DigitScenes("test", 1)
    return Image.fromarray(scenes[0].image)


def test_generated_is_exact_match_of_a_dense_model(llava, data):
    anatomy = vp.describe(llava.model)
    told, said = (objective_named(name).run(anatomy, "text", data, 16) for name in ("exact_match", "generated"))
    assert torch.equal(told, said)
    assert 0 < said.mean() < 1, "right and wrong answers are compared"


def test_generated_is_what_generate_says_under_pruning(llava, data):
    """One sample at a time, without padding."""
    anatomy = vp.describe(llava.model)
    method = vp.LookM(0.15)
    with vp.prune_tokens(llava.model, method):
        found = objective_named("generated").run(anatomy, "text", data, 16)
    for i in range(0, 40, 4):
        row = data.batch(torch.tensor([i]))
        first = int((row["labels"][0] != -100).int().argmax())
        prompt = {"input_ids": row["input_ids"][:, :first], "pixel_values": row["pixel_values"]}
        with vp.prune_tokens(llava.model, method), torch.no_grad():
            answer = llava.model.generate(**prompt, max_new_tokens=2, do_sample=False)[0, first:].tolist()
        wanted = row["labels"][0][row["labels"][0] != -100].tolist()
        assert bool(found[i]) == (answer[: len(wanted)] == wanted)


def test_generated_is_for_models_that_go_on(data):
    from models import tiny

    model = tiny.build("blip_vqa")
    with pytest.raises(ValueError, match="'generated' is for models that answer behind their prompt"):
        objective_named("generated").towers(vp.describe(model))
    assert usual_objective(describe(model), "answer").name == "exact_match"


def test_a_trial(llava, scene):
    inputs = ask(llava.processor, scene, "what digit is top left ?", llava.model)
    dense = run_trial(llava.model, llava.processor, inputs, None, repeats=1)
    fewer = run_trial(llava.model, llava.processor, inputs, vp.RandomTokens(0.25), repeats=1)
    assert (dense.kept, dense.share, dense.peak) == (None, 1.0, 0)
    assert fewer.share == 0.25
    assert int(fewer.kept.sum()) == 9
    config = llava.model.config.text_config
    entry = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert dense.cache - fewer.cache == 27 * entry
    assert dense.cache % entry == 0
    assert dense.seconds > 0
    assert squares(fewer.kept, inputs, llava.model).shape == (6, 6)


def test_a_chat_template_is_used(llava, scene):
    class Chat:
        image_token = "<image>"
        chat_template = "has one"

        def apply_chat_template(self, turns, add_generation_prompt):
            assert add_generation_prompt
            assert [part["type"] for part in turns[0]["content"]] == ["image", "text"]
            return f"USER: <image> {turns[0]['content'][1]['text']}"

        def __call__(self, images, text, return_tensors):
            assert text == ["USER: <image> what?"]
            return {"pixel_values": torch.ones(1, 3, 4, 4), "input_ids": torch.ones(1, 2, dtype=torch.long)}

    found = ask(Chat(), scene, "what?", llava.model.bfloat16())
    llava.model.float()
    assert found["pixel_values"].dtype == torch.bfloat16
    assert found["input_ids"].dtype == torch.int64


def test_squares_of_what_is_no_picture(llava):
    with pytest.raises(ValueError, match="37 visual tokens: not the squares of one picture"):
        squares(torch.ones(37, dtype=torch.bool), {}, llava.model)


def test_seen_picture(llava, scene):
    inputs = ask(llava.processor, scene, "what?", llava.model)
    shown = seen_picture(scene, inputs, llava.processor)
    assert shown.shape == (48, 48, 3)
    assert np.abs(shown - np.asarray(scene) / 255).max() < 0.01, "48 x 48 pixels pass the processor as they are"
    patches = {"pixel_values": torch.zeros(5, 7)}
    assert np.array_equal(seen_picture(scene, patches, llava.processor), np.asarray(scene) / 255)


def test_judge(llava, data):
    dense, found = judge(
        llava.model, data, {"FastV": [vp.FastV(1, 1.0), vp.FastV(1, 0.1)], "LookM": [vp.LookM(0.1)]}, batch_size=20
    )
    whole, few = found["FastV"]
    assert whole.quality == dense == vp.evaluate(llava.model, data, "exact_match")["exact_match"]
    assert whole.share == 1.0
    assert few.share == pytest.approx((1 + 3 * 4 / 36) / 4)
    assert few.quality < dense
    assert found["LookM"][0].share == pytest.approx(4 / 36)


def test_judging_a_cache_that_is_not_used(llava, data):
    with pytest.raises(ValueError, match="metric is 'exact_match'; expected 'generated' for PLPHP"):
        judge(llava.model, data, {"PLPHP": [vp.PLPHP()]}, "exact_match")


def _trial(answer: str, kept: int | None = None) -> Trial:
    squares_left = None if kept is None else torch.arange(36) < kept
    return Trial(answer, 0.012, 12000, 0, 1.0 if kept is None else kept / 36, squares_left)


def test_figures():
    kept = {"one": np.eye(6, dtype=bool), "another": np.zeros((6, 6), dtype=bool)}
    text = svg(kept_squares(np.zeros((48, 48, 3)), kept, {"one": "seven", "as it is": "eight"}))
    assert all(word in text for word in ("one", "seven", "another", "as it is", "eight"))
    curve = svg(quality_against_tokens({"FastV": [(0.5, 0.9), (0.2, 0.4)]}, 0.95, "exact match"))
    assert "FastV" in curve
    assert "exact match against visual tokens" in curve


def test_page(tmp_path, data):
    page = tmp_path / "page.html"
    found = TokenComparison(
        "what & where?",
        {"all tokens": _trial("7"), "FastV": _trial("1", 18)},
        np.zeros((48, 48, 3)),
        {"FastV": np.eye(6, dtype=bool)},
    )
    write_token_report(page, found)
    assert "One picture and one question" in page.read_text()
    found.metric, found.dense, found.data = "generated", 0.95, data
    found.judged = {
        "FastV": [Judged(vp.FastV(1, 0.5), 0.6, 0.8)],
        "RandomTokens": [Judged(vp.RandomTokens(0.5), 0.5, 0.9)],
    }
    write_token_report(page, found, title="Fewer <tokens>")
    text = page.read_text()
    assert "Fewer &lt;tokens&gt;" in text
    assert "what &amp; where?" in text
    assert "RandomTokens keeps most of it: 0.900 with 50% of the tokens" in text
    assert data.hash in text
    assert text.count("<svg") == 2
    assert "peak memory" not in text
    assert "http" not in text.replace("http://www.w3.org", ""), "it loads nothing"


def test_command(tmp_path):
    picture, page = tmp_path / "kept.png", tmp_path / "page.html"
    few = ("--limit", 20, "--keep", "0.5,0.2", "--method", "fastv", "--method", "random", "--set", "layer=1")
    content = json.loads(run("tokens", "llava-digits", *few, "--out", picture, "--report", page, "--json").stdout)
    assert list(content["trials"]) == ["all tokens", "FastV", "RandomTokens"]
    assert [row["keep"] for row in content["judged"]["FastV"]] == [0.5, 0.2]
    assert content["trials"]["FastV"]["share"] == pytest.approx((1 + 3 * 0.5) / 4)
    assert content["data"]["images"] == 20
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert np.asarray(image.convert("L")).std() > 10, "something is drawn"
    assert "RandomTokens" in page.read_text()


def test_command_asks_about_a_picture_of_the_user(tmp_path, scene):
    path = tmp_path / "scene.png"
    scene.save(path)
    asked = ("--image", path, "--question", "what digit is top left ?")
    text = run("tokens", "llava-digits", *asked, "--keep", 0.5).stdout
    assert "what digit is top left ?" in text
    assert "FastV" in text
    assert "all tokens" in text


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["llava-digits", "--method", "fastw"], "--method: 'fastw', expected one of fastv, ", 2),
        (["llava-digits", "--keep", "1.5"], "keep is 1.5; expected a share 0 < keep <= 1", 2),
        (["llava-digits", "--keep", "most"], "--keep: 'most', expected shares", 2),
        (["llava-digits", "--set", "depth=2"], "--set: 'depth=2', expected FIELD=VALUE, a field of fastv: ", 2),
        (["llava-digits", "--set", "layer=9"], "FastV: layer 9, expected 1 <= layer < 4", 1),
        (["llava-digits", "--question", "what?"], "--image and --question: one without the other", 2),
        (["llava-digits", "--image", __file__, "--question", " "], "--question: it is empty", 2),
        (["llava-digits", "--image", "nowhere.png", "--question", "q"], "--image: nowhere.png, no such file", 2),
        (["clip-digits"], "a CLIPModel does not answer questions", 1),
    ],
    ids=lambda value: None,
)
def test_wrong_usage(arguments, message, code):
    assert message in refused("tokens", *arguments, code=code)


def test_a_file_that_is_no_picture(tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("not a picture")
    message = refused("tokens", "llava-digits", "--image", path, "--question", "what?", code=2)
    assert "not a picture that can be read" in message


def test_a_method_of_ones_own(llava, data):
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class LargestNorm(DropTokens):
        keep: float = 0.5

        def stages(self, blocks):
            return {blocks // 2: self.keep}

        def score(self, view):
            return view.states.norm(dim=-1)

    _, found = judge(llava.model, data, {"mine": [LargestNorm(0.5)]})
    assert found["mine"][0].share == 0.75
