"""DigitScenes and the shipped model: nothing leaks between splits, and the model does what its card says."""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, AutoTokenizer, CLIPModel, CLIPProcessor

from vlprune_ext import zoo
from vlprune_ext.zoo import DigitScenes
from vlprune_ext.zoo.digit_scenes import COLOURS, POSITIONS, SINGLES, SPLITS, digits, split_indices

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_zoo.py"


@pytest.fixture(scope="module")
def folder():
    return zoo.path("clip-digits")


@pytest.fixture(scope="module")
def model(folder):
    return CLIPModel.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def train_zoo():
    spec = importlib.util.spec_from_file_location("train_zoo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    sys.modules["train_zoo"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    sys.path[:] = path
    yield module
    del sys.modules["train_zoo"]


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


# --- the shipped model -----------------------------------------------------------------------------------------------


def test_names_and_paths():
    assert "clip-digits" in zoo.names()
    assert (zoo.path("clip-digits") / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="no model named 'clip-letters' in the zoo, which has clip-digits"):
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
    seen = train_zoo.inputs_of(scenes, processor.tokenizer)
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
    measured = train_zoo.recall(model, train_zoo.inputs_of(DigitScenes("test", 1000), processor.tokenizer))
    assert measured["recall@1"] == pytest.approx(stated, abs=0.003)


# --- the training script ---------------------------------------------------------------------------------------------


def test_training_is_deterministic_and_leaves_a_loadable_folder(train_zoo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_zoo, "EVALUATED", 20)
    threads = torch.get_num_threads()
    stages = [train_zoo.Stage(steps=2, batch=8, objects=(1, 2), alike=alike, rate=1e-3) for alike in (1, 4)]
    try:
        for name in ("first", "second"):
            train_zoo.train_clip_digits(tmp_path / name, seed=7, threads=1, stages=stages)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second
    assert AutoModel.from_pretrained(tmp_path / "first").config.model_type == "clip"
    assert "validation recall@1" in capsys.readouterr().out
    card = (tmp_path / "first" / "README.md").read_text()
    assert "--seed 7 --threads 1" in card
    assert "every 4 in a row differ in their digits alone" in card
