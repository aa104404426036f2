"""DigitScenes and the shipped models: nothing leaks between splits, and the models do what their cards say."""

from __future__ import annotations

import importlib
import itertools
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForVisualQuestionAnswering,
    AutoProcessor,
    AutoTokenizer,
    BlipForQuestionAnswering,
    BlipProcessor,
    CLIPModel,
    CLIPProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from vlprune_ext import zoo
from vlprune_ext.checkpoint.models import load_model
from vlprune_ext.zoo import DigitScenes
from vlprune_ext.zoo.digit_scenes import (
    COLOURS,
    PLAIN_KINDS,
    POSITIONS,
    QUESTION_SHARES,
    SINGLES,
    SPLITS,
    Object,
    Scene,
    digits,
    split_indices,
)

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def folder():
    return zoo.path("clip-digits")


@pytest.fixture(scope="module")
def model(folder):
    return CLIPModel.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module", params=["llava-digits", "blip-digits"])
def answering(request):
    """A model that answers questions."""
    return load_model(request.param, device="cpu")


@pytest.fixture(scope="module")
def llava():
    return load_model("llava-digits", device="cpu")


@pytest.fixture(scope="module")
def blip():
    return load_model("blip-digits", device="cpu")


@pytest.fixture(scope="module")
def train_zoo():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        yield importlib.import_module("train_zoo")


# --- digits and scenes -----------------------------------------------------------------------------------------------


def test_the_digits_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    known = datasets.load_digits()
    images, labels = digits()
    assert images.shape == (1797, 8, 8)
    assert np.array_equal(images, known.images)
    assert np.array_equal(labels, known.target)


def test_every_digit_is_in_exactly_one_split():
    parts = [split_indices(split) for split in SPLITS]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(1797))
    for part in parts:
        shares = np.bincount(digits()[1][part], minlength=10) / len(part)
        assert shares.min() > 0.09
        assert shares.max() < 0.11


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_use_only_the_digits_of_their_split(split):
    allowed = set(split_indices(split).tolist())
    labels = digits()[1]
    for scene in DigitScenes(split, 300):
        assert {o.source for o in scene.objects} <= allowed
        assert all(labels[o.source] == o.digit for o in scene.objects)


def test_scenes_depend_on_split_and_seed_alone():
    first, again = DigitScenes("test", 50, seed=3), DigitScenes("test", 50, seed=3)
    assert np.array_equal(first.images, again.images)
    assert first.captions == again.captions
    assert first.captions != DigitScenes("test", 50, seed=4).captions
    assert first.captions != DigitScenes("validation", 50, seed=3).captions


def test_fewer_scenes_are_the_first_of_more():
    few, more = DigitScenes("calibration", 20, seed=1), DigitScenes("calibration", 60, seed=1)
    assert few.captions == more.captions[:20]
    assert np.array_equal(few.images, more.images[:20])


@pytest.mark.parametrize("split", SPLITS)
def test_captions_of_one_set_are_all_different(split):
    scenes = DigitScenes(split, 1000)
    assert len(set(scenes.captions)) == len(scenes) == 1000
    assert {len(scene.objects) for scene in scenes} == {1, 2, 3, 4}


def test_single_scenes_can_hold_every_colour_digit_and_place_once():
    scenes = DigitScenes("test", SINGLES, objects=(1,))
    assert len(set(scenes.captions)) == SINGLES == len(COLOURS) * 10 * len(POSITIONS)


def test_scenes_made_alike_differ_in_their_digits_alone():
    scenes = DigitScenes("train", 64, alike=8)
    layouts = [tuple((o.position, o.colour) for o in scene.objects) for scene in scenes]
    runs = [list(run) for _, run in itertools.groupby(layouts)]
    assert 8 <= len(runs) < 16  # an already seen caption ends a run early
    assert len(set(scenes.captions)) == 64
    assert len(set(DigitScenes("train", SINGLES, objects=(1,), alike=10).captions)) == SINGLES


