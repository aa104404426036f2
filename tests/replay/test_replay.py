"""Replay against the naive way: change the model, run all of it, for every module."""

from __future__ import annotations

import random
from contextlib import contextmanager

import pytest
import torch
from models import tiny

from vlprune_ext import zoo
from vlprune_ext.anatomy import describe
from vlprune_ext.anatomy.patch import Patches
from vlprune_ext.data import load_data
from vlprune_ext.objectives import Contrastive, LMLoss
from vlprune_ext.plan import Plan
from vlprune_ext.replay import DropHead, DropLayer, DropNeurons, Replay, Within
from vlprune_ext.units.masking import masked

REPLAYED = [name for name in tiny.ALL if name != "vit"]
WHOLE = ("clip", "siglip", "llava")  # every intervention is looked at; of other families a third, in larger stacks
ROWS = 7  # of calibration data, in batches of 3, 3 and 1


def passing_by(forward):
    """The stream that enters a block leaves it; whatever else the block hands on (T5: position biases) stays."""

    def call(hidden_states, *args, **kwargs):
        output = forward(hidden_states, *args, **kwargs)
        return hidden_states if isinstance(output, torch.Tensor) else (hidden_states, *output[1:])

    return call


@contextmanager
def dropped(anatomy, intervention):
    """The model with one intervention done to it, by hooks and without any of replay's shortcuts."""
    block = anatomy.tower(intervention.tower).blocks[intervention.layer]
    with Patches() as patches:
        if intervention.kind == "layer":
            patches.forward(block.module, passing_by(block.module.forward))
        else:
            site = block.sites[intervention.kind]
            columns = torch.tensor([u * site.width + i for u in intervention.units for i in range(site.width)])
            patches.pre_hook(site.out, lambda _, args: (args[0].index_fill(-1, columns.to(args[0].device), 0),))
        yield


def naive(anatomy, objective, tower, intervention, batches):
    """What the model says; batches need not be replay's."""
    with dropped(anatomy, intervention), torch.no_grad():
        return torch.cat([objective.outputs(anatomy, tower, batch) for batch in batches])


def everything(anatomy, tower, *, neurons=16, cross=True):
    """Every head, group of neurons and layer, and some sets of units that lie apart."""
    found = []
    for layer, block in enumerate(anatomy.tower(tower).blocks):
        for kind, site in block.sites.items():
            if kind == "neurons":
                parts = torch.arange(site.units).split(neurons)
                found += [DropNeurons(tower, layer, tuple(part.tolist())) for part in parts]
                found.append(DropNeurons(tower, layer, (site.units - 1, 0, 5)))
            elif kind == "head" or cross:
                is_cross = kind == "cross_head"
                found += [DropHead(tower, layer, (i,), cross=is_cross) for i in range(site.units)]
                if site.units > 2:
                    found.append(DropHead(tower, layer, (0, 2), cross=is_cross))
        found.append(DropLayer(tower, layer))
    return found


def collect(replay, interventions):
    """(outputs of each intervention, dense outputs)"""
    outputs, dense = [None] * len(interventions), None
    for positions, out in replay.walk(interventions):
        if positions is None:
            dense = out
        else:
            for i, rows in zip(positions, out, strict=True):
                outputs[i] = rows
    return outputs, dense


def engine(anatomy, objective, tower, batches, **kwargs):
    return Replay(anatomy, tower, batches, lambda _, inputs: objective.outputs(anatomy, tower, inputs), **kwargs)


def objective_for(name):
    return Contrastive() if name in tiny.DUAL else LMLoss()


def setup(name, device, rows=ROWS, batch_size=3):
    model = tiny.build(name).to(device)
    return describe(model), objective_for(name), tiny.retrieval_data(name, model, rows), batch_size


