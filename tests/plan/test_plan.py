"""Scores and plans: files that survive the round trip, and refusals that say what is wrong."""

import errno
import json
import math
import os

import pytest
import torch
from models import tiny

from vlprune_ext.anatomy import describe
from vlprune_ext.plan import Module, Plan, Scores
from vlprune_ext.plan.files import write_text


def plan_of(name="clip", seed=0):
    return tiny.uneven_plan(tiny.build(name), seed)


@pytest.fixture
def scores():
    generator = torch.Generator().manual_seed(0)
    modules = [Module("vision", "head", layer, index) for layer in range(2) for index in range(2)]
    modules += [Module("vision", "layer", 1), Module("text", "neurons", 0, 3)]
    samples = torch.randn(6, 40, generator=generator)
    samples[2, 5:] = float("nan")
    return Scores(
        modules=modules,
        value=samples.double().nanmean(1),
        error=torch.rand(6, generator=generator, dtype=torch.float64),
        count=(~samples.isnan()).sum(1),
        cost=torch.arange(6, dtype=torch.float64) * 100,
        samples=samples,
        objective="retrieval",
        dense=0.75,
        neurons={"text": {0: [[0, 1], [2, 3], [4, 5], [7, 6]]}},
        block_runs=12,
        data={"name": "digits", "hash": "abc"},
    )


# --- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip", "blip_vqa", "llama"])
def test_plan_round_trip(name, tmp_path):
    plan = plan_of(name)
    plan.method = {"name": "MoPE", "keep_heads": 0.5}
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["again.json", "plan.json"], "no temporary files stay"


def test_plan_is_readable_json():
    """One line for every block: plans of many neurons stay readable and their diffs short."""
    plan = plan_of()
    text = plan.to_json()
    assert json.loads(text)["kind"] == "plan"
    assert sum(line.strip().startswith('"0": ') for line in text.splitlines()) == 4  # heads and neurons of two towers
    empty = Plan(plan.shape)
    assert Plan.from_dict(json.loads(empty.to_json())) == empty


def test_plan_add_and_removed():
    plan = Plan({"vision": [{"head": 4, "neurons": 8}]})
    plan.add("vision", "head", 0, [2])
    plan.add("vision", "head", 0, [0, 2])
    plan.add("vision", "layer", 0, [])
    assert plan.removed("vision", "head", 0) == [0, 2]
    assert plan.removed("vision", "neurons", 0) == plan.removed("text", "head", 3) == []
    assert plan.layers == {"vision": [0]}


