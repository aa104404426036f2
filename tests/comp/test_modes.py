"""Thresholds that rise: what they save, what they leave, and what can be taken back."""

from __future__ import annotations

import json
import math

import pytest
import torch
from comp.test_masks import batches_of
from models import tiny

from vlprune_ext.anatomy import describe
from vlprune_ext.anatomy.patch import Patches
from vlprune_ext.comp.masks import Masks, examine
from vlprune_ext.comp.modes import BITE, LEVEL, MODES, Budget, level
from vlprune_ext.comp.validation import Validation
from vlprune_ext.objectives import objective_named
from vlprune_ext.plan import Plan

UNITS = ("vision parameters", "language parameters", "cross-modal parameters", "parameters")
TOKENS = ("vision tokens", "language tokens", "tokens")
OF_UNITS = [(name, mode) for name in ("clip", "blip_vqa", "llava") for mode in UNITS]
OF_UNITS = [pair for pair in OF_UNITS if pair[0] == "blip_vqa" or pair[1] != "cross-modal parameters"]
SOME = [
    ("clip", "vision parameters"),
    ("blip_vqa", "cross-modal parameters"),
    ("llava", "parameters"),
    ("clip", "tokens"),
    ("blip_vqa", "language tokens"),
    ("llava", "vision tokens"),
]


class Bench:
    """A model under its masks, judged on four samples."""

    def __init__(self, name):
        self.model = tiny.build(name)
        self.masks = Masks(describe(self.model))
        self.patches = Patches()
        self.masks.install(self.patches)
        self.objective = objective_named("contrastive" if name == "clip" else "lm_loss")
        self.validation = Validation(self.masks, self.objective, tiny.retrieval_data(name, self.model, 4), 3)
        self.batches = batches_of(name, self.model, 4, 3)[1]

    def look(self):
        """(what was found, the budget), as things are now."""
        self.now = self.validation.now()
        found = examine(self.masks, self.objective, self.batches)
        return found, Budget(self.masks, self.validation.total, self.now.load)

    def mode(self, name):
        return MODES[name](self.masks)

    def flops(self):
        return self.validation.now().flops


@pytest.fixture
def bench():
    made = []

    def build(name):
        made.append(Bench(name))
        return made[-1]

    yield build
    for one in made:
        one.patches.undo()


def masks_of(bench):
    return {key: mask.clone() for key, mask in bench.masks.units.items()}


def gone_units(mode):
    return {(*key, int(unit)) for key, mask in mode.gone.items() for unit in mask.nonzero().flatten()}


def test_which_modes(bench):
    """Language's units are all that is neither vision's nor reads it; SigLIP's patches cannot leave."""
    for name, missing in (
        ("clip", {"cross-modal parameters"}),
        ("siglip", {"cross-modal parameters", "vision tokens"}),
        ("blip_vqa", set()),
        ("vit", {"language parameters", "cross-modal parameters", "vision tokens", "language tokens", "tokens"}),
    ):
        masks = Masks(describe(tiny.build(name)))
        assert {mode for mode, make in MODES.items() if make(masks) is None} == missing
    kinds = {mode: {key[::2] for key in bench("blip_vqa").mode(mode).units} for mode in UNITS}
    assert kinds["vision parameters"] == {("vision", "head"), ("vision", "neurons")}
    assert kinds["cross-modal parameters"] == {("text", "cross_head"), ("decoder", "cross_head")}
    assert kinds["language parameters"] == {(t, k) for t in ("text", "decoder") for k in ("head", "neurons")}
    assert kinds["parameters"] == set().union(*(kinds[mode] for mode in UNITS[:3]))


