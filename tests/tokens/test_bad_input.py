"""What token pruning says of methods, models and batches that it cannot prune."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from models import tiny
from tokens import oracle
from transformers import DynamicCache, StaticCache

import vlprune_ext as vp

SHARES = [vp.FastV, vp.PyramidDrop, vp.VisionZip, vp.DivPrune, vp.RandomTokens, vp.ToMe, vp.LookM, vp.PLPHP]


@pytest.mark.parametrize("keep", [0, -0.5, 1.5, float("nan"), True, "half", None])
@pytest.mark.parametrize("method", SHARES)
def test_a_share_that_is_none(method, keep):
    with pytest.raises(ValueError, match=r"keep is .*; expected a share 0 < keep <= 1"):
        method(keep=keep)


def test_other_fields():
    with pytest.raises(ValueError, match=r"spread is 1\.0"):
        vp.PLPHP(spread=1.0)
    with pytest.raises(ValueError, match=r"low 0\.5 and high 0\.2"):
        vp.PLPHP(low=0.5, high=0.2)


@pytest.mark.parametrize(
    "method",
    [
        vp.FastV(layer=0),
        vp.FastV(layer=4),
        vp.FastV(layer=-1),
        vp.PyramidDrop(layers=(0, 1)),
        vp.PyramidDrop(layers=(1, 4)),
        vp.RandomTokens(layer=4),
        vp.RandomTokens(layer=-1),
        vp.DivPrune(layer=7),
        vp.LookM(skip=-1),
        vp.LookM(skip=5),
        vp.PLPHP(skip=-1),
        vp.PLPHP(skip=5),
    ],
    ids=str,
)
def test_blocks_that_there_are_not(method):
    with pytest.raises(ValueError, match=r"layer|skip"), vp.prune_tokens(oracle.model("llava"), method):
        pass


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        ("llama", vp.FastV(), "LlamaForCausalLM has no language model that reads visual tokens"),
        ("clip", vp.FastV(), "CLIPModel has no language model that reads visual tokens"),
        ("blip2_opt", vp.LookM(), "Blip2ForConditionalGeneration has no language model"),
        ("llama", vp.ToMe(), "LlamaForCausalLM has no vision tower"),
        ("blip_vqa", vp.LookM(), "keeps no visual tokens in a key-value cache"),
        ("blip_vqa", vp.PLPHP(), "keeps no visual tokens in a key-value cache"),
        ("blip_vqa", vp.FastV(layer=3), "layer 3, expected 1 <= layer < 3"),
        ("llava_next", vp.VisionZip(), "not, one by one, the visual tokens"),
        ("internvl", vp.ToMe(), "not, one by one, the visual tokens"),
        ("llava", vp.FastV(positions="bogus"), "positions is 'bogus'; expected one of keep, renumber"),
        ("blip_vqa", vp.FastV(positions="bogus"), "positions is 'bogus'; expected one of keep, renumber"),
        ("qwen2_5_vl", vp.FastV(positions="renumber"), 'expected "keep" for positions of time, height and width'),
        ("vit", vp.ToMe(keep=0.01), None),
    ],
)
def test_models_that_cannot(name, method, message):
    if message is None:  # 9 patches: 5, 3, 2, 1
        with vp.prune_tokens(oracle.model(name), method):
            assert oracle.model(name)(**tiny.inputs(name, oracle.model(name), 1)).last_hidden_state.shape[1] == 2
        return
    with pytest.raises(ValueError, match=message), vp.prune_tokens(oracle.model(name), method):
        pass


@pytest.mark.parametrize("method", [object(), vp.FastV, "FastV", vp.MoPE()], ids=lambda x: type(x).__name__)
def test_a_method_that_is_none(method):
    with pytest.raises(TypeError, match="expected a TokenMethod"), vp.prune_tokens(oracle.model("llava"), method):
        pass


def refused(message, method, **values):
    with pytest.raises(ValueError, match=message), vp.prune_tokens(oracle.model("llava"), method), torch.no_grad():
        oracle.model("llava")(**values)


@pytest.mark.parametrize("method", [vp.FastV(), vp.LookM(), vp.RandomTokens(), vp.ToMe()], ids=lambda m: m.name)
def test_batches_without_images(method):
    values = oracle.prompts("llava", 2)
    text = {"input_ids": torch.full((2, 5), 7), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    refused("no visual token", method, **text)
    embeds = oracle.model("llava").get_input_embeddings()(values["input_ids"])
    refused("input_ids: none came", method, inputs_embeds=embeds, attention_mask=values["attention_mask"])


def test_masks_of_four_dimensions():
    values = oracle.prompts("llava", 1)
    tokens = values["input_ids"].shape[1]
    values["attention_mask"] = torch.zeros(1, 1, tokens, tokens)
    refused(r"attention_mask has shape \[1, 1, ", vp.FastV(), **values)


@pytest.mark.parametrize("method", [vp.FastV(), vp.LookM()], ids=lambda m: m.name)
def test_caches_that_are_not_dynamic(method):
    values, model = oracle.prompts("llava", 1), oracle.model("llava")
    config = model.config.get_text_config()
    refused("is a StaticLayer", method, **values, past_key_values=StaticCache(config=config, max_cache_len=64))
    sliding = DynamicCache(config=transformers.MistralConfig(num_hidden_layers=4, sliding_window=8))
    refused("is a DynamicSlidingWindowLayer", method, **values, past_key_values=sliding)
    with pytest.raises(ValueError, match="is a StaticLayer"), vp.prune_tokens(model, method):
        model.generate(**values, max_new_tokens=2, cache_implementation="static")


@pytest.mark.parametrize("method", [vp.FastV(), vp.LookM()], ids=lambda m: m.name)
def test_images_in_a_later_turn(method):
    values, model = oracle.prompts("llava", 1), oracle.model("llava")
    tokens = values["input_ids"].shape[1]
    with vp.prune_tokens(model, method), torch.no_grad():
        cache = model(**values, use_cache=True).past_key_values
        again = {**values, "attention_mask": F.pad(values["attention_mask"], (0, tokens), value=1)}
        with pytest.raises(ValueError, match="images after the first forward"):
            model(**again, past_key_values=cache)
        again["input_ids"] = torch.cat([values["input_ids"], values["input_ids"]], 1)
        with pytest.raises(ValueError, match="images after the first forward"):
            model.generate(**again, past_key_values=cache, max_new_tokens=2)


@pytest.mark.parametrize(
    ("name", "method"),
    [("llava", vp.FastV()), ("llava", vp.RandomTokens()), ("llava", vp.ToMe()), ("blip_vqa", vp.FastV())],
    ids=["FastV", "RandomTokens", "ToMe", "BLIP"],
)
def test_checkpointed_gradients(name, method):
    """Blocks that run again in the backward pass would prune again."""
    model = tiny.build(name)
    values = tiny.inputs(name, model, 2)
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(ValueError, match="gradient checkpointing"), vp.prune_tokens(model, method):
        model(**values).loss.backward()