def test_plan_for_another_model():
    plan = plan_of("clip")
    with pytest.raises(ValueError, match=r"plan: made for another model: its towers are vision, text, .* are vision"):
        plan.check(describe(tiny.build("vit")))
    with pytest.raises(ValueError, match=r"another model: its block text\.0 has .*'head': 4.* has .*'cross_head': 4"):
        plan.check(describe(tiny.build("blip_itr")))
    other = tiny.build("clip")
    del other.vision_model.encoder.layers[3]
    with pytest.raises(ValueError, match=r"its tower 'vision' has 4 blocks, the model's has 3"):
        plan.check(describe(other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.add("vision", "head", 0, [4]), r"head of vision\.0: .*expected distinct indices below 4"),
        (lambda p: p.heads.update(vision={0: [1, 1]}), r"head of vision\.0: \[1, 1\], expected distinct"),
        (lambda p: p.add("vision", "head", 4, [0]), r"head of vision\.4: the model has no such site"),
        (lambda p: p.add("vision", "cross_head", 0, [0]), r"cross_head of vision\.0: the model has no such site"),
        (lambda p: p.add("audio", "head", 0, [0]), r"head of audio\.0: the model has no such site"),
        (lambda p: p.add("vision", "neurons", 1, [-1]), r"neurons of vision\.1: .*below 64"),
        (lambda p: p.add("vision", "layer", 7, []), r"layers of tower 'vision': \[7\], expected indices below 4"),
        (lambda p: p.add("audio", "layer", 0, []), r"layers of tower 'audio'"),
        (lambda p: p.layers.update(text=[0, 1, 2]), r"removes all 3 layers of tower 'text'; at least one must stay"),
    ],
)
def test_plan_out_of_bounds(change, message):
    taken_apart = describe(tiny.build("clip"))
    plan = Plan(taken_apart.shape())
    change(plan)
    with pytest.raises(ValueError, match=message):
        plan.check(taken_apart)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"kind": "plan",\n "format": 1,', r"plan\.json: not JSON \(line 2"),
        ("[1, 2]", "not a plan file"),
        ('{"kind": "scores", "format": 1}', "not a plan file"),
        ('{"kind": "plan", "format": 99}', "format 99, this version reads 1"),
        ('{"kind": "plan", "format": 1}', r"plan: malformed content \(KeyError"),
        (
            '{"kind": "plan", "format": 1, "heads": [], "cross_heads": {}, "neurons": {}, "layers": {}, "shape": {}}',
            "malformed content",
        ),
        (
            '{"kind": "plan", "format": 1, "heads": {"vision": {"first": [0]}}, "cross_heads": {}, "neurons": {}, '
            '"layers": {}, "shape": {}}',
            "malformed content",
        ),
    ],
)
def test_malformed_plan(text, message, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Plan.load(path)


def test_write_is_whole_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    write_text(path, "first")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "second")
    assert os.listdir(tmp_path) == ["plan.json"]
    assert path.read_text() == "first"


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["json", "csv"])
def test_scores_round_trip(scores, ending, tmp_path):
    path = tmp_path / f"scores.{ending}"
    scores.save(path)
    again = Scores.load(path)
    assert again.modules == scores.modules
    for name in ("value", "error", "count", "cost"):
        assert torch.equal(getattr(again, name), getattr(scores, name)), name
    assert again.samples is None
    if ending == "json":
        assert (again.objective, again.dense, again.block_runs) == ("retrieval", 0.75, 12)
        assert again.neurons == scores.neurons
        assert again.data == scores.data
    else:
        assert math.isnan(again.dense)


def test_scores_get_and_rank(scores):
    assert scores.get(tower="vision", kind="head", layer=1, index=0) == pytest.approx(scores.value[2].item())
    order = scores.ranking()
    assert scores.value[order].tolist() == sorted(scores.value.tolist())
    assert sorted(scores.ranking("vision", "head")) == [0, 1, 2, 3]
    scores.value[:4] = 1.0
    assert scores.ranking("vision", "head") == [0, 1, 2, 3], "ties keep their order"


def test_indistinguishable_needs_samples(scores, tmp_path):
    base = torch.randn(200, generator=torch.Generator().manual_seed(1))
    noise = 0.01 * torch.randn(200, generator=torch.Generator().manual_seed(2))
    scores.samples = torch.stack([base, base + noise - noise.mean(), base + 1 + noise] + [base + 9] * 3)
    assert scores.indistinguishable([0, 1, 2]) == [(0, 1)]
    scores.save(tmp_path / "scores.json")
    with pytest.raises(ValueError, match="not kept in files"):
        Scores.load(tmp_path / "scores.json").indistinguishable()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("scores.json", '{"kind": "plan", "format": 1}', "not a scores file"),
        ("scores.json", '{"kind": "scores", "format": 1}', r"scores\.json: malformed scores \(KeyError: 'modules'\)"),
        ("scores.csv", "tower,kind,layer\nvision,head,x\n", r"scores\.csv: malformed scores \(ValueError"),
        ("scores.csv", "tower,kind\nvision,head\n", r"scores\.csv: malformed scores \(KeyError: 'layer'\)"),
    ],
)
def test_malformed_scores(name, text, message, tmp_path):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Scores.load(path)
