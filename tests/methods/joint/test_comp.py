"""CoMP from end to end: stages, training, resuming, and what it refuses."""

from __future__ import annotations

import copy
import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from models import tiny
from transformers import Trainer, TrainerCallback, TrainingArguments

import vlprune_ext as vp
from vlprune_ext.checkpoint.models import load_model
from vlprune_ext.comp.modes import MODES
from vlprune_ext.objectives import ExactMatch
from vlprune_ext.training.trainer import last_checkpoint

SOURCES = {"clip-digits": "digits", "blip-digits": "digits-questions", "llava-digits": "digits-questions"}
METHODS = [vp.CoMP, vp.ParametersOnly, vp.TokensOnly, vp.JointSequential, vp.JointSimultaneous]


@pytest.fixture(scope="module")
def task(untrained_clip):
    """(a fresh copy of a zoo model, or of a CLIP that nobody trained; its validation data, its training data)."""
    loaded: dict = {}

    def get(name="untrained", validation=24, train=48):
        if name not in loaded:
            loaded[name] = load_model(str(untrained_clip) if name == "untrained" else name, device="cpu")
        model, processor = loaded[name].model, loaded[name].processor
        data = [
            vp.load_data(SOURCES.get(name, "digits"), split, model=model, processor=processor, limit=limit)
            for split, limit in (("validation", validation), ("train", train))
        ]
        return copy.deepcopy(model), *data

    return get


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def size(model):
    return sum(p.numel() for p in model.parameters())