@pytest.mark.parametrize(
    ("name", "stacked_rows"),
    [*((name, 8 if name in WHOLE else 24) for name in REPLAYED), ("clip", None), ("clip", 1), ("llava", 64)],
)
def test_equals_naive(name, stacked_rows, device):
    anatomy, objective, data, batch_size = setup(name, device)
    for tower in objective.towers(anatomy):
        batches = objective.batches(anatomy, tower, data, batch_size)
        interventions = everything(anatomy, tower, cross=objective.sees_cross_attention)
        if name not in WHOLE:
            some = random.Random(0).sample(range(len(interventions)), len(interventions) // 3)
            interventions = [one for i, one in enumerate(interventions) if i in some or one.kind == "layer"]
        outputs, dense = collect(engine(anatomy, objective, tower, batches, stacked_rows=stacked_rows), interventions)
        whole = objective.batches(anatomy, tower, data, ROWS)
        plain = torch.cat([objective.outputs(anatomy, tower, batch) for batch in whole])
        torch.testing.assert_close(dense, plain, rtol=0, atol=1e-5)
        changed = 0
        for intervention, out in zip(interventions, outputs, strict=True):
            expected = naive(anatomy, objective, tower, intervention, whole)
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5, msg=lambda m, i=intervention: f"{i}: {m}")
            changed += (expected - plain).abs().max().item() > 1e-3
        # LLaVA reads the vision tower before its last block, so that nothing in there matters.
        dead = sum(i.layer == len(anatomy.tower(tower)) - 1 for i in interventions)
        unread = dead if name.startswith("llava") and tower == "vision" else 0
        assert changed == len(interventions) - unread


@pytest.mark.parametrize("name", ["clip", "siglip", "llava"])
def test_equal_values_and_ranks(name, device):
    anatomy, objective, data, batch_size = setup(name, device, rows=24)
    for tower in objective.towers(anatomy):
        batches = objective.batches(anatomy, tower, data, batch_size)
        interventions = everything(anatomy, tower)
        other = objective.other(anatomy, tower, data, batch_size)

        def value(out, tower=tower, other=other):
            return objective.values(anatomy, tower, out, other, data).double().mean().item()

        outputs, _ = collect(engine(anatomy, objective, tower, batches), interventions)
        replayed = torch.tensor([value(out) for out in outputs])
        whole = objective.batches(anatomy, tower, data, len(data))
        expected = torch.tensor([value(naive(anatomy, objective, tower, i, whole)) for i in interventions])
        torch.testing.assert_close(replayed, expected, rtol=0, atol=1e-5)
        assert_same_order(replayed, expected)


def assert_same_order(a, b, tie=1e-5):
    """Equal ranks, but for modules whose scores are equal up to rounding."""
    order = torch.sort(b, stable=True).indices
    assert (a[order].diff() > -2 * tie).all()


@pytest.mark.parametrize("name", ["clip", "llava", "t5", "blip2_opt"])
def test_block_runs_equal_the_formula(name):
    """What the model's own block code was called for, counted on the class, is what the formula says."""
    anatomy, objective, data, batch_size = setup(name, "cpu")
    for tower in objective.towers(anatomy):
        blocks = anatomy.tower(tower).blocks
        batches = objective.batches(anatomy, tower, data, batch_size)
        interventions = everything(anatomy, tower)
        replay = engine(anatomy, objective, tower, batches, stacked_rows=6)
        counted = 0
        kind = type(blocks[0].module)
        original = kind.forward
        own = {id(block.module) for block in blocks}

        def forward(self, hidden_states, *args, _original=original, _own=own, **kwargs):
            nonlocal counted
            counted += hidden_states.shape[0] if id(self) in _own else 0
            return _original(self, hidden_states, *args, **kwargs)

        kind.forward = forward
        try:
            collect(replay, interventions)
        finally:
            kind.forward = original
        depth = len(blocks) - (name == "llava" and tower == "vision")  # its last one is never read
        variants = sum(max(0, depth - i.layer - (i.kind == "layer")) for i in interventions)
        assert replay.block_runs == counted == ROWS * (depth + variants)
        assert counted < ROWS * depth * (1 + len(interventions))


