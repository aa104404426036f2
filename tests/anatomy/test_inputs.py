"""What `load_data` prepares for models whose text does not all go one way: T5, BLIP-2, InstructBLIP."""

import json

import pytest
import torch
import transformers
from models import tiny
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from vlprune_ext.anatomy import describe
from vlprune_ext.data import load_data
from vlprune_ext.objectives import LMLoss

WORDS = ["<pad>", "</s>", "<unk>", "red", "blue", "what", "seven"]


def tokenizer(image_token=True):
    """Words, and an end-of-text token after them."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )
    if image_token:
        fast.add_tokens([AddedToken("<image>", normalized=False, special=True)], special_tokens=True)
    return fast


def processor(name):
    size = {"height": 12, "width": 12}
    images = transformers.BlipImageProcessor(size=size)
    if name.startswith("blip2"):
        return transformers.Blip2Processor(images, tokenizer(), num_query_tokens=5)
    return transformers.InstructBlipProcessor(images, tokenizer(), tokenizer(False), num_query_tokens=5)


def build(name):
    model = tiny.build(name)
    model.config.image_token_index = len(WORDS)
    return model


@pytest.fixture
def lines(tmp_path):
    Image.new("RGB", (12, 12), "red").save(tmp_path / "a.png")
    Image.new("RGB", (12, 12), "blue").save(tmp_path / "b.png")
    path = tmp_path / "data.jsonl"
    entries = [{"image": "a.png", "text": ["red seven", "what <image> red"]}, {"image": "b.png", "text": "blue"}]
    path.write_text("\n".join(json.dumps(entry) for entry in entries))
    return path


def lm_loss(model, data):
    anatomy, objective = describe(model), LMLoss()
    with torch.no_grad():
        return objective.run(anatomy, objective.towers(anatomy)[0], data, 2)


def test_t5_reads_and_writes_the_text(lines):
    model = tiny.build("t5")
    lines.write_text(lines.read_text().replace("<image> ", ""))
    data = load_data(lines, model=model, processor=tokenizer())
    assert data.texts["input_ids"].tolist() == [[3, 6, 1], [5, 3, 1], [4, 1, 0]]
    assert data.texts["labels"].tolist() == [[0, 3, 6, 1], [0, 5, 3, 1], [0, 4, 1, -100]]
    assert lm_loss(model, data).isfinite().all()


@pytest.mark.parametrize("name", ["blip2_t5", "instruct_t5"])
def test_the_decoder_writes_the_text_and_the_encoder_does_not_see_it(name, lines):
    model = build(name)
    data = load_data(lines, model=model, processor=processor(name))
    image = [7] * 5
    assert data.texts["input_ids"].tolist() == [[*image, 1, 0], [*image, 5, 1], [*image, 1, 0]]
    assert data.texts["attention_mask"].sum(1).tolist() == [6, 7, 6]
    assert data.texts["labels"].tolist() == [[0, 3, 6, 1], [0, 3, 1, -100], [0, 4, 1, -100]]
    if name == "instruct_t5":
        assert data.texts["qformer_input_ids"].tolist() == [[1, 0], [5, 1], [1, 0]]
        assert data.texts["qformer_attention_mask"].tolist() == [[1, 0], [1, 1], [1, 0]]
    assert data.images.keys() == {"pixel_values"}
    assert lm_loss(model, data).isfinite().all()


@pytest.mark.parametrize("name", ["blip2_opt", "instruct_llama"])
def test_one_placeholder_for_each_query_token(name, lines):
    model = build(name)
    data = load_data(lines, model=model, processor=processor(name))
    image = [7] * 5
    assert data.texts["input_ids"].tolist() == [[*image, 3, 6, 1], [*image, 5, 3, 1], [*image, 4, 1, 0]]
    blank = [-100] * 5
    assert data.texts["labels"].tolist() == [[*blank, 3, 6, 1], [*blank, 5, 3, 1], [*blank, 4, 1, -100]]
    assert ("qformer_input_ids" in data.texts) == (name == "instruct_llama")
    assert lm_loss(model, data).isfinite().all()
