"""The stages of CoMP, on the page and in TensorBoard."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
from dataclasses import replace

import pytest
from matplotlib.colors import to_hex
from transformers import TrainerCallback
from transformers.integrations import integration_utils

import vlprune_ext as vp
from vlprune_ext.checkpoint.models import load_model
from vlprune_ext.checkpoint.record import Record, load_record
from vlprune_ext.comp.modes import MODES
from vlprune_ext.comp.scalars import of_stage
from vlprune_ext.methods import JOINT
from vlprune_ext.plan import Plan
from vlprune_ext.report.figures import stages as stage_figures
from vlprune_ext.report.pruning import render
from vlprune_ext.report.words import cut_summary

FIRST = {"vision parameters": 0.25, "language parameters": 18.5, "vision tokens": 0.5}
SHARES = {"vision": [1.0, 0.8, 0.6], "text": [1.0, 1.0]}


def entry(stage: int, mode: str, explored: bool = False, **changed) -> dict:
    return {
        "stage": stage,
        "step": 1000 * stage,
        "closed": 1000 * (stage + 1),
        "mode": mode,
        "explored": explored,
        "declined": {},
        "costs": FIRST,
        "waited": {**dict.fromkeys(FIRST, 1), mode: 1 + stage},
        "threshold": -1.25,
        "cost": 0.1,
        "raised": {"accuracy": 0.9, "flops": 0.875},
        "accuracy": [0.95 - 0.01 * stage, 0.94 - 0.01 * stage],
        "flops": [1 - 0.125 * stage, 0.875 - 0.125 * stage],
        "tokens": SHARES,
        "units": {"vision.head": 0.5},
        **changed,
    }


@pytest.fixture
def record() -> Record:
    """Three stages: the cheapest mode, one that was explored, and one that was the cheapest left."""
    history = [
        entry(0, "vision parameters"),
        entry(1, "language parameters", explored=True),
        entry(2, "vision tokens", threshold=0.0123),
    ]
    method = {
        **vp.CoMP(flops=0.6).describe(),
        "objective": "exact_match",
        "history": history,
        "reached": {"accuracy": 0.925, "flops": 0.6125, "tokens": SHARES},
    }
    plan = Plan({"vision": [{"head": 4}] * 3, "text": [{"head": 4}] * 2}, method=method)
    plan.add("vision", "head", 0, [1])
    plan.tokens["vision"] = {"threshold": 0.0123}
    numbers = {"exact_match": 0.95, "params": 1000, "flops": 2000}
    return Record(plan, None, numbers, {"exact_match": 0.93, "params": 900, "flops": 1300}, dict(method))


def rows(page: str) -> list[list[str]]:
    """The cells of the table of stages."""
    section = page[page.index("<h2>Stages</h2>") :]
    body = section[section.index("<tbody>") : section.index("</tbody>")]
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in body.split("<tr>")[1:]]


# --- the page --------------------------------------------------------------------------------------------------------


def test_page_tells_every_stage_and_why(record, charts):
    page = render(record)
    minus, still = "\N{MINUS SIGN}", "cheapest of those that can still save: R 0.5"
    second = ("language parameters", "explored (waited 2 stages)")
    assert rows(page) == [
        ["1", "0", "vision parameters", "cheapest: R 0.25", f"{minus}1.2", "0.950 → 0.940", "100.0% → 87.5%"],
        ["2", "1,000", *second, f"{minus}1.2", "0.940 → 0.930", "87.5% → 75.0%"],
        ["3", "2,000", "vision tokens", still, "0.012", "0.930 → 0.920", "75.0% → 62.5%"],
    ]
    assert "3 stages: 1 of vision parameters, 1 of language parameters and 1 of vision tokens." in page
    assert "61.3% of the dense model's FLOPs are left" in page.replace("&#39;", "'")
    units, *of_stages = charts
    assert units == "Units kept in every block"
    assert len(of_stages) == 3
    assert "Ring: explored" in page


def test_lede_names_tokens_and_the_flops_reached(record):
    page = render(record).replace("&#39;", "'")
    lede = page[page.index('class="lede">') :].split("</p>")[0]
    assert "CoMP removed 1 of 20 heads and prunes 20% of the vision tokens at run time." in lede
    assert "61% of the dense model's FLOPs are left; 10% fewer parameters; exact match went from 0.950 to 0.930" in lede
    assert "fewer FLOPs" not in lede


def test_facts_hold_fields_only(record):
    facts = render(record)
    facts = facts[facts.index("How it was made") :]
    named = re.findall(r"<tr><td>(.*?)</td>", facts)
    assert {"name", "flops", "rho", "interval"} <= set(named)
    assert not {"history", "reached"} & set(named)
    assert "waited" not in facts


def test_what_was_found_too_dear(record):
    dear = {"vision tokens": 1.5, "language parameters": 2.0}
    record.plan.method["history"] = [entry(0, "vision parameters", declined=dear)]
    why = rows(render(record))[0][3]
    assert why == "cheapest: R 0.25; too dear by now: vision tokens (1.5), language parameters (2)"


def test_plans_of_tokens_only(record, charts):
    record.plan.heads = {}
    page = render(record)
    assert "CoMP prunes 20% of the vision tokens at run time." in page
    assert "removed nothing" not in page
    assert "fewer parameters" not in page
    assert "What was removed" not in page
    assert cut_summary(record.plan) == "20% of the vision tokens"


def test_summaries_of_tokens():
    plan = Plan({"vision": [{"head": 4}] * 2})
    plan.tokens["vision"] = {"threshold": 0.01}
    assert cut_summary(plan) == "vision tokens"
    plan.tokens["vision"] = {"keep": [0.5, 0.25]}
    assert cut_summary(plan) == "62% of the vision tokens"
    plan.add("vision", "head", 0, [1])
    assert cut_summary(plan) == "1 of 8 heads and 62% of the vision tokens"


@pytest.mark.parametrize("history", [None, []])
def test_no_stages_no_section(record, history):
    plan = copy.deepcopy(record.plan)
    plan.method = {"name": "comp", "history": history} if history is not None else {"name": "mope"}
    page = render(replace(record, plan=plan, method=plan.method))
    assert "Stages" not in page
    assert "20% of the vision tokens" not in page
    assert "prunes vision tokens at run time" in page


def test_one_mode_and_modes_in_turn(record, charts):
    """A mode without rivals needs no chart of costs; the baselines' order is not a matter of R."""
    method = record.plan.method
    method["history"] = [entry(0, "parameters", costs={"parameters": 0.5}, tokens={"vision": [1.0]})]
    method["reached"]["tokens"] = {"vision": [1.0]}
    page = render(record)
    assert rows(page)[0][3] == "the only mode"
    assert "Ring" not in page
    assert list(charts) == ["Units kept in every block", "What every stage saved, and what it cost"]
    method["history"] = [entry(0, "tokens", costs={"parameters": 0.5, "tokens": 0.25})]
    for name in JOINT:
        method["name"] = name
        expected = "its turn" if name.startswith("joint") else "cheapest: R 0.25"
        assert rows(render(record))[0][3] == expected