@pytest.mark.parametrize("name", ["clip", "llava", "blip_vqa"])
def test_on_a_masked_model(name, device):
    """With a plan half carried out, scores are those of the model without what is gone."""
    anatomy, objective, data, batch_size = setup(name, device)
    plan = Plan(anatomy.shape())
    for tower in anatomy.towers:
        plan.add(tower, "head", 0, [1])
        plan.add(tower, "neurons", 1, [0, 1, 2, 9])
        plan.add(tower, "layer", 2, [])
    for tower in objective.towers(anatomy):
        batches = objective.batches(anatomy, tower, data, batch_size)
        interventions = [i for i in everything(anatomy, tower) if i.layer != 2]
        with masked(anatomy.model, plan):
            replay = engine(anatomy, objective, tower, batches, skip_layers=(2,))
            outputs, _ = collect(replay, interventions)
            for intervention, out in zip(interventions, outputs, strict=True):
                expected = naive(anatomy, objective, tower, intervention, batches)
                torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
        depth = len(anatomy.tower(tower)) - (name == "llava" and tower == "vision")
        runs = sum(sum(j != 2 for j in range(i.layer + (i.kind == "layer"), depth)) for i in interventions)
        assert replay.block_runs == ROWS * (depth - 1 + runs)


FIRST = {"with_kwargs": True, "prepend": True}  # before transformers notes what a vision tower's block says


@contextmanager
def scaled(block, by):
    """What a block adds to its stream counts ``by`` times."""
    with Patches() as patches:
        patches.hook(block, lambda _, args, kwargs, out: scaled_output(args, kwargs, out, by), **FIRST)
        yield


def scaled_output(args, kwargs, out, by):
    stream = args[0] if args else kwargs["hidden_states"]
    return stream + by * (out - stream)


@pytest.mark.parametrize("finish", [True, False])
@pytest.mark.parametrize("name", ["clip", "blip_vqa", "llava"])
def test_within_a_context(name, finish, device):
    """From a block on the model runs within a context: beside other interventions, one run of the rest for each."""
    anatomy, objective, data, batch_size = setup(name, device)
    for tower in objective.towers(anatomy):
        blocks = anatomy.tower(tower).blocks
        batches = objective.batches(anatomy, tower, data, batch_size)

        def context(layer, by, blocks=blocks):
            return lambda: scaled(blocks[layer].module, by)

        # A hook on a later block than the one that the context begins at, too.
        places = [(1, 1, 0.5), (1, 2, 0.0), (0, 1, 0.5), (2, 2, -1.0), (1, 1, 1.0)]
        interventions = [Within(tower, start, context(layer, by)) for start, layer, by in places]
        interventions.append(DropHead(tower, 1, (0,)))
        plain = torch.cat([objective.outputs(anatomy, tower, batch).detach() for batch in batches])
        replay = engine(anatomy, objective, tower, batches)
        before = hooks_and_forwards(anatomy.model)
        found = {}
        for positions, out in replay.walk(interventions, finish=finish):
            found |= {None: out} if positions is None else dict(zip(positions, out, strict=True))
        assert (None in found) == finish
        outputs = [found[i] for i in range(len(interventions))]
        assert hooks_and_forwards(anatomy.model) == before
        for (_, layer, by), out in zip(places, outputs, strict=False):
            with scaled(blocks[layer].module, by), torch.no_grad():
                expected = torch.cat([objective.outputs(anatomy, tower, batch) for batch in batches])
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
            assert ((expected - plain).abs().max() > 1e-3) == (by != 1)
        torch.testing.assert_close(outputs[-1], naive(anatomy, objective, tower, interventions[-1], batches))
        depth = len(blocks) - (name == "llava" and tower == "vision")
        walked = depth if finish else 3
        assert replay.block_runs == ROWS * (walked + sum(depth - start for start, _, _ in places) + depth - 1)


def test_a_context_that_fails():
    """It is left, and so is everything else."""
    anatomy, objective, data, batch_size = setup("clip", "cpu")
    batches = objective.batches(anatomy, "text", data, batch_size)
    before = hooks_and_forwards(anatomy.model)

    def boom(*_):
        raise RuntimeError("boom")

    @contextmanager
    def broken():
        with Patches() as patches:
            patches.hook(anatomy.tower("text").blocks[2].module, boom)
            yield

    with pytest.raises(RuntimeError, match="boom"):
        collect(engine(anatomy, objective, "text", batches), [Within("text", 1, broken)])
    assert hooks_and_forwards(anatomy.model) == before