def hooks(model):
    """How many there are. Transformers adds some of its own when a model that captures outputs first runs."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in m.__dict__) for m in model.modules())


# --- without training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_at_once(task, name):
    """The target is met, the model is left as it was, and the applied plan is what was promised."""
    model, data, _ = task(name)
    metric = "retrieval" if name == "clip-digits" else "exact_match"
    vp.evaluate(model, data, metric)
    before, hooked = weights(model), hooks(model)
    method = vp.CoMP(flops=0.85, train=False, step=0.1)
    plan = method.plan(model, data)
    assert hooks(model) == hooked
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters())
    reached = plan.method["reached"]
    assert reached["flops"] <= 0.85 + 0.005
    assert {entry["mode"] for entry in method.history} <= set(MODES)
    assert [entry["flops"][1] for entry in method.history] == [entry["flops"][0] for entry in method.history[1:]] + [
        method.history[-1]["flops"][1]
    ]
    assert vp.Plan.from_dict(json.loads(plan.to_json())).to_json() == plan.to_json()
    vp.apply(model, plan, data, round_to=1)
    found = vp.evaluate(model, data, metric)
    shown = [v for key, v in found.items() if key.startswith("recall@")] if name == "clip-digits" else [found[metric]]
    assert sum(shown) / len(shown) == pytest.approx(reached["accuracy"], abs=1e-6)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
def test_every_method(task, method):
    """All meet the target with what is theirs to prune."""
    model, data, _ = task()
    plan = method(flops=0.85, train=False, step=0.1).plan(model, data)
    assert plan.method["reached"]["flops"] <= 0.855
    units = bool(plan.heads or plan.neurons or plan.cross_heads)
    if method is vp.ParametersOnly:
        assert units
        assert not plan.tokens
    elif method is vp.TokensOnly:
        assert plan.tokens
        assert not units
    elif method is not vp.CoMP:
        assert units
        assert plan.tokens


def test_sequential_and_simultaneous(task):
    model, data, _ = task()
    first = vp.JointSequential(flops=0.75, train=False, step=0.13)
    first.plan(model, data)
    modes = [entry["mode"] for entry in first.history]
    assert modes == sorted(modes)  # "parameters" before "tokens"
    assert len(set(modes)) == 2
    second = vp.JointSimultaneous(flops=0.75, train=False, step=0.08)
    second.plan(model, data)
    assert [entry["mode"] for entry in second.history[:3]] == ["parameters", "tokens", "parameters"]


def test_the_same_again(task):
    """The same seed, the same run; exploration makes another one."""
    model, data, _ = task()

    def run(**fields):
        method = vp.CoMP(flops=0.8, train=False, step=0.08, **fields)
        method.plan(model, data)
        return [(entry["mode"], entry["threshold"], entry["cost"]) for entry in method.history]

    first = run()
    assert first == run()
    assert first != run(rho=1.0, seed=1)


def test_greedy_takes_the_cheapest(task):
    model, data, _ = task()
    method = vp.CoMP(flops=0.8, train=False, step=0.08, rho=0.0)
    method.plan(model, data)
    assert len(method.history) > 2
    for entry in method.history:
        assert not entry["explored"]
        assert entry["costs"][entry["mode"]] == min(entry["costs"].values())


def test_tried_before_it_is_pruned(task):
    """What is too dear by now is as it was, and the cheapest has its turn."""
    model, data, _ = task()
    method = vp.CoMP(flops=0.7, train=False, step=0.1, rho=1.0, seed=1)
    run = method._begin(model, data)
    declined = 0
    try:
        while True:
            before = {name: mode.state() for name, mode in run.modes.items()}
            if not run.open_stage():
                break
            entry = run.entry
            assert entry["explored"] == (not entry["declined"])
            assert run.mode.name not in entry["declined"]
            declined += len(entry["declined"])
            for name, lost in entry["declined"].items():
                assert {**run.modes[name].state(), "capacity": 0} == {**before[name], "capacity": 0}
                assert entry["waited"][name] == 0
                assert entry["costs"][name] <= lost
            if entry["declined"]:
                assert entry["costs"][run.mode.name] == min(entry["costs"].values())
            run.close_stage(0)
    finally:
        method.detach()
    assert declined > 1


def test_explored_whatever_it_costs(task):
    """As in the paper: what is drawn is pruned."""
    model, data, _ = task()
    method = vp.CoMP(flops=0.85, train=False, step=0.08, rho=1.0, seed=1, confirm=False)
    method.plan(model, data)
    assert all(entry["explored"] and not entry["declined"] for entry in method.history)
    assert any(entry["costs"][entry["mode"]] > min(entry["costs"].values()) for entry in method.history)


@pytest.mark.parametrize(("judged", "weight"), [("raised", 0.0), ("trained", 1.0), ("both", 0.5)])
def test_when_accuracy_is_measured(task, monkeypatch, judged, weight):
    """Eq. (8) with what is seen before training, after it, or the mean; FLOPs likewise."""
    model, data, _ = task()
    method = vp.CoMP(flops=0.7, train=False, step=0.1, rho=0.0, history_weight=0.0, judged=judged)
    run = method._begin(model, data)
    try:
        assert run.open_stage()
        raised = run.entry["raised"]
        now = run.validation.now

        def learnt():  # as if training had changed accuracy and FLOPs
            found = now()
            return replace(found, accuracy=found.accuracy - 0.2, flops=found.flops - 0.05 * run.dense)

        monkeypatch.setattr(run.validation, "now", learnt)
        run.close_stage(0)
    finally:
        method.detach()
    (entry,) = method.history
    accuracy = weight * entry["accuracy"][1] + (1 - weight) * raised["accuracy"]
    flops = weight * entry["flops"][1] + (1 - weight) * raised["flops"]
    assert entry["cost"] == pytest.approx((entry["accuracy"][0] - accuracy) / (1 - flops))
    assert run.strategy.costs[entry["mode"]] == entry["cost"]


def test_heads_that_go_take_no_tokens(task):
    """Where thresholds are held, as many tokens run as before on data that nobody looked at; else many fewer."""
    model, data, _ = task("clip-digits", validation=64)
    method = vp.CoMP(flops=0.3, train=False, calibration=data.subset(48))
    run = method._begin(model, data)
    tokens, units = run.modes["vision tokens"], run.modes["vision parameters"]

    def running():
        return sum(float(entered.float().mean()) for entered in run.validation.now().load.entered["vision"])

    try:
        for _ in range(4):
            assert tokens.raise_threshold(run._examine(), run._budget(), run._goal()) > 0
            tokens.settle()
            run.now = run.validation.now()
        before, at, found = running(), tokens.threshold, run._examine()
        after = {}
        for hold in (True, False):
            method.hold = hold
            units.going["vision", 0, "head"][:3] = True  # all but one
            withdraw = run._hold_tokens(units, found)
            units.soften(0.0)
            after[hold] = running()
            assert (tokens.threshold != at) == hold
            withdraw()
            assert (running(), tokens.threshold) == (before, at)
    finally:
        method.detach()
    assert after[True] == pytest.approx(before, rel=0.05)
    assert after[False] < 0.8 * before


def test_fixed_numbers_of_tokens(task):
    """tokens="keep": every image keeps the same number, near the mean of what thresholds kept."""
    model, data, _ = task("clip-digits")
    plan = vp.TokensOnly(flops=0.7, train=False, tokens="keep", step=0.15).plan(model, data)
    keep = plan.tokens["vision"]["keep"]
    assert len(keep) == 6
    assert keep == sorted(keep, reverse=True)
    vp.apply(model, plan, data)
    with vp.prune_tokens(model) as pruning, torch.no_grad():
        model.get_image_features(**data.images)
    left = pruning.kept[max(pruning.kept)].sum(1)
    assert left.min() == left.max()


# --- with training ---------------------------------------------------------------------------------------------------


def fields(**changed):
    return {"flops": 0.6, "interval": 2, "step": 0.1, "batch_size": 32, **changed}


@pytest.mark.filterwarnings("ignore:CoMP. training ended")
@pytest.mark.parametrize("name", SOURCES)
def test_training(task, name):
    """A stage's units fade over its steps, the target is reached, and the model is physically smaller."""
    model, validation, train = task(name)
    dense = size(model)
    method = vp.CoMP(validation=validation, **fields(flops=0.85, interval=3))
    soft = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            run = method._stages
            if run.mode is not None:
                soft.extend(float(mask.max()) for mask in (m[m < 1] for m in run.masks.units.values()) if len(mask))
                soft.extend(limit.soft for limit in run.masks.flow.thresholds.values())

    vp.train(model, method, train, steps=7, batch_size=8, learning_rate=1e-5, callbacks=[Look()])
    record = model.vlprune["plans"][-1]["plan"]
    assert record["method"]["reached"]["flops"] <= 0.85 + 0.03  # tokens may come back while it learns
    assert method._stages is None
    assert any(0 < value < 1 for value in soft)
    assert size(model) <= dense
    assert math.isfinite(sum(vp.evaluate(model, validation, method.objective).values()))


