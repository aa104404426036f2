"""``load_data`` and ``Data``: what comes out, and what is said when it cannot."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoProcessor,
    BlipConfig,
    BlipForConditionalGeneration,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)

from vlprune_ext import zoo
from vlprune_ext.data import Classes, Data, load_data
from vlprune_ext.data.prepare import IGNORED
from vlprune_ext.zoo import DigitScenes


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(zoo.path("clip-digits"))


@pytest.fixture
def pairs(tmp_path):
    """Writes the pictures of some scenes and a JSONL of the entries it is given (captions by default)."""
    scenes = DigitScenes("train", 4)
    for i, scene in enumerate(scenes):
        Image.fromarray(scene.image).save(tmp_path / f"{i}.png")

    def write(lines=None):
        if lines is None:
            lines = [{"image": f"{i}.png", "text": scene.caption} for i, scene in enumerate(scenes)]
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return path

    write.scenes = scenes
    return write


def word_tokenizer(words, **special):
    """One token a word, BOS in front, and only the special tokens asked for."""
    vocabulary = {token: i for i, token in enumerate([*special.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special['bos_token']} $A", special_tokens=[(special["bos_token"], vocabulary[special["bos_token"]])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


# --- digits ----------------------------------------------------------------------------------------------------------


def test_digits_are_pairs_of_a_picture_and_its_caption(processor):
    data = load_data("digits", "test", limit=20)
    assert (data.name, data.split, len(data), data.n_images) == ("digits", "test", 20, 20)
    assert data.images["pixel_values"].shape == (20, 3, 48, 48)
    assert data.texts["input_ids"].shape == data.texts["attention_mask"].shape
    assert set(data.texts) == {"input_ids", "attention_mask"}
    assert torch.equal(data.image_of_text, torch.arange(20))
    assert data.classes is None
    assert data.labels is None
    decoded = processor.tokenizer.batch_decode(data.texts["input_ids"], skip_special_tokens=True)
    assert [text.replace(" ,", ",") for text in decoded] == DigitScenes("test", 20).captions


def test_a_thousand_scenes_by_default():
    assert load_data("digits", "validation").n_images == 1000


def test_model_and_processor_give_the_same(processor):
    model = CLIPModel.from_pretrained(zoo.path("clip-digits"))
    by_model = load_data("digits", "test", model=model, limit=8)
    assert by_model.hash == load_data("digits", "test", processor=processor, limit=8).hash
    assert by_model.hash == load_data("digits", "test", limit=8).hash


def test_hash_follows_the_contents_alone():
    data = load_data("digits", "test", limit=8)
    assert re.fullmatch("[0-9a-f]{64}", data.hash)
    assert dataclasses.replace(data, name="other", split="other").hash == data.hash
    assert load_data("digits", "test", limit=8, seed=1).hash != data.hash
    pixels = data.images["pixel_values"].clone()
    pixels[0, 0, 0, 0] += 1e-3
    assert dataclasses.replace(data, images={"pixel_values": pixels}).hash != data.hash
    names = [str(i) for i in range(8)]
    classes = Classes(data.texts, torch.arange(8), names)
    with_classes = dataclasses.replace(data, classes=classes, labels=torch.arange(8))
    assert with_classes.hash != data.hash
    assert with_classes.hash != dataclasses.replace(with_classes, labels=torch.arange(8).flip(0)).hash
    renamed = dataclasses.replace(classes, names=names[::-1])
    assert with_classes.hash != dataclasses.replace(with_classes, classes=renamed).hash


def test_digit_classes_hold_every_single_scene_once_and_can_be_told_apart():
    data = load_data("digits-classes", "test")
    assert data.n_images == 320
    assert data.classes.names == list("0123456789")
    assert torch.equal(torch.bincount(data.labels), torch.full((10,), 32))
    assert data.classes.texts["input_ids"].shape[0] == len(data.classes.class_of_prompt) == 320
    assert len(torch.unique(data.texts["input_ids"], dim=0)) == 320
    model = CLIPModel.from_pretrained(zoo.path("clip-digits")).eval()
    with torch.no_grad():
        prompts = model(**data.batch([0]) | data.classes.texts).text_embeds  # [P, D]
        image = model(**data.batch(slice(None))).image_embeds  # [I, D]
    weight = torch.stack([prompts[data.classes.class_of_prompt == c].mean(0) for c in range(10)])
    guess = (image @ torch.nn.functional.normalize(weight, dim=-1).T).argmax(1)
    assert (guess == data.labels).float().mean() >= 0.7


# --- Data ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def several():
    """Three images with two, one and three texts, out of order; two processor rows an image under ``tiles``."""
    return Data(
        "some",
        "test",
        {"pixel_values": torch.arange(3.0)[:, None], "tiles": torch.arange(6)[:, None]},
        {"input_ids": torch.arange(6)[:, None]},
        torch.tensor([2, 0, 2, 1, 0, 2]),
        labels=torch.tensor([10, 11, 12]),
    )


def test_batch_takes_texts_with_the_image_of_each(several):
    batch = several.batch(torch.tensor([0, 1, 2]))
    assert batch["input_ids"].flatten().tolist() == [0, 1, 2]
    assert batch["pixel_values"].flatten().tolist() == [2, 0, 2]
    assert batch["tiles"].flatten().tolist() == [4, 5, 0, 1, 4, 5]
    assert several.batch(3)["pixel_values"].tolist() == [[1.0]]
    assert several.batch(slice(None))["input_ids"].shape == (6, 1)


def test_subset_takes_images_with_all_their_texts(several):
    part = several.subset(torch.tensor([2, 0]))
    assert part.n_images == 2
    assert part.images["pixel_values"].flatten().tolist() == [2, 0]
    assert part.images["tiles"].flatten().tolist() == [4, 5, 0, 1]
    assert part.texts["input_ids"].flatten().tolist() == [0, 2, 5, 1, 4]
    assert part.image_of_text.tolist() == [0, 0, 0, 1, 1]
    assert part.labels.tolist() == [12, 10]
    assert several.subset(1).texts["input_ids"].flatten().tolist() == [1, 4]
    mask = torch.tensor([False, True, False])
    assert several.subset(mask).hash == several.subset([1]).hash
    assert several.subset(3).n_images == 3


def test_a_subset_of_digits_is_what_a_smaller_limit_gives():
    data = load_data("digits", "test", limit=30)
    few = load_data("digits", "test", limit=10)
    assert torch.equal(data.subset(10).images["pixel_values"], few.images["pixel_values"])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (0, "subset of 0 images, expected 1 to 3"),
        (4, "subset of 4 images, expected 1 to 3"),
        ([], "expected [K] with K >= 1"),
        ([0, 3], "reach 0..3, expected 0..2"),
        ([-1], "reach -1..-1, expected 0..2"),
        ([1, 1], "name an image twice"),
        (torch.tensor([True]), "expected [3]"),
    ],
)
def test_bad_subsets_are_named(several, images, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        several.subset(images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_of_text": torch.tensor([0, 2, 2, 0, 2, 2])}, "image_of_text skips an image"),
        ({"image_of_text": torch.zeros(6)}, "expected int64 [T]"),
        ({"texts": {"input_ids": torch.zeros(5, 1)}}, "texts['input_ids'] has 5 rows, expected 6"),
        ({"images": {"pixel_values": torch.zeros(4, 1)}}, "images['pixel_values'] has 4 rows"),
        ({"labels": torch.zeros(2)}, "labels is [2], expected [3]"),
    ],
)
def test_tensors_that_do_not_fit_together_are_named(several, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(several, **change)


def test_moving_keeps_everything(several):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    classes = Classes({"input_ids": torch.zeros(2, 3)}, torch.tensor([0, 1]), ["a", "b"])
    data = dataclasses.replace(several, classes=classes)
    moved = data.to(device)
    assert moved.images["tiles"].device.type == moved.classes.texts["input_ids"].device.type == device
    assert moved.hash == data.hash
    assert torch.equal(moved.batch([5])["pixel_values"].cpu(), data.batch([5])["pixel_values"])
    assert torch.equal(moved.subset([2]).image_of_text.cpu(), data.subset([2]).image_of_text)
    assert "3 images, 6 texts" in repr(several)


# --- JSONL -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def read(pairs, processor):
    """Writes the given lines and loads them for clip-digits."""

    def read_lines(lines=None, split="calibration", **keywords):
        return load_data(pairs(lines), split, processor=processor, **keywords)

    return read_lines


def test_jsonl_round_trip(read):
    data = read()
    assert (data.name, data.split) == ("pairs.jsonl", "calibration")
    assert data.hash == load_data("digits", "train", limit=4).hash


def test_jsonl_texts_of_one_image_come_together(read):
    data = read(
        [
            {"image": "0.png", "text": ["a red 1", "a red 2"]},
            {"image": "1.png", "text": "a red 3"},
            "",
            {"image": "0.png", "text": "a red 4"},
        ]
    )
    assert data.n_images == 2
    assert data.image_of_text.tolist() == [0, 0, 0, 1]


def test_jsonl_labels_become_classes(read):
    lines = [{"image": f"{i}.png", "text": "a red 1", "label": label} for i, label in enumerate("abab")]
    data = read(lines, templates=("a photo of a {}.", "a {}"))
    assert data.labels.tolist() == [0, 1, 0, 1]
    assert data.classes.names == ["a", "b"]
    assert data.classes.class_of_prompt.tolist() == [0, 0, 1, 1]
    assert len(data.classes) == 2
    assert read(lines, limit=1).classes.names == ["a", "b"]


def test_jsonl_split(read):
    lines = [{"image": f"{i}.png", "text": f"a red {i}", "split": "mine" if i < 3 else "yours"} for i in range(4)]
    assert read(lines, split="mine").n_images == 3
    with pytest.raises(ValueError, match=r"split is 'test', but .*pairs\.jsonl has mine, yours"):
        read(lines, split="test")
    with pytest.raises(ValueError, match="split is 'mine', expected one of train, calibration, validation, test"):
        read(split="mine")


def test_jsonl_limit_is_a_choice_by_seed_in_the_files_order(read):
    every = read().images["pixel_values"]
    chosen = {seed: read(limit=2, seed=seed).images["pixel_values"] for seed in range(8)}
    assert torch.equal(chosen[3], read(limit=2, seed=3).images["pixel_values"])
    orders = set()
    for two in chosen.values():
        first, second = ((every == image).flatten(1).all(1).nonzero().item() for image in two)
        assert first < second
        orders.add((first, second))
    assert len(orders) > 1
    assert read(limit=100).n_images == 4


GOOD = {"image": "0.png", "text": "a red 1"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, "", '{"image": "0.png", '], "line 3: not JSON"),
        ([GOOD, "[1]"], "line 2: a list, expected an object"),
        ([{"text": "a"}], "line 1: no 'image'"),
        ([{"image": "0.png"}], "line 1: no 'text'"),
        ([GOOD, {"image": 3, "text": "a"}], "line 2: 'image' is 3, expected a non-empty string"),
        ([{"image": "0.png", "text": 3}], "line 1: 'text' is 3"),
        ([{"image": "0.png", "text": []}], "line 1: 'text' is []"),
        ([{"image": "0.png", "text": ["a", ""]}], "line 1: 'text' is ['a', '']"),
        ([{"image": "0.png", "text": "a", "label": 1}], "line 1: 'label' is 1"),
        ([GOOD | {"lable": "a"}], "line 1: a key 'lable', expected 'label'"),
        ([GOOD | {"splt": "test"}], "line 1: a key 'splt', expected 'split'"),
        ([GOOD | {"label": "a"}, GOOD], "line 2: no 'label', which other lines have"),
        ([GOOD, GOOD | {"split": "a"}], "line 1: no 'split', which other lines have"),
        ([GOOD | {"label": "a"}, GOOD | {"label": "b"}], "line 2: "),
        ([GOOD, {"image": "pairs.jsonl", "text": "a"}], "pairs.jsonl is not an image that can be read"),
        ([], "pairs.jsonl is empty"),
        (["", "  "], "pairs.jsonl is empty"),
    ],
)
def test_bad_jsonl_is_named(read, lines, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read(lines)
    assert "\n" not in str(caught.value)


def test_an_image_that_is_no_image_is_named_with_its_line(read):
    with pytest.raises(ValueError, match=r"pairs\.jsonl, line 2: .*pairs\.jsonl is not an image"):
        read([GOOD, {"image": "pairs.jsonl", "text": "a"}])


def test_a_truncated_image_is_named(read, pairs):
    path = pairs()
    whole = (path.parent / "1.png").read_bytes()
    (path.parent / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"line 2: .*1\.png is not an image that can be read"):
        read()


def test_lines_that_are_not_text_are_named(pairs, processor):
    path = pairs()
    path.write_bytes(b'{"image": "0.png", "text": "a"}\n\xff\xfe\n')
    with pytest.raises(ValueError, match="line 2: not JSON"):
        load_data(path, processor=processor)


def test_missing_files_are_named(read, tmp_path, processor):
    with pytest.raises(FileNotFoundError, match=r"line 2: no image .*gone\.png"):
        read([GOOD, {"image": "gone.png", "text": "a"}])
    with pytest.raises(FileNotFoundError, match=r"no file .*nothing\.jsonl"):
        load_data(tmp_path / "nothing.jsonl", processor=processor)
    with pytest.raises(ValueError, match="is a folder, expected a JSONL file"):
        load_data(tmp_path, processor=processor)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "split is 'dev', expected one of train, calibration, validation, test"),
        ({"limit": True}, "limit is True"),
        ({"limit": 0}, "limit is 0, expected an int of at least 1"),
        ({"limit": 2.5}, "limit is 2.5"),
        ({"seed": -1}, "seed is -1"),
        ({"processor": object(), "limit": 1}, "processor is a object"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_data("digits", **arguments)


def test_a_processor_that_cannot_be_found_is_said(pairs, tmp_path):
    with pytest.raises(ValueError, match="no model or processor was given"):
        load_data(pairs())
    model = CLIPModel.from_pretrained(zoo.path("clip-digits"))
    model.name_or_path = ""
    with pytest.raises(ValueError, match="the model was not loaded from a folder"):
        load_data(pairs(), model=model)
    model.name_or_path = str(tmp_path)
    with pytest.raises(ValueError, match="no processor could be loaded from") as caught:
        load_data(pairs(), model=model)
    assert "\n" not in str(caught.value)


# --- other models ----------------------------------------------------------------------------------------------------


def test_single_towers_get_only_what_they_take():
    folder = zoo.path("clip-digits")
    vision = load_data("digits", "test", model=CLIPVisionModel.from_pretrained(folder), limit=5)
    assert vision.texts == {}
    assert len(vision) == vision.n_images == 5
    assert set(vision.batch([1, 2])) == {"pixel_values"}
    assert vision.subset(2).n_images == 2
    text = load_data("digits", "test", model=CLIPTextModelWithProjection.from_pretrained(folder), limit=5)
    assert text.images == {}
    assert len(text) == 5
    assert set(text.batch([1, 2])) == {"input_ids", "attention_mask"}
    classes = load_data("digits-classes", "test", model=CLIPVisionModel.from_pretrained(folder), limit=5).classes
    assert classes.names == list("0123456789")
    assert classes.texts == {}


def test_a_decoder_without_a_pad_token_gets_labels():
    words = DigitScenes("test", 200).captions
    tokenizer = word_tokenizer(
        sorted({word for text in words for word in text.split()}),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
    assert tokenizer.pad_token is None
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
        )
    )
    data = load_data("digits", "test", model=model, processor=tokenizer, limit=10)
    assert data.images == {}
    mask, labels, ids = (data.texts[key] for key in ("attention_mask", "labels", "input_ids"))
    assert not mask.all()
    assert (labels[mask == 0] == IGNORED).all()
    assert (labels[:, 0] == IGNORED).all()  # BOS
    scored = mask.bool()
    scored[:, 0] = False
    assert torch.equal(labels[scored], ids[scored])
    assert model(**data.batch([0, 1])).loss.isfinite()


@pytest.fixture
def llava(processor):
    tokenizer = word_tokenizer(
        ["<image>", *sorted({word for text in DigitScenes("test", 200).captions for word in text.split()})],
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return LlavaProcessor(
        processor.image_processor,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def test_llava_gets_image_tokens_in_front_and_labels_after_them(llava):
    data = load_data("digits", "test", processor=llava, limit=6)
    ids, labels, mask = (data.texts[key] for key in ("input_ids", "labels", "attention_mask"))
    image = ids == llava.image_token_id
    assert (image.sum(1) == 36).all()
    assert (labels[image] == IGNORED).all()
    assert (labels[mask == 0] == IGNORED).all()
    for row, caption in zip(labels, DigitScenes("test", 6).captions, strict=True):
        assert llava.tokenizer.decode(row[row != IGNORED]) == caption
    assert data.images["pixel_values"].shape == (6, 3, 48, 48)
    assert data.batch([4, 2])["pixel_values"].shape == (2, 3, 48, 48)
    assert load_data("digits-classes", "test", processor=llava, limit=6).classes is None


def test_llava_keeps_a_prompt_that_places_the_image_itself(pairs, llava):
    data = load_data(pairs([{"image": "0.png", "text": ["a red <image> blue 7", "green 3"]}]), processor=llava)
    first, second = (row[row != IGNORED] for row in data.texts["labels"])
    assert llava.tokenizer.decode(first) == "blue 7"
    assert llava.tokenizer.decode(second) == "green 3"
    assert data.images["pixel_values"].shape[0] == 1


def test_siglip_texts_are_padded_to_full_length_without_a_mask(processor):
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = SiglipModel(
        SiglipConfig(
            text_config=tower | {"vocab_size": 64, "max_position_embeddings": 32},
            vision_config=tower | {"image_size": 48, "patch_size": 16},
        )
    )
    data = load_data("digits", "test", model=model, processor=processor, limit=3)
    assert data.texts["input_ids"].shape == (3, 32)
    assert (data.texts["attention_mask"] == 1).all()
    assert model(**data.batch(slice(None))).logits_per_image.shape == (3, 3)


def test_a_captioner_is_scored_on_its_text(processor):
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BlipForConditionalGeneration(
        BlipConfig(
            text_config=tower | {"vocab_size": 64, "encoder_hidden_size": 16},
            vision_config=tower | {"image_size": 48, "patch_size": 16},
        )
    )
    data = load_data("digits", "test", model=model, processor=processor, limit=3)
    assert set(data.batch([0])) == {"input_ids", "attention_mask", "labels", "pixel_values"}
    assert model(**data.batch([0, 1])).loss.isfinite()


class _Tiles:
    """A processor side by side with clip-digits' tokenizer, with several rows an image, as Qwen-VL's has."""

    def __init__(self, processor, rows):
        self.tokenizer = processor.tokenizer
        self.rows = rows

    def image_processor(self, images, return_tensors):
        values = torch.stack([torch.tensor(image.getpixel((0, 0))) for image in images])  # [I, 3]
        return {"pixel_values": values.repeat_interleave(self.rows, 0), "image_grid_thw": values}


def test_processors_with_several_rows_an_image(processor):
    data = load_data("digits", "test", processor=_Tiles(processor, rows=4), limit=3)
    assert data.images["pixel_values"].shape == (12, 3)
    batch = data.batch([2, 2])
    assert batch["pixel_values"].shape == (8, 3)
    assert torch.equal(batch["pixel_values"][4], batch["image_grid_thw"][1])


def test_processors_with_images_of_different_shapes_are_refused(pairs, processor):
    class Sized:
        tokenizer = processor.tokenizer
        image_token = "<image>"
        image_token_id = 5

        def __init__(self):
            self.calls = 0

        def image_processor(self, images, return_tensors):
            raise NotImplementedError

        def __call__(self, images, text, return_tensors):
            self.calls += 1
            return {
                **processor.tokenizer(text, return_tensors="pt"),
                "pixel_values": torch.zeros(1, 3, 8, 8 * self.calls),
            }

    with pytest.raises(ValueError, match="the processor gives pixel_values of different shapes"):
        load_data(pairs(), processor=Sized())
