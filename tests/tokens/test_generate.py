"""Generation with a cache from which tokens are missing, against recomputing everything with the same tokens masked."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from models import tiny
from tokens import oracle

import vlprune_ext as vp
from vlprune_ext.tokens import DropTokens
from vlprune_ext.tokens.cache import PrunedLayer

NEW = 5
# Without an end, so that all rows grow to the same length, and without placeholders of images.
GREEDY = {
    "max_new_tokens": NEW,
    "do_sample": False,
    "suppress_tokens": [tiny.EOS, tiny.IMAGE],
    "pad_token_id": tiny.PAD,
}
FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "paligemma", "internvl", "smolvlm")
DROPPING = [
    vp.FastV(layer=2, keep=0.4),
    vp.FastV(layer=1, keep=0.4, positions="renumber"),
    vp.PyramidDrop(keep=0.6),
    vp.RandomTokens(keep=0.4),
]
EVICTING = [
    vp.PLPHP(keep=0.5, spread=0.6, high=0.5, low=0.4, skip=1),
    vp.LookM(keep=0.4, merge=False),
    vp.LookM(keep=0.4),
]


def label(method):
    return f"{method.name}{'-renumber' if getattr(method, 'positions', '') == 'renumber' else ''}" + (
        "-merge" if getattr(method, "merge", False) else ""
    )


def generate(model, method, values, **kwargs):
    options = GREEDY | kwargs
    with vp.prune_tokens(model, method) as pruning:
        out = model.generate(**values, **options, output_logits=True, return_dict_in_generate=True)
    return out, pruning


def recomputed(name, values, sequences, gone, since=0, renumber=False):
    """[B, NEW, V]: what a dense model without a cache says of the same sequences."""
    dense, whole = oracle.model(name, "eager"), oracle.grown(values, sequences)
    seen, positions = whole["attention_mask"].bool(), None
    if renumber:
        counted = {layer: seen & ~F.pad(lost, (0, NEW)) for layer, lost in gone.items()}
        positions = {layer: (stays.cumsum(1) - 1).clamp(min=0) for layer, stays in counted.items()}
    with torch.no_grad(), oracle.blinded(dense, gone, since=since, positions=positions):
        return dense(**whole).logits[:, -NEW - 1 : -1]


@pytest.mark.parametrize("method", DROPPING, ids=label)
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_with_dropped_tokens(name, method):
    if name == "qwen2_5_vl" and method.positions == "renumber":
        return
    values = oracle.prompts(name, 4, "left")
    out, pruning = generate(oracle.model(name), method, values)
    gone = oracle.gone_behind(values, pruning.kept)
    assert gone
    expected = recomputed(name, values, out.sequences, gone, renumber=method.positions == "renumber")
    oracle.close(torch.stack(out.logits, 1), expected)


@pytest.mark.parametrize("method", EVICTING, ids=label)
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_with_an_evicted_cache(name, method):
    """Each head of each block goes on without the entries that it lost, and with the means that took their place."""
    values = oracle.prompts(name, 4, "left")
    out, _ = generate(oracle.model(name), method, values)
    tokens = values["input_ids"].shape[1]
    dense = oracle.model(name, "eager")
    cache = oracle.dense_cache(dense, values)
    gone = {}
    for layer in range(method.skip, 4):
        count = [oracle.share(method.keep, int(row.sum())) for row in oracle.visual(values)]
        rows = "all"
        if isinstance(method, vp.PLPHP):
            rows, count = "last", plphp_counts(dense, values, method, layer)
        kept = oracle.by_cache(dense, values, layer, rows, count)
        gone[layer] = oracle.valid(values)[:, None] & ~kept
        if getattr(method, "merge", False):
            held = cache.layers[layer]
            for sample, heads in enumerate(kept):
                for head, stays in enumerate(heads):
                    entries = held.keys[sample, head], held.values[sample, head]
                    keys, vals = oracle.averaged(*entries, stays, gone[layer][sample, head])
                    held.keys[sample, head, stays], held.values[sample, head, stays] = keys.float(), vals.float()
    whole = oracle.grown(values, out.sequences)
    if getattr(method, "merge", False):
        expected = decoded(name, dense, values, whole, cache, gone)
    else:
        expected = recomputed(name, values, out.sequences, gone, since=tokens)
    oracle.close(torch.stack(out.logits, 1)[:, 1:], expected[:, 1:])
    with torch.no_grad():
        oracle.close(out.logits[0], dense(**values).logits[:, -1])


def plphp_counts(dense, values, method, layer):
    seen = oracle.maps(dense, values)[layer]
    counts = []
    for sample, row in enumerate(oracle.asking(values)):
        visual = oracle.visual(values)[sample]
        looked = float(seen[sample, :, row][:, visual].sum(1).mean())
        keep = 0.8 if looked >= method.high else 0.2 if looked < method.low else 0.5
        counts.append(oracle.share(keep, int(visual.sum())))
    return counts


def decoded(name, dense, values, whole, cache, gone):
    """[B, NEW, V] of a dense model that goes on from a full cache, step by step."""
    tokens = values["input_ids"].shape[1]
    logits = [torch.zeros(len(values["input_ids"]), tiny.VOCAB)]
    with torch.no_grad(), oracle.blinded(dense, gone):
        for place in range(tokens, tokens + NEW - 1):
            step = {"input_ids": whole["input_ids"][:, place : place + 1], "past_key_values": cache}
            step["attention_mask"] = whole["attention_mask"][:, : place + 1]
            if "qwen" in name:
                grid = values["image_grid_thw"]
                types = whole["mm_token_type_ids"][:, : place + 1]
                ids, mask = whole["input_ids"][:, : place + 1], step["attention_mask"]
                step["position_ids"] = dense.model.get_rope_index(
                    ids, mm_token_type_ids=types, image_grid_thw=grid, attention_mask=mask
                )[0][..., -1:]
            logits.append(dense(**step).logits[:, -1])
    return torch.stack(logits, 1)


@pytest.mark.parametrize("words", [(3, 5, 1, 9), (12, 1, 12, 12)], ids=["padded", "as long"])
@pytest.mark.parametrize("method", [*DROPPING, *EVICTING, vp.VisionZip(keep=0.5), vp.ToMe(keep=0.5)], ids=label)
def test_a_batch_generates_what_its_samples_do(method, words):
    images = (1, 2, 1, 1)
    values = oracle.llava_prompts(list(zip(images, words, strict=True)), "left")
    out, _ = generate(oracle.model("llava"), method, values)
    for sample, count in enumerate(images):
        seen, first = oracle.valid(values)[sample], sum(images[:sample])
        single = {name: values[name][sample : sample + 1, seen] for name in ("input_ids", "attention_mask")}
        single["pixel_values"] = values["pixel_values"][first : first + count]
        alone, _ = generate(oracle.model("llava"), method, single)
        assert torch.equal(alone.sequences[0, -NEW:], out.sequences[sample, -NEW:])
        for step in range(NEW):
            oracle.close(out.logits[step][sample], alone.logits[step][0])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("method", [DROPPING[0], EVICTING[2]], ids=label)
def test_a_sample_without_image_in_a_batch(method, implementation):
    values = oracle.llava_prompts([(1, 3), (0, 7)], "left")
    out, _ = generate(oracle.model("llava", implementation), method, values)
    text = {name: values[name][1:, oracle.valid(values)[1]] for name in ("input_ids", "attention_mask")}
    alone = oracle.model("llava").generate(**text, **GREEDY, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(alone.sequences[0, -NEW:], out.sequences[1, -NEW:])
    oracle.close(torch.stack(out.logits)[:, 1], torch.stack(alone.logits)[:, 0])


@dataclass(frozen=True)
class EveryOther(DropTokens):
    """Visual tokens at even places stay, which new tokens do not change."""

    def stages(self, blocks):
        return {1: 0.5}

    def score(self, view):
        return (torch.arange(view.visual.shape[1]) % 2 == 0).float().expand(view.visual.shape)


FIXED = [EveryOther(), EveryOther(positions="renumber"), vp.VisionZip(keep=0.5), vp.ToMe(keep=0.5)]


@pytest.mark.parametrize("method", FIXED, ids=label)
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True}], ids=["beams", "sampling"])
def test_the_cache_changes_nothing(method, options):
    """Where new tokens do not change the choice: with and without a cache the same. Sampling goes by a seed."""
    values = oracle.llava_prompts([(1, 3), (0, 5), (1, 9)], "left")
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        out, _ = generate(oracle.model("llava"), method, values, use_cache=use_cache, **options)
        found.append(out.sequences)
    assert torch.equal(*found)


@pytest.mark.parametrize("method", [*DROPPING, *EVICTING, vp.VisionZip(keep=0.5), vp.ToMe(keep=0.5)], ids=label)
def test_beams_are_scored_as_their_sequences(method):
    """A beam's score is the mean log-probability of its tokens given the prompt, whatever was reordered on the way."""
    values = oracle.llava_prompts([(1, 3), (1, 5), (1, 9)], "left")
    model = oracle.model("llava")
    out, _ = generate(model, method, values, num_beams=3, num_return_sequences=3, output_scores=True)
    for beam, sequence in enumerate(out.sequences):
        given = oracle.alone(values, beam // 3)
        tokens, total, cache, mask = sequence[-NEW:], 0.0, None, given["attention_mask"]
        with vp.prune_tokens(model, method), torch.no_grad():
            for token in tokens:
                output = model(**given, past_key_values=cache, use_cache=True)
                total += float(output.logits[0, -1].log_softmax(0)[token])
                cache, mask = output.past_key_values, F.pad(mask, (0, 1), value=1)
                given = {"input_ids": token[None, None], "attention_mask": mask}
        assert float(out.sequences_scores[beam]) == pytest.approx(total / NEW, abs=1e-5)


@pytest.mark.parametrize("method", [*DROPPING, *EVICTING], ids=label)
def test_the_cache_is_smaller_and_counts_as_before(method):
    values = oracle.llava_prompts([(1, 3), (1, 5)], "left")
    tokens = values["input_ids"].shape[1]
    out, pruning = generate(oracle.model("llava"), method, values)
    cache = out.past_key_values
    first = min(pruning.kept)
    assert cache.get_seq_length() == tokens + NEW - 1
    for layer, held in enumerate(cache.layers):
        assert held.get_seq_length() == tokens + NEW - 1
        entries = held.keys.shape[2] - (NEW - 1)
        assert held.values.shape == held.keys.shape
        if layer < first:
            assert entries == tokens
            continue
        assert isinstance(held, PrunedLayer)
        assert entries < tokens
        if layer in pruning.kept and not isinstance(method, (vp.PLPHP, vp.LookM)):
            assert entries == pruning.kept[layer].sum(1).max()
        if isinstance(method, vp.LookM):
            assert entries == tokens - 9 + 4


@pytest.mark.parametrize("method", [DROPPING[0], EVICTING[1]], ids=label)
def test_a_cache_whose_samples_move(method):
    """As `generate` moves them: taken in another order, repeated, left out."""
    model, values = oracle.model("llava"), oracle.llava_prompts([(1, 12), (2, 1), (0, 23)], "left")
    moves = {
        "reorder_cache": (torch.tensor([2, 0, 1]), [2, 0, 1]),
        "batch_repeat_interleave": (2, [0, 0, 1, 1, 2, 2]),
        "batch_select_indices": (torch.tensor([1, 2]), [1, 2]),
    }
    with vp.prune_tokens(model, method), torch.no_grad():
        after = model(
            input_ids=torch.tensor([[5]] * 3), past_key_values=model(**values, use_cache=True).past_key_values
        )
        for name, (argument, order) in moves.items():
            cache = model(**values, use_cache=True).past_key_values
            getattr(cache, name)(argument)
            moved = model(input_ids=torch.tensor([[5]] * len(order)), past_key_values=cache)
            oracle.close(moved.logits, after.logits[order])


def test_a_cache_that_is_reset_is_like_new():
    model, values = oracle.model("llava"), oracle.llava_prompts([(1, 3), (2, 5)], "left")
    with torch.no_grad():
        dense = model(**values).logits
        for method in (vp.RandomTokens(0.5), EVICTING[1]):  # in every block: what others reset is their business
            with vp.prune_tokens(model, method):
                cache = model(**values, use_cache=True).past_key_values
            assert all(isinstance(layer, PrunedLayer) for layer in cache.layers)
            cache.reset()
            assert cache.get_seq_length() == 0
            assert torch.equal(model(**values, past_key_values=cache).logits, dense)
            assert {layer.get_seq_length() for layer in cache.layers} == {values["input_ids"].shape[1]}


def test_a_second_turn_of_text_goes_on_from_the_pruned_cache():
    """Several new tokens at once, behind what was generated."""
    values = oracle.llava_prompts([(1, 3), (2, 5)], "left")
    more = torch.randint(3, tiny.BOS, (2, 4))
    for method in (DROPPING[0], DROPPING[1], EVICTING[1]):
        model = oracle.model("llava")
        with vp.prune_tokens(model, method), torch.no_grad():
            cache = model(**values, use_cache=True).past_key_values
            mask = F.pad(values["attention_mask"], (0, 4), value=1)
            together = model(input_ids=more, attention_mask=mask, past_key_values=cache).logits
            cache = model(**values, use_cache=True).past_key_values
            for place in range(4):
                seen = mask[:, : values["input_ids"].shape[1] + place + 1]
                step = more[:, place : place + 1]
                single = model(input_ids=step, attention_mask=seen, past_key_values=cache).logits
                oracle.close(together[:, place], single[:, 0])
