"""Which tokens stay: those that the definition names, on whole attention maps of a dense eager model."""

import pytest
import torch
from models import tiny
from tokens import oracle

import vlprune_ext as vp

LAYOUTS = [(1, "right"), (4, "right"), (4, "left")]
layouts = pytest.mark.parametrize(("n", "side"), LAYOUTS, ids=["alone", "right", "left"])


def chosen(name, method, values):
    """What `prune_tokens` keeps, with SDPA."""
    with vp.prune_tokens(oracle.model(name), method) as pruning, torch.no_grad():
        oracle.model(name)(**values)
    return pruning


def same(kept, expected):
    assert kept.keys() == expected.keys()
    for layer, tokens in expected.items():
        torch.testing.assert_close(kept[layer], tokens, rtol=0, atol=0)


@layouts
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("name", tiny.DECODERS)
def test_fastv(name, labels, n, side):
    values = oracle.prompts(name, n, side, labels=labels)
    pruning = chosen(name, vp.FastV(layer=2, keep=0.4), values)
    same(pruning.kept, oracle.by_last_row(oracle.model(name, "eager"), values, {2: 0.4}))
    assert torch.equal(pruning.visual, oracle.visual(values))


def test_who_asks_matters():
    """With labels the last token of the question asks, which is not the last one of the sequence."""
    values = oracle.prompts("llava", 4, labels=True)
    unlabelled = {name: value for name, value in values.items() if name != "labels"}
    with_labels, without = (chosen("llava", vp.FastV(keep=0.4), v).kept[2] for v in (values, unlabelled))
    assert not torch.equal(with_labels, without)


def test_labels_in_front_of_an_image_do_not_ask():
    """Whoever asks has seen all images."""
    values = oracle.prompts("llava", 4, labels=True)
    early = values["labels"].clone()
    early[:, 1:4] = values["input_ids"][:, 1:4]  # as in a conversation with an answer before the picture
    first, second = (
        chosen("llava", vp.FastV(keep=0.4), {**values, "labels": labels}).kept[2]
        for labels in (values["labels"], early)
    )
    assert torch.equal(first, second)


@layouts
@pytest.mark.parametrize(("layers", "stages"), [(None, {1: 0.5, 2: 0.25, 3: 0.125}), ((1, 3), {1: 0.5, 3: 0.25})])
def test_pyramid_drop(n, side, layers, stages):
    values = oracle.prompts("llava", n, side)
    pruning = chosen("llava", vp.PyramidDrop(keep=0.5, layers=layers), values)
    same(pruning.kept, oracle.by_last_row(oracle.model("llava", "eager"), values, stages))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "paligemma"])
def test_pyramid_drop_in_other_families(name, side):
    values = oracle.prompts(name, 4, side)
    pruning = chosen(name, vp.PyramidDrop(keep=0.7, layers=(1, 2)), values)
    same(pruning.kept, oracle.by_last_row(oracle.model(name, "eager"), values, {1: 0.7, 2: 0.7**2}))


@pytest.mark.parametrize("words", [0, 1])
def test_a_visual_token_that_asks_may_leave(words):
    """Prompts that end with the image, or whose first label follows it: the last token kept asks from then on."""
    values = oracle.llava_prompts([(1, words), (2, words)], "left")
    if words:
        values["labels"] = values["input_ids"].masked_fill(oracle.visual(values), -100)
        values["labels"][:, :-1] = -100
    dense, stages = oracle.model("llava", "eager"), {1: 0.5, 2: 0.25, 3: 0.125}
    kept = oracle.by_last_row(dense, values, stages)
    assert not all(kept[1][sample, row] for sample, row in enumerate(oracle.asking(values)))
    same(chosen("llava", vp.PyramidDrop(), values).kept, kept)


@pytest.mark.parametrize("side", ["right", "left"])
def test_different_numbers_of_images(side):
    values = oracle.llava_prompts([(1, 3), (2, 5), (0, 4), (1, 9)], side)
    dense = oracle.model("llava", "eager")
    pruning = chosen("llava", vp.FastV(layer=1, keep=0.4), values)
    same(pruning.kept, oracle.by_last_row(dense, values, {1: 0.4}))
    pruning = chosen("llava", vp.PyramidDrop(keep=0.6, layers=(1, 2, 3)), values)
    same(pruning.kept, oracle.by_last_row(dense, values, {1: 0.6, 2: 0.36, 3: 0.216}))