@pytest.mark.filterwarnings("ignore:CoMP. training ended")
@pytest.mark.parametrize("name", ["untrained", "blip-digits"])  # BLIP ties weights
def test_resumes(task, tmp_path, name):
    """A run that is killed at some step goes on to the same modes, thresholds, weights and numbers."""

    class Killed(BaseException):
        pass

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise Killed

    def run(folder, *callbacks):
        model, validation, train = task(name)
        method = vp.CoMP(validation=validation.subset(12), **fields(flops=0.75))
        vp.train(model, method, train, steps=5, batch_size=8, out=folder, save_steps=2, callbacks=callbacks, seed=3)
        return model, method

    whole, method = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "cut", Kill())
    (tmp_path / "cut" / "checkpoint-8").mkdir()  # as if it had been killed while it wrote
    again, resumed = run(tmp_path / "cut")
    assert resumed.history == method.history
    assert len(method.history) > 1
    assert again.vlprune["plans"][-1]["plan"] == whole.vlprune["plans"][-1]["plan"]
    for (path, p), (_, q) in zip(again.named_parameters(), whole.named_parameters(), strict=True):
        assert torch.equal(p, q), path


@pytest.mark.filterwarnings("ignore:CoMP. training ended")
def test_ends_with_the_flops_it_had_reached(task):
    """While the rest of the steps is trained tokens come and go; in the end as many are left as when pruning ended."""
    model, validation, train = task("clip-digits")
    method = vp.TokensOnly(validation=validation, **fields(flops=0.8, step=0.2, interval=1))
    seen = {}

    class Look(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            run = method._stages
            assert run.frozen
            seen.update(ended=run.now.flops / run.dense, drifted=run.validation.now().flops / run.dense)

    vp.train(model, method, train, steps=12, batch_size=8, learning_rate=3e-3, callbacks=[Look()])
    reached = model.vlprune["plans"][-1]["plan"]["method"]["reached"]["flops"]
    assert abs(seen["drifted"] - seen["ended"]) > 0.01 * seen["ended"], "or this shows nothing"
    assert reached == pytest.approx(seen["ended"], rel=0.011)


def test_another_method_does_not_resume(task, tmp_path):
    model, validation, train = task()
    with pytest.warns(UserWarning, match=r"CoMP: training ended with 0\.\d+ of the FLOPs left, the target was 0\.6"):
        vp.train(model, vp.CoMP(validation=validation, **fields()), train, steps=3, batch_size=8, out=tmp_path)
    assert last_checkpoint(tmp_path).name == "checkpoint-3"
    model, validation, train = task()
    with pytest.raises(ValueError, match=r"step: 0\.2, but the run to go on with has 0\.1"):
        vp.train(model, vp.CoMP(validation=validation, **fields(step=0.2)), train, steps=6, batch_size=8, out=tmp_path)
    assert hooks(model) == hooks(task()[0])


def test_an_ordinary_trainer(task, tmp_path):
    """Transformers' Trainer, its own loss, and CoMP as one callback among others."""
    model, validation, train = task()
    method = vp.CoMP(validation=validation, **fields(flops=0.85))
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=6,
            per_device_train_batch_size=8,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            logging_strategy="no",
        ),
        train_dataset=range(len(train)),
        data_collator=lambda rows: {**train.batch(torch.tensor(rows)), "return_loss": True},
        callbacks=[method],
    )
    trainer.train()
    assert method.history
    assert model.vlprune["plans"][-1]["plan"]["method"]["name"] == "comp"


