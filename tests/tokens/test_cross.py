"""BLIP: what the cross-attention of the question reads, against masks on a dense eager model."""

import pytest
import torch
from models import tiny
from tokens import oracle

import vlprune_ext as vp
from vlprune_ext.anatomy import describe


def blip(method, values):
    """What the question becomes, [B, T, D]; and what was kept."""
    return _question(oracle.model("blip_vqa"), values, method)


def _question(model, values, method=None, hidden=None):
    """``hidden``: block -> [B, P] bool, keys that its cross-attention does not see."""
    handles, maps = [], []
    for layer, block in enumerate(model.text_encoder.encoder.layer):
        attention = block.crossattention.self
        handles.append(attention.register_forward_hook(lambda _, __, output: maps.append(output[1])))
        if hidden and layer in hidden:

            def hide(_, args, kwargs, gone=hidden[layer]):
                mask = torch.zeros(gone.shape).masked_fill(gone, torch.finfo(torch.float32).min)
                return args, {**kwargs, "encoder_attention_mask": mask[:, None, None]}

            handles.append(attention.register_forward_pre_hook(hide, with_kwargs=True))
    out = []
    handles.append(model.text_encoder.register_forward_hook(lambda _, __, output: out.append(output[0])))
    try:
        with torch.no_grad():
            if method is None:
                model(**values)
                return out[0], maps
            with vp.prune_tokens(model, method) as pruning:
                model(**values)
            return out[0], pruning
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(
    ("method", "stages"),
    [(vp.FastV(layer=2, keep=0.4), {2: 0.4}), (vp.PyramidDrop(keep=0.5, layers=(1, 2)), {1: 0.5, 2: 0.25})],
    ids=lambda x: getattr(x, "name", ""),
)
def test_cross_attention_reads_what_the_question_looks_at(method, stages):
    values = tiny.inputs("blip_vqa", oracle.model("blip_vqa"), 12)
    assert (values["attention_mask"] == 0).any()
    found, pruning = blip(method, values)
    hidden, left = {}, torch.ones(12, 10, dtype=torch.bool)
    for layer, keep in stages.items():
        _, maps = _question(oracle.model("blip_vqa", "eager"), values, hidden=hidden)
        given = (maps[layer - 1].mean(1) * values["attention_mask"][..., None]).sum(1)
        kept = torch.zeros_like(left)
        kept[:, 0] = True
        among = left & ~kept
        for sample in range(12):
            kept[sample] |= oracle.top(given[sample], among[sample], oracle.share(keep, 9))
        assert torch.equal(pruning.kept[layer], kept)
        hidden |= dict.fromkeys(range(layer, 3), ~kept)
        left = kept
    assert pruning.kept.keys() == stages.keys()
    expected, _ = _question(oracle.model("blip_vqa", "eager"), values, hidden=hidden)
    seen = values["attention_mask"].bool()
    oracle.close(found[seen], expected[seen])


@pytest.mark.parametrize(
    "method",
    [vp.RandomTokens(keep=0.4), vp.RandomTokens(keep=0.4, layer=1), vp.DivPrune(keep=0.4)],
    ids=lambda m: m.name,
)
def test_cross_attention_drops_as_masking_does(method):
    values = tiny.inputs("blip_vqa", oracle.model("blip_vqa"), 3)
    found, pruning = blip(method, values)
    (first, kept), *rest = pruning.kept.items()
    assert not rest
    assert kept[:, 0].all(), "the class token stays"
    assert (kept.sum(1) == 1 + 4).all()
    hidden = dict.fromkeys(range(first, 3), ~kept)
    expected, _ = _question(oracle.model("blip_vqa", "eager"), values, hidden=hidden)
    seen = values["attention_mask"].bool()
    oracle.close(found[seen], expected[seen])


@pytest.mark.parametrize(
    "method",
    [vp.FastV(layer=1, keep=0.4), vp.RandomTokens(keep=0.4), vp.VisionZip(keep=0.5), vp.ToMe(keep=0.5)],
    ids=lambda m: m.name,
)
def test_a_question_does_not_depend_on_its_batch(method):
    values = tiny.inputs("blip_vqa", oracle.model("blip_vqa"), 3)
    found, pruning = blip(method, values)
    for sample in range(3):
        seen = values["attention_mask"][sample].bool()
        single = {name: value[sample : sample + 1] for name, value in values.items()}
        single |= {name: single[name][:, seen] for name in ("input_ids", "attention_mask")}
        alone, of_single = blip(method, single)
        oracle.close(found[sample][seen], alone[0])
        assert all(torch.equal(kept[sample], of_single.kept[layer][0]) for layer, kept in pruning.kept.items())


def test_vision_zip_in_front_of_cross_attention():
    values = tiny.inputs("blip_vqa", oracle.model("blip_vqa"), 2)
    _, pruning = blip(vp.VisionZip(keep=0.5, contextual=0.0), values)
    maps = []
    block = describe(oracle.model("blip_vqa")).tower("vision").container[-1]
    handle = block.self_attn.register_forward_hook(lambda _, __, output: maps.append(output[1]))
    with torch.no_grad():
        oracle.model("blip_vqa")(**values)
    handle.remove()
    given = maps[0][:, :, 0].mean(1)
    everyone = torch.arange(10) > 0
    for sample in range(2):
        assert torch.equal(pruning.kept[0][sample], oracle.top(given[sample], everyone, 4) | ~everyone)


@pytest.mark.parametrize(
    "method", [vp.FastV(layer=1, keep=0.4), vp.VisionZip(keep=0.5), vp.ToMe(keep=0.5)], ids=lambda m: m.name
)
def test_blip_generates(method):
    model, values = oracle.model("blip_vqa"), tiny.inputs("blip_vqa", oracle.model("blip_vqa"), 3)
    given = {name: values[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with vp.prune_tokens(model, method):
        beams = model.generate(**given, max_new_tokens=4, num_beams=3, use_cache=True)
        again = model.generate(**given, max_new_tokens=4, num_beams=3, use_cache=False)
    assert torch.equal(beams, again)