@layouts
@pytest.mark.parametrize("contextual", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("keep", [0.1, 0.6])
def test_vision_zip(n, side, keep, contextual):
    values = oracle.prompts("llava", n, side)
    states = []
    projector = oracle.model("llava").model.multi_modal_projector
    with vp.prune_tokens(oracle.model("llava"), vp.VisionZip(keep, contextual)) as pruning, torch.no_grad():
        handle = projector.register_forward_hook(lambda _, args, __: states.append(args[0]))
        oracle.model("llava")(**values)
        handle.remove()
    kept, merged = oracle.zipped(oracle.model("llava", "eager"), values["pixel_values"], keep, contextual)
    expected = oracle.valid(values).masked_scatter(oracle.visual(values), kept)
    same(pruning.kept, {0: expected})
    torch.testing.assert_close(states[0][kept], merged[kept], rtol=0, atol=1e-5)


@layouts
@pytest.mark.parametrize("layer", [0, 2])
def test_div_prune(n, side, layer):
    values = oracle.prompts("llava", n, side)
    with torch.no_grad():
        hidden = oracle.model("llava", "eager")(**values, output_hidden_states=True).hidden_states[layer]
    expected = oracle.valid(values) & ~oracle.visual(values)
    for sample, tokens in enumerate(oracle.visual(values)):
        expected[sample] |= oracle.farthest(hidden[sample], tokens, oracle.share(0.5, 9))
    same(chosen("llava", vp.DivPrune(keep=0.5, layer=layer), values).kept, {layer: expected})


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_random_tokens_depend_on_seed_and_text_alone(name):
    values = oracle.prompts(name, 4)
    left = oracle.left_padded(values)
    left["input_ids"] = left["input_ids"].masked_fill(~oracle.valid(left), 7)  # not every padding is 0
    for seed in range(3):
        method = vp.RandomTokens(keep=0.5, layer=1, seed=seed)
        kept = chosen(name, method, values).kept[1]
        assert torch.equal(chosen(name, method, values).kept[1], kept), "the same each time"
        in_front = chosen(name, method, left).kept[1]
        for sample in range(4):
            single = chosen(name, method, oracle.alone(values, sample)).kept[1][0]
            assert torch.equal(single, kept[sample][oracle.valid(values)[sample]])
            assert torch.equal(single, in_front[sample][oracle.valid(left)[sample]])


def test_random_tokens_are_all_as_likely():
    values = oracle.prompts("llava", 32)
    visual, draws = oracle.visual(values), []
    for seed in range(8):
        kept = chosen("llava", vp.RandomTokens(keep=0.4, seed=seed), values).kept[0]
        assert torch.equal(kept & ~visual, oracle.valid(values) & ~visual), "text stays"
        draws.append(kept[visual].view(32, 9))
        assert (draws[-1].sum(1) == 4).all()
    narrow = {**values, "input_ids": values["input_ids"].int()}
    assert torch.equal(chosen("llava", vp.RandomTokens(keep=0.4, seed=7), narrow).kept[0], kept)
    often = torch.cat(draws).float().mean(0)  # 256 draws of 4 of 9 tokens: at most 5 deviations
    assert (often - 4 / 9).abs().max() < 5 * (4 / 9 * 5 / 9 / 256) ** 0.5
    assert len(torch.cat(draws).int().unique(dim=0)) > 60, "of 126 sets"


# --- key-value cache -------------------------------------------------------------------------------------------------


def prefill(name, method, values):
    """The cache that a prompt leaves behind, and what `prune_tokens` says of it."""
    with vp.prune_tokens(oracle.model(name), method) as pruning, torch.no_grad():
        cache = oracle.model(name)(**values, use_cache=True).past_key_values
    return cache, pruning


def entries(layer, sample):
    """Keys and values [H, K, d] of one sample that count."""
    counted = slice(None) if layer.valid is None else layer.valid[sample]
    return layer.keys[sample, :, counted], layer.values[sample, :, counted]


def expect_entries(found, expected, tolerance):
    """Two heads' keys and values [K, d] each, in whatever order."""
    (keys, values), (expected_keys, expected_values) = found, expected
    assert keys.shape == expected_keys.shape
    match = torch.cdist(keys.double(), expected_keys.double()).argmin(1)
    assert sorted(match.tolist()) == list(range(len(keys))), "each entry once"
    torch.testing.assert_close(keys.double(), expected_keys.double()[match], rtol=0, atol=tolerance)
    torch.testing.assert_close(values.double(), expected_values.double()[match], rtol=0, atol=tolerance)


def expect_cache(name, values, cache, pruning, layer, kept, merge=False):
    """The cache of a block holds what each head keeps [B, H, T], and `Pruning` says so."""
    dense = oracle.dense_cache(oracle.model(name), values).layers[layer]
    for sample in range(len(kept)):
        keys, vals = entries(cache.layers[layer], sample)
        for head, stays in enumerate(kept[sample]):
            whole = dense.keys[sample, head], dense.values[sample, head]
            if merge:
                expected = oracle.averaged(*whole, stays, oracle.valid(values)[sample] & ~stays)
            else:
                expected = tuple(x[stays] for x in whole)
            expect_entries((keys[head], vals[head]), expected, 2e-6 if merge else 0)
    assert torch.equal(pruning.kept[layer], kept.any(1))


@layouts
@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_look_m(name, merge, n, side):
    values = oracle.prompts(name, n, side)
    cache, pruning = prefill(name, vp.LookM(keep=0.4, merge=merge, skip=1), values)
    dense = oracle.model(name, "eager")
    count = oracle.share(0.4, int(oracle.visual(values)[0].sum()))
    alike = []
    for layer in range(1, 4):
        kept = oracle.by_cache(dense, values, layer, "all", [count] * n)
        alike.append(torch.equal(kept[:, 0], kept[:, 1]))
        expect_cache(name, values, cache, pruning, layer, kept, merge)
    assert not all(alike), "heads keep their own"
    assert sorted(pruning.kept) == [1, 2, 3]


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
def test_look_m_with_different_numbers_of_images(side, merge):
    values = oracle.llava_prompts([(1, 3), (2, 5), (0, 4), (1, 9)], side)
    cache, pruning = prefill("llava", vp.LookM(keep=0.4, merge=merge), values)
    counts = [oracle.share(0.4, images * 9) for images in (1, 2, 0, 1)]
    for layer in range(4):
        kept = oracle.by_cache(oracle.model("llava", "eager"), values, layer, "all", counts)
        expect_cache("llava", values, cache, pruning, layer, kept, merge)


@pytest.mark.parametrize("token_types", ["prompt", "none", "suffix"])
def test_look_m_where_a_prompt_may_see_itself_in_both_directions(token_types):
    values = oracle.prompts("paligemma", 4, labels=token_types == "suffix")
    values.pop("labels", None)
    if token_types == "none":
        values.pop("token_type_ids")
    cache, pruning = prefill("paligemma", vp.LookM(keep=0.4, merge=False), values)
    for layer in range(4):
        kept = oracle.by_cache(oracle.model("paligemma", "eager"), values, layer, "all", [4] * 4)
        expect_cache("paligemma", values, cache, pruning, layer, kept)


@layouts
@pytest.mark.parametrize("name", ["llava", "smolvlm"])
def test_plphp(name, n, side):
    values = oracle.prompts(name, n, side)
    dense = oracle.model(name, "eager")
    seen = oracle.maps(dense, values)
    shares = []
    for layer in (1, 2, 3):
        rows = [seen[layer][sample, :, row].mean(0) for sample, row in enumerate(oracle.asking(values))]
        shares.append([float(row[oracle.visual(values)[sample]].sum()) for sample, row in enumerate(rows)])
    looked = sorted(x for of_layer in shares for x in of_layer)
    high, low = (looked[-1] + looked[-2]) / 2, (looked[0] + looked[1]) / 2
    cache, pruning = prefill(name, vp.PLPHP(keep=0.5, spread=0.6, high=high, low=low, skip=1), values)
    widths = set()
    for layer, of_layer in zip((1, 2, 3), shares, strict=True):
        keep = [0.8 if x >= high else 0.2 if x < low else 0.5 for x in of_layer]
        widths |= set(keep)
        kept = oracle.by_cache(dense, values, layer, "last", [oracle.share(k, 9) for k in keep])
        expect_cache(name, values, cache, pruning, layer, kept)
    assert widths == {0.2, 0.5, 0.8}
    assert sorted(pruning.kept) == [1, 2, 3]


def test_plphp_with_different_numbers_of_images():
    values = oracle.llava_prompts([(1, 3), (2, 5), (0, 4), (1, 9)], "left")
    cache, pruning = prefill("llava", vp.PLPHP(keep=0.4, spread=0, skip=0), values)
    counts = [oracle.share(0.4, images * 9) for images in (1, 2, 0, 1)]
    for layer in range(4):
        kept = oracle.by_cache(oracle.model("llava", "eager"), values, layer, "last", counts)
        expect_cache("llava", values, cache, pruning, layer, kept)