def test_a_caption_says_what_is_drawn_where():
    scene = next(s for s in DigitScenes("train", 50) if len(s.objects) == 2)
    assert re.fullmatch(r"an? \w+ \d (top|bottom) (left|right), an? \w+ \d (top|bottom) (left|right)", scene.caption)
    assert scene.image.shape == (48, 48, 3)
    assert scene.image.dtype == np.uint8
    # A cell with a digit has more contrast than one with only background and its noise.
    cells = scene.image.astype(float).max(-1).reshape(2, 24, 2, 24).std((1, 3)).flatten()  # [4]
    filled = {o.position for o in scene.objects}
    assert min(cells[list(filled)]) > max(cells[[p for p in range(4) if p not in filled]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "split is 'dev', expected one of train, calibration, validation, test"),
        ({"split": "test", "n": 0}, "n is 0"),
        ({"split": "test", "seed": -1}, "seed is -1"),
        ({"split": "test", "objects": (5,)}, "objects is"),
        ({"split": "test", "alike": 11}, "alike is 11, expected 1 to 10"),
        ({"split": "test", "n": SINGLES + 1, "objects": (1,)}, "only 320 scenes"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DigitScenes(**arguments)


# --- questions -------------------------------------------------------------------------------------------------------


def answer_by_caption(text, caption):
    """The answer from the words of a caption alone; None if the question has more than one."""
    things = [re.fullmatch(r"an? (\w+) (\d) (\w+ \w+)", phrase).groups() for phrase in caption.split(", ")]
    if text == "how many digits are there ?":
        return str(len(things))
    wanted, key = re.fullmatch(r"what (digit|colour) is (?:the )?(.+) \?", text).groups()
    found = [
        {"colour": colour, "digit": digit}[wanted] for colour, digit, place in things if key in (colour, digit, place)
    ]
    if not found and key in POSITIONS:
        return "none"
    return found[0] if len(found) == 1 else None


def test_the_questions_of_a_known_scene():
    objects = Object(0, 0, 3, 0), Object(1, 5, 3, 0), Object(3, 0, 7, 0)
    asked = {q.text: q.answer for q in Scene(np.zeros((48, 48, 3), np.uint8), objects).questions}
    assert asked == {
        "what digit is top left ?": "3",
        "what colour is top left ?": "red",
        "what digit is top right ?": "3",
        "what colour is top right ?": "blue",
        "what digit is bottom left ?": "none",
        "what colour is bottom left ?": "none",
        "what digit is bottom right ?": "7",
        "what colour is bottom right ?": "red",
        "what digit is blue ?": "3",  # red and 3 occur twice
        "what colour is the 7 ?": "red",
        "how many digits are there ?": "3",
    }


def test_every_question_has_one_answer_of_one_word():
    scenes = DigitScenes("train", 200)
    for scene, questions in zip(scenes, scenes.questions, strict=True):
        assert len({q.text for q in questions}) == len(questions)
        for question in questions:
            assert question.answer == answer_by_caption(question.text, scene.caption)
            assert question.answer.isalnum()
            assert question.kind in QUESTION_SHARES


def test_one_question_a_scene_is_chosen_by_seed():
    scenes = DigitScenes("test", 1000)
    first = scenes.asked()
    assert first == scenes.asked(0) == DigitScenes("test", 1000).asked(0)
    assert first != scenes.asked(1)
    assert DigitScenes("test", 40).asked(5) == scenes.asked(5)[:40]
    assert all(question in scene.questions for question, scene in zip(first, scenes, strict=True))
    kinds = [question.kind for question in first]
    for kind, share in QUESTION_SHARES.items():
        assert kinds.count(kind) / 1000 == pytest.approx(share, abs=0.05)
    assert sum(question.answer.isdigit() for question in first if question.kind != "count") > 350
    with pytest.raises(ValueError, match="seed is -1"):
        scenes.asked(-1)
    assert {question.kind for question in scenes.asked(kinds=PLAIN_KINDS)} == set(PLAIN_KINDS)
    with pytest.raises(ValueError, match=r"kinds is \('size',\), but the scene"):
        scenes.asked(kinds=("size",))


# --- clip-digits -----------------------------------------------------------------------------------------------------


def test_names_and_paths():
    assert zoo.names() == sorted(zoo.names())
    assert {"blip-digits", "clip-digits", "llava-digits"} <= set(zoo.names())
    assert (zoo.path("clip-digits") / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="no model named 'clip-letters' in the zoo, which has blip-digits"):
        zoo.path("clip-letters")
    with pytest.raises(ValueError, match="no model named"):
        zoo.path("../zoo/clip-digits")


def test_it_loads_offline_by_every_usual_door_without_a_warning(folder, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(AutoModel.from_pretrained(folder), CLIPModel)
        assert isinstance(AutoProcessor.from_pretrained(folder), CLIPProcessor)
        AutoTokenizer.from_pretrained(folder)
    assert "torchvision" not in capfd.readouterr().err


def test_it_is_small_and_safe(folder, model):
    files = {path.name for path in folder.iterdir()}
    assert files == {
        "README.md",
        "config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10 * 2**20
    assert 1_900_000 < sum(p.numel() for p in model.parameters()) < 2_200_000
    card = (folder / "README.md").read_text()
    assert "UCI" in card
    assert "CC BY 4.0" in card


def test_the_tokenizer_knows_every_word_and_ends_where_clip_looks(model, processor):
    batch = processor.tokenizer(DigitScenes("train", 200).captions, padding=True)
    end = model.config.text_config.eos_token_id
    assert end == processor.tokenizer.eos_token_id != 2
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        assert processor.tokenizer.unk_token_id not in ids
        # First of its kind, and the highest id: what transformers looks for now, and what it looked for before.
        assert ids.index(end) == ids.index(max(ids)) == sum(mask) - 1
    assert max(map(len, batch["input_ids"])) <= model.config.text_config.max_position_embeddings


def test_the_processor_gives_what_training_saw(processor, train_zoo):
    scenes = DigitScenes("calibration", 8)
    seen = train_zoo.ClipDigits.inputs_of(scenes, processor.tokenizer)
    pictures = [Image.fromarray(image) for image in scenes.images]
    given = processor(images=pictures, text=scenes.captions, padding=True, return_tensors="pt")
    assert set(given) == set(seen)
    for name, value in seen.items():
        torch.testing.assert_close(given[name], value, rtol=0, atol=1e-6)


def _embeddings(model, processor, images, texts):
    pictures = [Image.fromarray(image) for image in images]
    with torch.no_grad():
        out = model(**processor(images=pictures, text=texts, padding=True, return_tensors="pt"))
    return out.image_embeds, out.text_embeds  # [I, D], [T, D]


def test_it_retrieves_scenes_of_digits_it_never_saw(model, processor):
    scenes = DigitScenes("test", 300)
    image, text = _embeddings(model, processor, scenes.images, scenes.captions)
    found = torch.arange(300)
    to_text = (image @ text.T).argmax(1) == found
    to_image = (text @ image.T).argmax(1) == found
    assert (to_text.float().mean() + to_image.float().mean()) / 2 >= 0.85


def test_the_card_says_what_is_measured(folder, model, processor, train_zoo):
    card = (folder / "README.md").read_text()
    stated = float(re.search(r"^\| test \| ([0-9.]+) ", card, re.MULTILINE).group(1))
    measured = train_zoo.ClipDigits.recall(
        model, train_zoo.ClipDigits.inputs_of(DigitScenes("test", 1000), processor.tokenizer)
    )
    assert measured["recall@1"] == pytest.approx(stated, abs=0.003)


# --- llava-digits and blip-digits ------------------------------------------------------------------------------------


def answers(loaded, scenes, questions):
    """What is generated for one question a scene, cut at its end."""
    processor, image = loaded.processor, getattr(loaded.processor, "image_token", "")
    pictures = [Image.fromarray(scene.image) for scene in scenes]
    texts = [f"{image} {question.text}" for question in questions]
    inputs = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
    given = loaded.model.generate(**inputs, max_new_tokens=2)
    if image:  # the answer continues the question
        given = given[:, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.batch_decode(given, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("name", "door", "model_class", "processor_class"),
    [
        ("llava-digits", AutoModelForImageTextToText, LlavaForConditionalGeneration, LlavaProcessor),
        ("blip-digits", AutoModelForVisualQuestionAnswering, BlipForQuestionAnswering, BlipProcessor),
    ],
)
def test_a_model_that_answers_loads_offline_by_every_usual_door_without_a_warning(
    name, door, model_class, processor_class, capfd
):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(door.from_pretrained(zoo.path(name)), model_class)
        assert isinstance(AutoProcessor.from_pretrained(zoo.path(name)), processor_class)
        AutoTokenizer.from_pretrained(zoo.path(name))
    assert "torchvision" not in capfd.readouterr().err


def test_a_model_that_answers_is_small_and_safe(answering):
    folder = Path(answering.source)
    files = {path.name for path in folder.iterdir()}
    assert files == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in folder.iterdir()) < 12 * 2**20
    card = (folder / "README.md").read_text()
    assert "UCI" in card
    assert "CC BY 4.0" in card


def longest(tokenizer, texts):
    """Tokens of the longest text; all are words it knows."""
    rows = tokenizer(texts)["input_ids"]
    assert all(tokenizer.unk_token_id not in row for row in rows)
    return max(map(len, rows))


def test_its_processor_makes_a_picture_36_tokens_and_knows_every_word(llava):
    scenes = DigitScenes("train", 200)
    tokenizer, text = llava.processor.tokenizer, llava.model.config.text_config
    assert text.num_key_value_heads < text.num_attention_heads
    inputs = llava.processor(
        images=[Image.fromarray(scenes[0].image)], text=["<image> what digit is top left ?"], return_tensors="pt"
    )
    ids = inputs["input_ids"][0].tolist()
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(llava.model.config.image_token_id) == 36 == len(ids) - 1 - 6  # BOS and six words
    assert tokenizer.padding_side == "left"
    assert llava.model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert llava.model.generation_config.pad_token_id == tokenizer.pad_token_id
    texts = [*scenes.captions, *(word for asked in scenes.questions for q in asked for word in (q.text, q.answer))]
    assert 36 + longest(tokenizer, texts) <= text.max_position_embeddings


def test_blip_reads_every_word_and_starts_and_ends_as_its_tokenizer(blip):
    tokenizer, text = blip.processor.tokenizer, blip.model.config.text_config
    asked = [q for questions in DigitScenes("train", 200).questions for q in questions]
    assert longest(tokenizer, [word for q in asked for word in (q.text, q.answer)]) <= text.max_position_embeddings
    assert blip.model.decoder_start_token_id == text.bos_token_id == tokenizer.bos_token_id
    assert text.sep_token_id == tokenizer.eos_token_id
    inputs = blip.processor(images=[Image.new("RGB", (48, 48))], text=["red"], return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[tokenizer.bos_token_id, *tokenizer.encode("red")[1:-1], text.sep_token_id]]


def test_it_answers_about_digits_it_never_saw(answering):
    scenes = DigitScenes("test", 200)
    questions = scenes.asked(seed=1, kinds=PLAIN_KINDS)
    given = answers(answering, scenes, questions)
    right = [answer == question.answer for answer, question in zip(given, questions, strict=True)]
    assert np.mean(right) > 0.9
    read = [ok for ok, question in zip(right, questions, strict=True) if question.answer.isdigit()]
    assert np.mean(read) > 0.9  # not by colours and empty places alone


def test_it_looks_at_the_picture(answering):
    scenes = DigitScenes("test", 100)
    questions = scenes.asked(kinds=PLAIN_KINDS)
    given = answers(answering, scenes[50:] + scenes[:50], questions)
    assert np.mean([answer == question.answer for answer, question in zip(given, questions, strict=True)]) < 0.5


def test_left_padding_changes_no_answer(llava):
    scenes = DigitScenes("test", 12)
    questions = [scene.questions[i % 2 * 8] for i, scene in enumerate(scenes)]
    assert len({len(question.text.split()) for question in questions}) > 1
    together = answers(llava, scenes, questions)
    for scene, question, answer in zip(scenes, questions, together, strict=True):
        assert answers(llava, [scene], [question]) == [answer]


def test_it_generates_what_its_card_counts(answering, train_zoo):
    scenes = DigitScenes("test", 50)
    questions = scenes.asked()
    folder = Path(answering.source)
    recipe = train_zoo.RECIPES[folder.name]()
    counted = recipe.matches(answering.model, recipe.packed(scenes, [[question] for question in questions]))
    given = answers(answering, scenes, questions)
    assert counted.tolist() == [answer == question.answer for answer, question in zip(given, questions, strict=True)]
    card = (folder / "README.md").read_text()
    stated = float(re.search(r"^\| exact match \|.*\| ([0-9.]+) \|$", card, re.MULTILINE).group(1))
    measured = recipe.matches(answering.model, recipe.examined("test")[1]).double().mean().item()
    assert measured == pytest.approx(stated, abs=0.003)


def test_texts_packed_behind_one_picture_cost_what_they_cost_alone(llava, train_zoo):
    recipe = train_zoo.LlavaDigits()
    scenes = DigitScenes("calibration", 3)
    asked = [scene.questions[:3] for scene in scenes]
    with torch.no_grad():
        packed = llava.model(**recipe.packed(scenes, asked, captions=True)).loss
        alone = [recipe.packed(scenes, [()] * 3, captions=True)]
        alone += [recipe.packed(scenes, [[questions[i]] for questions in asked]) for i in range(3)]
        scored = [int((inputs["labels"] != -100).sum()) for inputs in alone]
        losses = [llava.model(**inputs).loss for inputs in alone]
        plain = {name: alone[1][name] for name in ("pixel_values", "input_ids", "labels")}
        torch.testing.assert_close(llava.model(**plain).loss, losses[1], rtol=1e-4, atol=1e-6)
    weighted = sum(n * loss for n, loss in zip(scored, losses, strict=True)) / sum(scored)
    torch.testing.assert_close(packed, weighted, rtol=1e-4, atol=1e-6)


def test_questions_packed_behind_one_picture_cost_what_the_forward_of_blip_says(blip, train_zoo):
    recipe = train_zoo.BlipDigits()
    scenes = DigitScenes("calibration", 3)
    asked = [scene.questions[-4:] for scene in scenes]
    assert len({len(question.text.split()) for questions in asked for question in questions}) > 1  # some are padded
    pictures = [Image.fromarray(scene.image) for scene in scenes for _ in range(4)]
    texts, said = zip(*((question.text, question.answer) for questions in asked for question in questions), strict=True)
    inputs = blip.processor(images=pictures, text=list(texts), padding=True, return_tensors="pt")
    labels = blip.processor.tokenizer(list(said), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        packed = recipe.of_answers(blip.model, recipe.packed(scenes, asked))
        torch.testing.assert_close(packed, blip.model(**inputs, labels=labels).loss, rtol=1e-4, atol=1e-6)


# --- the training script ---------------------------------------------------------------------------------------------


def interrupted(score, at):
    """``score``, which a person interrupts at its call number ``at``."""
    calls = itertools.count(1)

    def wrapped(recipe):
        if next(calls) == at:
            raise KeyboardInterrupt
        return score(recipe)

    return wrapped


@pytest.mark.parametrize(
    ("name", "kind", "scored"),
    [
        ("clip-digits", "clip", "recall@1"),
        ("llava-digits", "llava", "exact match"),
        ("blip-digits", "blip", "exact match"),
    ],
)
def test_training_is_deterministic_also_when_cut_and_leaves_a_loadable_folder(
    train_zoo, tmp_path, monkeypatch, capsys, name, kind, scored
):
    monkeypatch.setattr(train_zoo.Recipe, "evaluated", 20)
    threads = torch.get_num_threads()
    stages = [train_zoo.Stage(steps=2, batch=8, objects=(1, 2), alike=alike, rate=1e-3) for alike in (1, 4)]
    arguments = {"seed": 7, "threads": 1, "stages": stages}
    score = train_zoo.RECIPES[name].score
    try:
        train_zoo.train(name, tmp_path / "first", **arguments)
        monkeypatch.setattr(train_zoo.RECIPES[name], "score", interrupted(score, at=4))
        with pytest.raises(KeyboardInterrupt):
            train_zoo.train(name, tmp_path / "second", **arguments)
        monkeypatch.setattr(train_zoo.RECIPES[name], "score", score)
        train_zoo.train(name, tmp_path / "second", **arguments, resume=True)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    first, second = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("first", "second"))
    assert first == second
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second"}
    assert load_model(str(tmp_path / "first")).model.config.model_type == kind
    assert f"validation {scored}" in capsys.readouterr().out
    card = (tmp_path / "first" / "README.md").read_text()
    assert f"{name} --out DIR --seed 7 --threads 1" in card
    assert "every 4 in a row differ in their digits alone" in card