@pytest.mark.parametrize(("name", "mode"), OF_UNITS)
def test_units_save_enough_and_no_more(bench, name, mode):
    """The goal, with the fewest units; those of least standardised score; what is promised is what is measured."""
    at = bench(name)
    mode = at.mode(mode)
    found, budget = at.look()
    goal = 0.02 * at.now.flops
    saves = mode.raise_threshold(found, budget, goal)
    whole = sum(at.masks.sites[key].units for key in mode.units)
    assert saves >= min(goal, BITE * mode.capacity)
    mode.soften(0.0)
    assert at.now.flops - at.flops() == pytest.approx(saves, rel=1e-6)
    going = [(key, unit) for key, mask in mode.going.items() for unit in mask.nonzero().flatten().tolist()]
    assert 0 < len(going) < whole
    standard = {}
    for kind in ("head", "cross_head", "neurons"):
        scores = {key: found.units[key].double() for key in mode.units if key[2] == kind}
        if scores:
            every = torch.cat(list(scores.values()))
            standard |= {key: (s - every.mean()) / every.std(correction=0) for key, s in scores.items()}
    ranked = sorted(
        (float(s), key, unit)
        for key, score in standard.items()
        for unit, s in enumerate(score)
        if unit != int(score.argmax())
    )
    assert sorted(going) == sorted((key, unit) for _, key, unit in ranked[: len(going)])
    assert mode.threshold == pytest.approx(ranked[len(going) - 1][0])
    kept = {key: int((~mask).sum()) for key, mask in mode.going.items()}
    last = ranked[len(going) - 1][1]
    fewer = at.now.flops - at.validation.total({**kept, last: kept[last] + 1}, at.now.load)
    assert fewer < min(goal, BITE * mode.capacity)


@pytest.mark.parametrize(
    ("name", "mode"), [("clip", "language parameters"), ("clip", "vision tokens"), ("llava", "tokens")]
)
def test_small_modes_take_small_steps(bench, name, mode):
    at = bench(name)
    mode = at.mode(mode)
    found, budget = at.look()
    saves = mode.raise_threshold(found, budget, 0.9 * at.now.flops)
    assert BITE * mode.capacity <= saves < 3 * BITE * mode.capacity  # a unit or a token is not that small here
    mode.withdraw()
    everything = mode.raise_threshold(found, budget, math.inf)
    assert everything == pytest.approx(mode.capacity)
    assert everything > 2 * saves


@pytest.mark.parametrize(("name", "mode"), SOME)
def test_something_stays(bench, name, mode):
    """With no goal too high: the best unit of each site, the best free token of each sample; then there is no more."""
    at = bench(name)
    mode = at.mode(mode)
    found, budget = at.look()
    assert mode.raise_threshold(found, budget, math.inf) > 0
    mode.settle()
    if isinstance(mode.threshold, float) and mode.name in TOKENS:
        at.flops()
        for tower in mode.towers():
            tokens = at.masks.flow.state[tower]
            assert ((tokens.alive & tokens.free).sum(1) == 1).all()
    else:
        for key, gone in mode.gone.items():
            assert (~gone).nonzero().flatten().tolist() == [int(found.units[key].argmax())]
    found, budget = at.look()
    before, units = json.dumps(mode.state()), masks_of(at)
    assert mode.raise_threshold(found, budget, math.inf) == 0
    assert json.dumps(mode.state()) == before
    assert all(torch.equal(mask, units[key]) for key, mask in at.masks.units.items())


@pytest.mark.parametrize(("name", "mode"), SOME)
def test_raised_twice(bench, name, mode):
    """What is gone stays gone, more goes; what was going comes back when it is withdrawn."""
    at = bench(name)
    mode = at.mode(mode)
    flops, thresholds = [at.flops()], [mode.threshold]
    for _ in range(2):
        found, budget = at.look()
        saves = mode.raise_threshold(found, budget, 0.03 * flops[0])
        mode.soften(0.5)
        assert at.flops() < flops[-1]  # hardened
        mode.withdraw()
        assert at.flops() == flops[-1]
        assert mode.threshold == thresholds[-1]
        again = mode.raise_threshold(found, budget, 0.03 * flops[0])
        assert again == saves
        mode.soften(0.25)
        if mode.name in TOKENS:
            assert at.masks.flow.thresholds[mode.towers()[0]].soft == 0.25
            assert mode.limit.gone < mode.limit.going
        else:
            gone = gone_units(mode)
            soft = {float(v) for mask in at.masks.units.values() for v in mask}
            assert soft == {1.0, 0.25} | ({0.0} if gone else set())
        mode.settle()
        flops.append(at.flops())
        thresholds.append(mode.threshold)
        if mode.name in TOKENS:
            assert mode.limit.gone == mode.limit.going == mode.threshold
        else:
            assert gone_units(mode) > gone
    assert flops[0] > flops[1] > flops[2]
    if mode.name in TOKENS:
        assert thresholds[0] < thresholds[1] < thresholds[2]