def test_a_plan_at_once_has_no_steps(record, charts):
    record.plan.method["train"] = False
    assert [row[1] for row in rows(render(record))] == ["vision parameters", "language parameters", "vision tokens"]


def test_page_stands_alone(record):
    page = render(record)
    assert page == render(record)
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert page.count("<svg") == 4
    assert "nan" not in page


# --- charts ----------------------------------------------------------------------------------------------------------


def marks(axes) -> list[tuple[float, float, str]]:
    """(x, y, colour) of what is marked; rings have no colour."""
    return sorted(
        (*map(float, point), to_hex(found.get_facecolor()[0]) if len(found.get_facecolor()) else "")
        for found in axes.collections
        for point in found.get_offsets()
    )


def test_progress_marks_modes_and_what_was_explored(record):
    history = record.plan.method["history"]
    flops, accuracy = stage_figures.progress(history, "exact match").axes
    assert flops.lines[0].get_ydata().tolist() == [1, 0.875, 0.75, 0.625]
    assert accuracy.lines[0].get_ydata().tolist() == pytest.approx([0.95, 0.94, 0.93, 0.92])
    assert accuracy.get_ylabel() == "exact match"
    found = marks(flops)
    assert [(x, y) for x, y, colour in found if colour] == [(1, 0.875), (2, 0.75), (3, 0.625)]
    assert len({colour for _, _, colour in found if colour}) == 3
    assert [(x, y) for x, y, colour in found if not colour] == [(2, 0.75)]
    legend = [text.get_text() for text in flops.figure.legends[0].get_texts()]
    assert legend == ["vision parameters", "language parameters", "vision tokens", "explored"]


def test_costs_mark_the_chosen_and_widen_where_they_must(record):
    history = record.plan.method["history"]
    axes = stage_figures.costs(history).axes[0]
    assert [(x, y) for x, y, colour in marks(axes) if colour] == [(1, 0.25), (2, 18.5), (3, 0.5)]
    assert axes.get_yscale() == "symlog"
    assert axes.get_ylabel() == "cost R, logarithmic beyond 1.5"
    near = [{**one, "costs": {**FIRST, "language parameters": 1.0}} for one in history]
    assert stage_figures.costs(near).axes[0].get_yscale() == "linear"
    zero = [{**one, "costs": dict.fromkeys(FIRST, 0.0)} for one in history]
    assert stage_figures.costs(zero).axes[0].get_yscale() == "linear"


