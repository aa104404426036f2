"""One forward with fewer tokens: what keeps all is dense, dropping is masking, and a sample is alone in its batch."""

import pytest
import torch
import torch.nn.functional as F
from models import tiny
from tokens import oracle

import vlprune_ext as vp

DROPPING = [
    vp.FastV(layer=2, keep=0.4),
    vp.PyramidDrop(keep=0.6, layers=(1, 3)),
    vp.RandomTokens(keep=0.4),
    vp.RandomTokens(keep=0.3, layer=3),
]
IDS = ["FastV", "PyramidDrop", "RandomTokens", "RandomTokens-late"]


def pruned(model, method, values, **kwargs):
    with vp.prune_tokens(model, method) as pruning, torch.no_grad():
        return model(**values, **kwargs), pruning


def logits_of(model, method, values):
    output, pruning = pruned(model, method, values)
    return output.logits, pruning


# --- nothing leaves --------------------------------------------------------------------------------------------------


def everything(name):
    """Every method that a family can have, keeping all."""
    methods = [vp.FastV(keep=1.0), vp.PyramidDrop(keep=1.0), vp.RandomTokens(keep=1.0), vp.DivPrune(keep=1.0)]
    if name != "blip_vqa":
        methods += [vp.PLPHP(keep=1.0, spread=0.0), vp.LookM(keep=1.0)]
    if name in ("llava", "blip_vqa"):
        methods.append(vp.VisionZip(keep=1.0))
    if name in ("llava", "paligemma", "blip_vqa"):
        methods.append(vp.ToMe(keep=1.0))
    return methods


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", [*tiny.DECODERS, "blip_vqa"])
def test_keeping_all_is_dense_bit_for_bit(name, dtype):
    model = tiny.build(name).to(dtype)
    values = tiny.inputs(name, model, 3)
    values["pixel_values"] = values["pixel_values"].to(dtype)
    dense = tiny.outputs(name, model, values)
    for method in everything(name):
        with vp.prune_tokens(model, method):
            torch.testing.assert_close(tiny.outputs(name, model, values), dense, rtol=0, atol=0, msg=method.name)


# --- dropping is masking ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("method", DROPPING, ids=IDS)
@pytest.mark.parametrize("name", tiny.DECODERS)
def test_what_left_is_as_if_masked(name, method, side):
    values = oracle.prompts(name, 3, side, labels=True)
    del values["labels"]
    logits, pruning = logits_of(oracle.model(name), method, values)
    expected = oracle.logits_with(oracle.model(name, "eager"), values, pruning.kept)
    last = pruning.kept[max(pruning.kept)]
    oracle.close(logits[last], expected[last])
    dense = oracle.logits_with(oracle.model(name, "eager"), values, {})
    assert (expected[last] - dense[last]).abs().max() > 1e-3, "dropping changes something"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("method", [*DROPPING, vp.VisionZip(keep=0.5), vp.ToMe(keep=0.5)], ids=lambda m: m.name)
def test_eager_and_sdpa_agree(method, implementation):
    values = oracle.llava_prompts([(1, 3), (2, 5), (0, 4), (1, 9)])
    logits, pruning = logits_of(oracle.model("llava", "eager"), method, values)
    others, other = logits_of(oracle.model("llava", "sdpa"), method, values)
    assert pruning.kept.keys() == other.kept.keys()
    assert all(torch.equal(pruning.kept[layer], other.kept[layer]) for layer in pruning.kept)
    seen = oracle.valid(values)
    oracle.close(logits[seen], others[seen])


@pytest.mark.parametrize("method", DROPPING, ids=IDS)
def test_a_dropped_token_shows_the_last_one_kept_before_it(method):
    values = oracle.llava_prompts([(1, 3), (2, 5), (0, 4)], "left")
    logits, pruning = logits_of(oracle.model("llava"), method, values)
    last = pruning.kept[max(pruning.kept)]
    for sample, (seen, kept) in enumerate(zip(oracle.valid(values).tolist(), last.tolist(), strict=True)):
        before = None
        for place, stays in enumerate(kept):
            before = place if stays else before
            if seen[place]:
                assert torch.equal(logits[sample, place], logits[sample, before])


@pytest.mark.parametrize("name", ["llava", "paligemma", "internvl"])
@pytest.mark.parametrize("method", [vp.FastV(layer=2, keep=0.4), vp.PyramidDrop(keep=0.6, layers=(1, 3))], ids=IDS[:2])
def test_renumbered_positions(name, method):
    values = oracle.prompts(name, 3, "left")
    method = type(method)(**{**vars(method), "positions": "renumber"})
    logits, pruning = logits_of(oracle.model(name), method, values)
    gone = oracle.gone_behind(values, pruning.kept)
    positions = {layer: ((oracle.valid(values) & ~lost).cumsum(1) - 1).clamp(min=0) for layer, lost in gone.items()}
    dense = oracle.model(name, "eager")
    with torch.no_grad(), oracle.blinded(dense, gone, positions=positions):
        expected = dense(**values).logits
    last = pruning.kept[max(pruning.kept)]
    oracle.close(logits[last], expected[last])
    assert (expected - oracle.logits_with(dense, values, pruning.kept))[last].abs().max() > 1e-3


def test_renumbered_from_the_first_block_on_is_a_shorter_sequence():
    model, values = oracle.model("llava"), oracle.prompts("llava", 1)
    method = vp.RandomTokens(keep=0.4, positions="renumber")
    logits, pruning = logits_of(model, method, values)
    kept = pruning.kept[0]
    embeds = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: embeds.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**values)
        handle.remove()
        expected = model(inputs_embeds=embeds[0][kept][None]).logits
    oracle.close(logits[kept], expected[0])