ON_TWO = """
import os
import sys
import torch
import torch.distributed as dist
import vlprune_ext as vp
from vlprune_ext.checkpoint import load_model

torch.set_num_threads(1)
loaded = load_model(sys.argv[1], device="cpu")
given = {"model": loaded.model, "processor": loaded.processor}
validation, train = (vp.load_data("digits", split, limit=32, **given) for split in ("validation", "train"))
validation = validation.subset(12 + 8 * int(os.environ["RANK"]))
method = vp.CoMP(flops=0.8, interval=2, step=0.1, validation=validation)
vp.train(loaded.model, method, train, steps=4, batch_size=8, learning_rate=1e-4)
found = [(stage["mode"], stage["threshold"]) for stage in method.history]
total = [p.double().sum().item() for p in loaded.model.parameters()]
every = [None, None]
dist.all_gather_object(every, (found, total))
assert every[0] == every[1], every
assert len(found) > 1
print("agreed")
"""


def test_on_two_processes(untrained_clip, tmp_path):
    """As torchrun starts them: gradients are averaged, the first process decides, and both end with the same model.

    Their validation data differ, so that each by itself would decide otherwise.
    """
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    shared = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    both = [
        subprocess.Popen(
            [sys.executable, "-c", ON_TWO, untrained_clip],
            env={**shared, "RANK": rank, "LOCAL_RANK": rank},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        for process in both:
            said, wrong = process.communicate(timeout=300)
            assert "agreed" in said, wrong[-3000:]
    finally:
        for process in both:
            process.kill()


# --- what it refuses -------------------------------------------------------------------------------------------------


class NotFinite(ExactMatch):
    """An accuracy that is none."""

    def values(self, anatomy, tower, outputs, other, data, part=None):
        return outputs * math.nan


def test_refuses(task, tmp_path):
    model, data, train = task("blip-digits")
    hooked = hooks(model)
    with pytest.raises(ValueError, match=r"flops: 0\.001, expected at least 0\.\d+, the least that vision parameters,"):
        vp.CoMP(flops=0.001, train=False).plan(model, data)
    with pytest.raises(ValueError, match="validation: None, expected data"):
        vp.train(model, vp.CoMP(), train, steps=2)
    with pytest.raises(ValueError, match="objective: exact_match is nan on digits-questions; expected a finite number"):
        vp.CoMP(flops=0.5, train=False, objective=NotFinite()).plan(model, data)
    with pytest.raises(ValueError, match="train: True, expected False for a plan at once"):
        vp.CoMP(flops=0.5).plan(model, data)
    with pytest.raises(ValueError, match="train: False, expected True"):
        vp.train(model, vp.CoMP(train=False, validation=data), train, steps=2)
    assert hooks(model) == hooked


def test_one_modality():
    """A model without language has the modes of vision only; one that is asked for others says so."""
    model = tiny.build("vit")
    with pytest.raises(ValueError, match="objective: 'exact_match' needs a model that predicts tokens"):
        vp.CoMP(flops=0.5, train=False).plan(model, None or object())
    text = tiny.build("llama")
    ids = torch.randint(3, 50, (6, 9))
    texts = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    data = vp.Data("ids", "validation", {}, texts, torch.arange(6))
    with pytest.raises(ValueError, match="modes: LlamaForCausalLM has no vision tokens"):
        vp.CoMP(flops=0.8, train=False, modes=("vision tokens",)).plan(text, data)
    plan = vp.CoMP(flops=0.8, train=False, objective="lm_loss").plan(text, data)
    assert set(plan.neurons) | set(plan.heads) == {"text"}


@pytest.mark.parametrize(
    ("message", "values"),
    [
        (r"flops: 0, expected the share to keep, in \(0, 1\)", {"flops": 0}),
        (r"flops: 1\.2, expected the share", {"flops": 1.2}),
        (r"step: 0, expected a share", {"step": 0}),
        ("interval: 0, expected at least 1", {"interval": 0}),
        ("tokens: 'some', expected one of threshold, keep", {"tokens": "some"}),
        ("judged: 'later', expected one of both, raised, trained", {"judged": "later"}),
        (r"modes: \('bits',\), expected some of vision parameters", {"modes": ("bits",)}),
        ("rho is 2.0", {"rho": 2.0}),
        ("objective: 'speed', expected one of", {"objective": "speed"}),
    ],
)
def test_fields(message, values):
    with pytest.raises(ValueError, match=message):
        vp.CoMP(**values)


def test_a_new_kind_of_mode(task):
    """One small class and one entry: here, whole blocks of the vision tower's last MLPs by one switch each."""
    from vlprune_ext.comp.modes import UnitMode

    class LastMLP(UnitMode):
        """Neurons of the last block only."""

    MODES["last MLP"] = lambda masks: LastMLP("last MLP", masks, [("vision", 1, "neurons")])
    try:
        model, data, _ = task()
        plan = vp.CoMP(flops=0.95, train=False, modes=("last MLP",), step=0.02).plan(model, data)
        assert set(plan.neurons["vision"]) == {1}
    finally:
        del MODES["last MLP"]


def test_describe_is_plain(task):
    _, data, _ = task("clip-digits")
    method = replace(vp.CoMP(validation=data), flops=0.4)
    assert json.loads(json.dumps(method.describe()))["validation"] == {
        "name": data.name,
        "split": data.split,
        "hash": data.hash,
        "images": data.n_images,
    }
