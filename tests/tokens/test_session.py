"""What `prune_tokens` leaves behind, which is nothing, and whom it lets in."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest
import torch
import transformers
from models import tiny
from tokens import oracle
from torch import nn

import vlprune_ext as vp
from vlprune_ext.tokens import DropTokens

EVERY = {
    "llava": [
        vp.FastV(keep=0.4),
        vp.PyramidDrop(),
        vp.RandomTokens(keep=0.4, positions="renumber"),
        vp.DivPrune(keep=0.4),
        vp.VisionZip(),
        vp.PLPHP(),
        vp.LookM(),
        vp.ToMe(),
    ],
    "blip_vqa": [vp.FastV(keep=0.4), vp.VisionZip(), vp.ToMe()],
    "vit": [vp.ToMe()],
}
CASES = [(name, method) for name, methods in EVERY.items() for method in methods]
cases = pytest.mark.parametrize(("name", "method"), CASES, ids=[f"{name}-{method.name}" for name, method in CASES])


def snapshot(model):
    """All that a session may touch."""
    found = {}
    for path, module in model.named_modules():
        config = getattr(module, "config", None)
        found[path] = (
            id(config),
            getattr(config, "_attn_implementation", None),
            sorted(vars(config)) if config is not None else None,
            "forward" in vars(module),
            module.training,
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._forward_hooks_with_kwargs),
        )
    flags = {path: parameter.requires_grad for path, parameter in model.named_parameters()}
    return found, flags, tiny.digest(model)


class Halt(Exception):
    pass


@cases
def test_everything_is_as_before(name, method):
    model = tiny.build(name)
    model.train()
    values = tiny.inputs(name, model, 2)
    dense = tiny.outputs(name, model, values)  # transformers adds hooks of its own in the first forward
    before = snapshot(model)
    with vp.prune_tokens(model, method):
        assert not torch.equal(tiny.outputs(name, model, values)[: len(dense)], dense) or method.name in (
            "PLPHP",
            "LookM",
        )
        assert snapshot(model) != before
    assert snapshot(model) == before
    assert torch.equal(tiny.outputs(name, model, values), dense)


@cases
def test_everything_is_as_before_after_an_exception(name, method):
    """In the middle of a forward, from the last block of the tower that reads or merges."""
    model = tiny.build(name)
    values = tiny.inputs(name, model, 2)
    dense = tiny.outputs(name, model, values)  # transformers adds hooks of its own in the first forward
    before = snapshot(model)
    tower = {"llava": "text", "blip_vqa": "text", "vit": "vision"}[name]
    block = vp.describe(model).tower(tower).container[2]

    def halt(*_):
        raise Halt

    def run():
        with vp.prune_tokens(model, method):
            handle = block.register_forward_pre_hook(halt)
            try:
                model(**values)
            finally:
                handle.remove()

    with pytest.raises(Halt):
        run()
    assert snapshot(model) == before
    assert torch.equal(tiny.outputs(name, model, values), dense)
    with vp.prune_tokens(model, method):
        first = tiny.outputs(name, model, values)
        handle = block.register_forward_pre_hook(halt)
        with pytest.raises(Halt):
            model(**values)
        handle.remove()
        assert torch.equal(tiny.outputs(name, model, values), first), "the next forward begins anew"


def test_one_session_for_many_batches():
    model, method = oracle.model("llava"), vp.PyramidDrop()
    batches = [
        oracle.llava_prompts(samples, side) for samples in ([(1, 3)], [(2, 5), (0, 4)]) for side in ("left", "right")
    ]
    alone = []
    for values in batches:
        with vp.prune_tokens(model, method), torch.no_grad():
            alone.append(model(**values).logits)
    with vp.prune_tokens(model, method), torch.no_grad():
        for values, logits in [*zip(batches, alone, strict=True)] * 2:
            assert torch.equal(model(**values).logits, logits)


def test_a_method_that_does_not_fit_leaves_no_trace():
    model = tiny.build("llava")
    before = snapshot(model)
    for method in (vp.FastV(layer=9), vp.FastV(positions="bogus"), vp.VisionZip(positions="bogus")):
        with pytest.raises(ValueError, match=r"layer|positions"), vp.prune_tokens(model, method):
            pass
        assert snapshot(model) == before
    with vp.prune_tokens(model, vp.FastV()):
        pass


# --- one at a time ---------------------------------------------------------------------------------------------------


def test_no_session_within_another():
    values = oracle.prompts("llava")
    model = tiny.build("llava")
    outer = nn.Module()
    outer.inner = model
    vision = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**tiny._VISION))
    model.model.vision_tower = vision
    method = vp.FastV(keep=0.4)
    with vp.prune_tokens(model, method) as pruning, torch.no_grad():
        first = model(**values).logits
        for other in (model, vision):
            with pytest.raises(ValueError, match="pruned already"), vp.prune_tokens(other, vp.ToMe()):
                pass
        assert torch.equal(model(**values).logits, first)
        assert pruning.kept[2].sum() < oracle.valid(values).sum()
    with vp.prune_tokens(vision, vp.ToMe()):
        merged = vision(values["pixel_values"]).last_hidden_state
        with pytest.raises(ValueError, match="pruned already"), vp.prune_tokens(model, method):
            pass
        assert torch.equal(vision(values["pixel_values"]).last_hidden_state, merged)
        assert merged.shape[1] < 10
    with vp.prune_tokens(model, method), torch.no_grad():
        assert torch.equal(model(**values).logits, first)


def test_two_models_in_two_threads():
    methods = {"llava": vp.FastV(keep=0.4), "internvl": vp.LookM(keep=0.4)}
    found, alone = {}, {}
    barrier = threading.Barrier(2)

    def run(name, results, together):
        model, values = oracle.model(name), oracle.prompts(name, 2, "left")
        results[name] = []
        for _ in range(4):
            if together:
                barrier.wait(60)
            with vp.prune_tokens(model, methods[name]):
                out = model.generate(
                    **values, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
                )
            results[name].append(torch.stack(out.logits))

    for name in methods:
        run(name, alone, False)
    threads = [threading.Thread(target=run, args=(name, found, True)) for name in methods]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for name, logits in alone.items():
        assert all(torch.equal(one, other) for one, other in zip(found[name], logits, strict=True))


@dataclass(frozen=True)
class Longest(DropTokens):
    """Keep the visual tokens whose states are longest."""

    keep: float = 0.5

    def stages(self, blocks):
        return {blocks // 2: self.keep}

    def score(self, view):
        return view.states.norm(dim=-1)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_method_of_ones_own(name):
    values = oracle.prompts(name, 4, "left")
    with vp.prune_tokens(oracle.model(name), Longest()) as pruning, torch.no_grad():
        logits = oracle.model(name)(**values).logits
        lengths = oracle.model(name, "eager")(**values, output_hidden_states=True).hidden_states[2].norm(dim=-1)
    expected = oracle.valid(values) & ~oracle.visual(values)
    for sample, visual in enumerate(oracle.visual(values)):
        expected[sample] |= oracle.top(lengths[sample], visual, oracle.share(0.5, int(visual.sum())))
    assert torch.equal(pruning.kept[2], expected)
    masked = oracle.logits_with(oracle.model(name, "eager"), values, pruning.kept)
    torch.testing.assert_close(logits[expected], masked[expected], rtol=1e-5, atol=1e-5 * float(masked.abs().max()))


def test_what_was_lost():
    values = oracle.llava_prompts([(1, 3), (2, 5)])
    model = oracle.model("llava")
    with vp.prune_tokens(model, vp.FastV(layer=1, keep=0.4)) as pruning, torch.no_grad():
        with pytest.raises(ValueError, match="nothing was pruned yet"):
            pruning.share()
        model(**values)
        assert pruning.share() == pytest.approx((27 + 3 * (4 + 7)) / (4 * 27))
        assert [int(pruning.left(sample).sum()) for sample in (0, 1)] == [4, 7]
        assert [len(pruning.left(sample)) for sample in (0, 1)] == [9, 18]
    with vp.prune_tokens(model, vp.LookM(keep=0.4, skip=2)) as pruning, torch.no_grad():
        model(**values, use_cache=True)
        assert pruning.share() == pytest.approx((2 * 27 + 2 * (4 + 7)) / (4 * 27))