# --- a sample and its batch ------------------------------------------------------------------------------------------


def expect_alone(model, method, values, alone):
    """Each sample's logits and kept tokens are those that it has by itself: ``alone(sample)``."""
    logits, pruning = logits_of(model, method, values)
    for sample, seen in enumerate(oracle.valid(values)):
        single = alone(sample)
        if single is None:  # no image
            with torch.no_grad():
                expected = model(input_ids=values["input_ids"][sample : sample + 1, seen]).logits
            assert isinstance(method, vp.ToMe) or all(torch.equal(kept[sample], seen) for kept in pruning.kept.values())
        else:
            expected, of_single = logits_of(model, method, single)
            if not isinstance(method, vp.ToMe):  # whose tokens are those of the images
                for layer, kept in pruning.kept.items():
                    assert torch.equal(kept[sample][seen], of_single.kept[layer][0])
        oracle.close(logits[sample][seen], expected[0])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", tiny.DECODERS)
def test_a_sample_does_not_depend_on_its_batch(name, side):
    values = oracle.prompts(name, 4, side)
    for method in (vp.FastV(layer=1, keep=0.4), vp.PyramidDrop(keep=0.6), vp.RandomTokens(keep=0.4, layer=1)):
        expect_alone(oracle.model(name), method, values, lambda sample: oracle.alone(values, sample))


@pytest.mark.parametrize("side", ["right", "left", "as long"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "method",
    [*DROPPING, vp.FastV(layer=1, keep=0.4, positions="renumber"), vp.VisionZip(keep=0.5), vp.ToMe(keep=0.5)],
    ids=lambda m: m.name,
)
def test_samples_with_different_numbers_of_images(method, implementation, side):
    images = (1, 2, 0, 1)
    words = (12, 1, 23, 12) if side == "as long" else (3, 5, 4, 9)  # no mask comes where there is no padding
    values = oracle.llava_prompts(list(zip(images, words, strict=True)), side)

    def alone(sample):
        if not images[sample]:
            return None
        seen, first = oracle.valid(values)[sample], sum(images[:sample])
        single = {name: values[name][sample : sample + 1, seen] for name in ("input_ids", "attention_mask")}
        return {**single, "pixel_values": values["pixel_values"][first : first + images[sample]]}

    expect_alone(oracle.model("llava", implementation), method, values, alone)


def test_no_attention_mask_is_one_of_ones():
    values = oracle.prompts("llava", 1)
    with_mask, _ = logits_of(oracle.model("llava"), vp.FastV(keep=0.4), values)
    del values["attention_mask"]
    without, pruning = logits_of(oracle.model("llava"), vp.FastV(keep=0.4), values)
    oracle.close(with_mask, without)
    assert pruning.kept[2].sum() == values["input_ids"].shape[1] - 5


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", DROPPING, ids=IDS)
@pytest.mark.parametrize("first", ["question", "image"])
def test_the_loss_is_that_of_the_shorter_sequence(method, first):
    """Labels may begin right behind the image, so that a visual token predicts the first one."""
    values = oracle.prompts("llava", 3, "left", labels=True)
    if first == "image":
        labels = values["input_ids"].masked_fill(~oracle.valid(values) | oracle.visual(values), -100)
        values["labels"] = labels.masked_fill(labels == tiny.BOS, -100)
    output, pruning = pruned(oracle.model("llava"), method, values)
    labels = values.pop("labels")
    logits = oracle.logits_with(oracle.model("llava", "eager"), values, pruning.kept)
    last = pruning.kept[max(pruning.kept)]
    predicted, target = [], []
    for sample, kept in enumerate(last):
        predicted.append(logits[sample][kept][:-1])
        target.append(labels[sample][kept][1:])
    expected = F.cross_entropy(torch.cat(predicted), torch.cat(target), ignore_index=-100)
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=0)


def gradients(model, method, values):
    model.zero_grad()
    pixels = values["pixel_values"].clone().requires_grad_()
    with vp.prune_tokens(model, method) as pruning:
        model(**{**values, "pixel_values": pixels}).loss.backward()
    return {"pixels": pixels.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, pruning


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_gradients_are_those_of_masking(name):
    values = oracle.prompts(name, 3, labels=True)
    found, pruning = gradients(tiny.build(name), vp.RandomTokens(keep=0.4, layer=1), values)
    dense = tiny.build(name)
    dense.set_attn_implementation("eager")
    pixels = values["pixel_values"].clone().requires_grad_()
    with oracle.blinded(dense, oracle.gone_behind(values, pruning.kept)):
        dense(**{**values, "pixel_values": pixels}).loss.backward()
    expected = {"pixels": pixels.grad} | {n: p.grad for n, p in dense.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6 * scale, msg=key)
    assert pixels.grad.abs().max() > 0


@pytest.mark.parametrize("method", [*DROPPING, vp.VisionZip(keep=0.5), vp.ToMe(keep=0.5)], ids=lambda m: m.name)
def test_a_training_step_has_finite_gradients(method):
    model = tiny.build("llava").train()
    found, _ = gradients(model, method, oracle.prompts("llava", 3, labels=True))
    assert all(gradient.isfinite().all() for gradient in found.values())
    for part in (
        "pixels",
        "model.language_model.layers.3.mlp.up_proj.weight",
        "model.multi_modal_projector.linear_1.bias",
    ):
        assert found[part].abs().max() > 0