def test_a_mode_without_a_cost_has_a_gap():
    """One that could save nothing at first is not measured."""
    costs = {"vision tokens": 0.5}
    history = [entry(0, "vision tokens", costs=costs), entry(1, "vision tokens", costs={**costs, "odd": 0.25})]
    drawn = {tuple(line.get_ydata()) for line in stage_figures.costs(history).axes[0].lines}
    assert (0.5, 0.5) in drawn
    assert any(math.isnan(y[0]) and y[1] == 0.25 for y in drawn)


def test_modes_can_be_told_apart():
    looks = stage_figures._looks([entry(0, mode, costs=dict.fromkeys(MODES, 0.0)) for mode in MODES])
    assert list(looks) == list(MODES)
    assert len({colour for colour, _ in looks.values()}) == len({marker for _, marker in looks.values()}) == len(MODES)


def test_many_stages_have_few_ticks():
    for axes in stage_figures.progress([entry(i, "vision tokens") for i in range(60)]).axes[1:]:
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert 5 < len(ticks) <= 21
        assert all(tick == round(tick) for tick in ticks)


def test_tokens_have_a_line_a_tower():
    axes = stage_figures.tokens_left(SHARES).axes[0]
    assert {line.get_label(): line.get_ydata().tolist() for line in axes.lines} == SHARES


# --- while it trains -------------------------------------------------------------------------------------------------


def test_scalars_of_a_stage():
    found = of_stage(entry(0, "vision tokens", explored=True), {"a b": -math.inf, "c": 0.5}, {"c": 0.125})
    assert found == {
        "comp/accuracy": 0.94,
        "comp/flops": 0.875,
        "comp/cost": 0.1,
        "comp/explored": 1.0,
        "comp/c/threshold": 0.5,
        "comp/c/R": 0.125,
        "comp/tokens/vision": pytest.approx(0.8),
        "comp/tokens/text": 1.0,
    }


def trained(source, folder, report_to, steps=7, *callbacks):
    """A model after a few steps, its method and the state of its Trainer."""
    loaded = load_model(str(source), device="cpu")
    model = loaded.model
    data = [
        vp.load_data("digits", split, model=model, processor=loaded.processor, limit=limit)
        for split, limit in (("validation", 16), ("train", 32))
    ]
    method = vp.CoMP(validation=data[0], flops=0.85, interval=2, step=0.1)

    class Keep(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.state = state

    keep = Keep()
    vp.train(
        model,
        method,
        data[1],
        steps=steps,
        batch_size=8,
        out=folder,
        save_steps=1,
        report_to=report_to,
        callbacks=[keep, *callbacks],
    )
    return model, method, keep.state


def test_tensorboard_and_the_log_hold_every_stage(untrained_clip, tmp_path, monkeypatch):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")  # not on every GPU machine
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    times = itertools.count()  # the clock goes on between the Trainer's callback and CoMP
    monkeypatch.setattr(integration_utils, "default_logdir", lambda: f"runs/{next(times)}")
    model, method, state = trained(untrained_clip, tmp_path, ["tensorboard"])
    assert len(method.history) > 1
    (run,) = (tmp_path / "runs").iterdir()
    seen = events.EventAccumulator(str(run / "comp"))
    seen.Reload()
    logged = [line for line in state.log_history if "comp/flops" in line]
    assert len(logged) == len(method.history)
    for line, stage in zip(logged, method.history, strict=True):
        assert line["step"] == stage["closed"]
        assert (line["comp/flops"], line["comp/accuracy"]) == (stage["flops"][1], stage["accuracy"][1])
        assert line["comp/cost"] == stage["cost"]
        assert line[f"comp/{stage['mode']}/threshold"] == stage["threshold"]
        assert line["comp/explored"] == stage["explored"]
    names = {name for line in logged for name in line if name != "step"}
    assert set(seen.Tags()["scalars"]) == names
    assert {"comp/tokens/vision", "comp/vision tokens/R"} <= names
    for name in names:
        expected = [(line["step"], pytest.approx(line[name])) for line in logged if name in line]
        assert [(event.step, event.value) for event in seen.Scalars(name)] == expected
    vp.save_pruned(model, tmp_path / "saved")
    page = render(load_record(tmp_path / "saved")[0])
    assert [row[2] for row in rows(page)] == [stage["mode"] for stage in method.history]


def test_without_tensorboard_the_log_of_a_resumed_run_is_whole(untrained_clip, tmp_path):
    class Killed(BaseException):
        pass

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise Killed

    with pytest.raises(Killed):
        trained(untrained_clip, tmp_path, [], 6, Kill())
    saved = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert any("comp/flops" in line for line in saved)
    _, method, state = trained(untrained_clip, tmp_path, [])
    assert not (tmp_path / "runs").exists()
    logged = [line["comp/flops"] for line in state.log_history if "comp/flops" in line]
    assert logged == [stage["flops"][1] for stage in method.history]