def test_clip_digits(device):
    """Every head, group of neurons and layer of the shipped model, both towers."""
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(zoo.path("clip-digits")).eval().to(device)
    anatomy, objective = describe(model), Contrastive()
    data = load_data("digits", split="calibration", model=model, limit=24)
    for tower in ("vision", "text"):
        batches = objective.batches(anatomy, tower, data, 24)
        interventions = everything(anatomy, tower, neurons=64)
        other = objective.other(anatomy, tower, data, 24)
        outputs, _ = collect(engine(anatomy, objective, tower, batches), interventions)
        values = []
        for intervention, out in zip(interventions, outputs, strict=True):
            expected = naive(anatomy, objective, tower, intervention, batches)
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
            values.append([objective.values(anatomy, tower, o, other, data).mean().item() for o in (out, expected)])
        replayed, expected = torch.tensor(values).T
        assert_same_order(replayed, expected)


def hooks_and_forwards(model):
    """What patches could leave behind."""
    return [
        (name, m.__dict__.get("forward"), len(m._forward_hooks), len(m._forward_pre_hooks), m.training)
        for name, m in model.named_modules()
    ]


@pytest.mark.parametrize(
    ("name", "fail_at"), [*((name, 5) for name in REPLAYED), ("clip", 1), ("clip", 2), ("llava", 9)]
)
def test_everything_is_unpatched_when_the_forward_raises(name, fail_at):
    anatomy, objective, data, batch_size = setup(name, "cpu")
    tower = objective.towers(anatomy)[-1]
    batches = objective.batches(anatomy, tower, data, batch_size)
    objective.outputs(anatomy, tower, batches[0])  # transformers installs its own hooks on the first call
    anatomy.model.train()
    before = hooks_and_forwards(anatomy.model)
    calls = 0

    def failing(_, inputs):
        nonlocal calls
        calls += 1
        out = objective.outputs(anatomy, tower, inputs)
        if calls >= fail_at:
            raise RuntimeError("from inside")
        return out

    with pytest.raises(RuntimeError, match="from inside"):
        collect(Replay(anatomy, tower, batches, failing), everything(anatomy, tower, cross=name in tiny.GENERATIVE))
    assert calls >= fail_at
    assert hooks_and_forwards(anatomy.model) == before


def test_everything_is_unpatched_when_a_block_raises():
    anatomy, objective, data, batch_size = setup("clip", "cpu")
    batches = objective.batches(anatomy, "vision", data, batch_size)
    before = hooks_and_forwards(anatomy.model)

    def boom(*_):
        raise RuntimeError("boom")

    handle = anatomy.tower("vision").blocks[2].sites["neurons"].out.register_forward_hook(boom)
    with pytest.raises(RuntimeError, match="boom"):
        collect(engine(anatomy, objective, "vision", batches), everything(anatomy, "vision"))
    handle.remove()
    assert hooks_and_forwards(anatomy.model) == before


def test_parameters_are_untouched():
    anatomy, objective, data, batch_size = setup("clip", "cpu")
    before = {name: p.detach().clone() for name, p in anatomy.model.named_parameters()}
    collect(
        engine(anatomy, objective, "text", objective.batches(anatomy, "text", data, batch_size)),
        everything(anatomy, "text"),
    )
    assert all(torch.equal(before[name], p) for name, p in anatomy.model.named_parameters())


@pytest.mark.parametrize(
    ("intervention", "message"),
    [
        (DropHead("text", 0, (0,)), "not of tower 'vision'"),
        (DropHead("vision", 4, (0,)), "layer below 4"),
        (DropHead("vision", 0, (4,)), "units below 4"),
        (DropNeurons("vision", 0, ()), "drops nothing"),
    ],
)
def test_bad_interventions(intervention, message):
    anatomy, objective, data, batch_size = setup("clip", "cpu")
    replay = engine(anatomy, objective, "vision", objective.batches(anatomy, "vision", data, batch_size))
    with pytest.raises(ValueError, match=message):
        collect(replay, [intervention])


def test_no_data():
    anatomy = describe(tiny.build("clip"))
    with pytest.raises(ValueError, match="no calibration samples"):
        Replay(anatomy, "vision", [], lambda *_: None)


def test_a_site_that_plays_no_part():
    anatomy, objective, data, batch_size = setup("blip_itr", "cpu")
    replay = engine(anatomy, objective, "text", objective.batches(anatomy, "text", data, batch_size))
    with pytest.raises(ValueError, match="plays no part"):
        collect(replay, [DropHead("text", 0, (0,), cross=True)])
