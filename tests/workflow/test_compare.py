"""`compare`: the first method is kept, the others are measured, and what they share is done once."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
from models import tiny

import vlprune_ext as vp
from vlprune_ext.checkpoint import load_record

SHARES = {"keep_heads": 0.5, "keep_neurons": 0.5, "neurons_per_group": 16, "steps": 1}
CPU = {"params", "nonzero", "flops"}  # what does not depend on the clock


@pytest.fixture
def clip():
    model = tiny.build("clip")
    return model, tiny.retrieval_data("clip", model, 8)


def test_each_is_as_if_it_were_pruned_alone(clip):
    model, data = clip
    dense = copy.deepcopy(model)
    ways = {"mine": vp.Random(**SHARES, seed=3), "theirs": vp.Magnitude(**SHARES)}
    found = vp.compare(model, data, ways, evaluation=data, metric="recall@1", round_to=1)
    assert found.result.model is model
    assert found.others.keys() == {"theirs"}
    for name, numbers in (("mine", found.result.after), ("theirs", found.others["theirs"])):
        alone = vp.prune(copy.deepcopy(dense), data, ways[name], evaluation=data, metric="recall@1", round_to=1)
        assert {key: numbers[key] for key in CPU} == {key: alone.after[key] for key in CPU}
        assert numbers["recall@1"] == alone.after["recall@1"]
        assert {key: found.result.before[key] for key in CPU} == {key: alone.before[key] for key in CPU}


def test_what_methods_share_is_measured_once(clip, monkeypatch):
    model, data = clip
    calls, score = [], vp.ECoFLaP._score
    monkeypatch.setattr(vp.ECoFLaP, "_score", lambda self, *args: calls.append(self) or score(self, *args))
    ways = {f"ECoFLaP {share}": vp.ECoFLaP(sparsity=share) for share in (0.5, 0.25)}
    names = []

    @contextmanager
    def working(name):
        names.append(name)
        yield None

    found = vp.compare(model, data, ways, working=working)
    assert len(calls) == 1
    assert names == ["pruning by ECoFLaP 0.25", "pruning by ECoFLaP 0.5"]
    assert found.result.after["nonzero"] < found.others["ECoFLaP 0.25"]["nonzero"] < found.result.before["nonzero"]


def test_distilling_keeps_the_numbers_before_it(clip):
    model, data = clip
    training = vp.Training(data, steps=2)
    found = vp.compare(model, data, {"x": vp.Random(**SHARES)}, training=training, distill_steps=2)
    assert found.others.keys() == {"Random, before distillation"}
    assert found.result.method["distill_steps"] == 2


def test_a_comparison_is_saved_with_the_model(clip, tmp_path):
    model, data = clip
    found = vp.compare(model, data, {"a": vp.MoPE(**SHARES), "b": vp.Random(**SHARES)})
    found.save(tmp_path / "out")
    record, comparisons = load_record(tmp_path / "out")
    assert record.scores.modules == found.result.scores.modules
    assert comparisons == found.others


def test_a_plan_is_one_of_the_ways(clip):
    model, data = clip
    plan = vp.Random(**SHARES).plan(model, data)
    found = vp.compare(model, data, {"given": plan, "other": vp.Magnitude(**SHARES)})
    assert found.result.plan == plan
    assert found.result.scores is None


def test_refuses(clip):
    model, data = clip
    before = tiny.digest(model)
    with pytest.raises(ValueError, match="methods: none given"):
        vp.compare(model, data, {})
    with pytest.raises(ValueError, match="training: None, expected what CoMP is trained on"):
        vp.compare(model, data, {"CoMP": vp.CoMP()})
    with pytest.raises(ValueError, match="training: None, expected what distilling is trained on"):
        vp.compare(model, data, {"a": vp.Random()}, distill_steps=5)
    assert tiny.digest(model) == before