@pytest.mark.parametrize("mode", ["vision parameters", "tokens"])
def test_saved_and_loaded(bench, mode):
    """Through JSON, in the middle of a stage: another mode goes on as this one does."""
    at = bench("clip")
    first = at.mode(mode)
    for _ in range(2):
        found, budget = at.look()
        first.raise_threshold(found, budget, 0.03 * at.now.flops)
        state = json.loads(json.dumps(first.state()))
        first.settle()
    flops = at.flops()
    at.masks.units.clear()
    at.masks.flow.thresholds.clear()
    second = at.mode(mode)
    second.load(state)
    assert json.loads(json.dumps(second.state())) == state
    assert second.threshold == first.threshold
    assert second.capacity == first.capacity
    second.settle()
    assert at.flops() == flops
    assert second.state() == first.state()
    plans = [Plan(at.masks.anatomy.shape()) for _ in range(2)]
    for plan, one in zip(plans, (first, second), strict=True):
        one.write(plan, None)
    assert plans[0].to_json() == plans[1].to_json()
    assert plans[0].neurons or plans[0].tokens


@pytest.mark.parametrize("name", ["clip", "blip_vqa", "llava"])
def test_tokens_are_foretold(bench, name):
    """What a raised threshold saves is told from the importances of one run, and is near what then is measured."""
    at = bench(name)
    mode = at.mode("tokens")
    found, budget = at.look()
    saves = mode.raise_threshold(found, budget, 0.04 * at.now.flops)
    assert saves >= min(0.04 * at.now.flops, BITE * mode.capacity)
    assert at.flops() == at.now.flops  # raised, but nothing goes before it is told to
    mode.soften(0.0)
    assert at.now.flops - at.flops() == pytest.approx(saves, rel=0.6)  # importances shift once some have left
    mode.settle()
    found, _ = at.look()
    plan, few = Plan(at.masks.anatomy.shape()), Plan(at.masks.anatomy.shape())
    mode.write(plan, None)
    mode.write(few, found)
    for tower in mode.towers():
        assert plan.tokens[tower] == {"threshold": mode.threshold}
        batches = found.tokens[tower]
        movable = sum(int(b[0][0].free.sum()) for b in batches)
        for layer, share in enumerate(few.tokens[tower]["keep"][:-1]):
            entered = sum(int((b[layer + 1][0].alive & b[layer + 1][0].free).sum()) for b in batches)
            assert share == pytest.approx(entered / movable)
    few.check(at.masks.anatomy)


# --- thresholds that follow ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0.002, 0.0101, 0.3])
@pytest.mark.parametrize("rises", [lambda at: at / 0.01 - 1, lambda at: math.tanh(40 * (at - 0.01))])
def test_level(start, rises):
    tried = []

    def missing(at):
        tried.append(at)
        return rises(at)

    level(start, missing)
    assert abs(rises(tried[-1])) <= LEVEL or len(tried) == 8
    assert len(tried) <= 8
    assert abs(rises(tried[-1])) <= abs(rises(start))


def test_level_of_a_step():
    """What jumps is left on one side of the jump, and near it."""
    tried = []

    def missing(at):
        tried.append(at)
        return 1.0 if at > 0.01 else -1.0

    level(0.02, missing)
    assert len(tried) == 8
    assert abs(tried[-1] - 0.01) < 0.002


@pytest.mark.parametrize("name", ["clip", "blip_vqa", "llava"])
def test_as_many_tokens_stay(bench, name):
    """Heads that go change what tokens are worth; held, the threshold follows, and as many run as before."""
    one = bench(name)
    tokens, units = one.mode("vision tokens"), one.mode("vision parameters")
    found, budget = one.look()
    assert tokens.raise_threshold(found, budget, 0.1 * one.now.flops)
    tokens.settle()
    at, before = tokens.threshold, one.validation.running(one.batches)
    heads = [key for key in units.units if key[2] == "head"]
    for key in heads:  # all but one
        units.going[key][1:] = True
    units.soften(0.0)
    moved = one.validation.running(one.batches)
    tokens.hold(lambda: one.validation.running(one.batches), before)
    after = one.validation.running(one.batches)

    def number(load):
        return sum(float(entered.double().mean()) for entered in load.entered["vision"])

    assert abs(number(after) / number(before) - 1) <= abs(number(moved) / number(before) - 1)
    assert tokens.threshold != at or number(moved) == pytest.approx(number(before), rel=LEVEL)
    tokens.place(at)
    units.withdraw()
    again = one.validation.running(one.batches)
    assert all(torch.equal(a, b) for a, b in zip(again.entered["vision"], before.entered["vision"], strict=True))
