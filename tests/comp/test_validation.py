"""Accuracy and FLOPs under masks: as plain runs of the whole model give them, by replay or not."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest
import torch
from comp.eager import Eager, inputs
from comp.test_masks import batches_of
from models import tiny
from tokens import oracle
from tokens.test_planned import plan_of
from torch.utils.flop_counter import FlopCounterMode

import vlprune_ext as vp
from vlprune_ext.anatomy import describe
from vlprune_ext.anatomy.patch import Patches
from vlprune_ext.comp.masks import Masks
from vlprune_ext.comp.validation import Validation
from vlprune_ext.objectives import objective_named
from vlprune_ext.tokens.flow import Threshold

LIMITS = {"vision": Threshold(going=0.09, gone=0.07, soft=0.4), "text": Threshold(going=0.06, gone=0.05, soft=0.4)}
NAMES = ("clip", "blip_vqa", "llava")
ROWS = 5
# That run for three contexts: once what comes before the tower and its first block, then for each all from there on.
BLOCKS = {
    ("clip", "vision"): 1 + 3 * 4,
    ("clip", "text"): 1 + 3 * 3,
    ("blip_vqa", "vision"): 1 + 3 * (4 + 3 + 3),
    ("blip_vqa", "text"): 4 + 1 + 3 * (3 + 3),
    ("llava", "vision"): 1 + 3 * (3 + 4),  # one is not read
    ("llava", "text"): 4 + 1 + 3 * 4,
}


class Bench:
    def __init__(self, name, objective=None, size=2):
        self.model, self.patches = tiny.build(name), Patches()
        self.masks = Masks(describe(self.model))
        self.masks.install(self.patches)
        self.data = tiny.retrieval_data(name, self.model, ROWS)
        self.objective = objective_named(objective or ("contrastive" if name == "clip" else "lm_loss"))
        self.validation = Validation(self.masks, self.objective, self.data, size)


@pytest.fixture
def bench():
    made = []

    def build(*args, **kwargs):
        made.append(Bench(*args, **kwargs))
        return made[-1]

    yield build
    for one in made:
        one.patches.undo()


def units_of(name, tower, drop=0.0):
    """Masks of some units of a tower: a head and every third neuron count less."""
    anatomy, found = describe(oracle.model(name)), {}
    for layer, block in enumerate(anatomy.tower(tower).blocks):
        for kind, site in block.sites.items():
            mask = torch.ones(site.units)
            mask[layer % 2 :: 3 if kind == "neurons" else 5] = drop
            found[tower, layer, kind] = mask
    return found


@contextmanager
def within(at, units=(), thresholds=()):
    before = at.masks.units, at.masks.flow.thresholds
    at.masks.units = {**before[0], **dict(units)}
    at.masks.flow.thresholds = {**before[1], **dict(thresholds)}
    try:
        yield
    finally:
        at.masks.units, at.masks.flow.thresholds = before


def plainly(name, at, units, limits):
    """The metric of a whole batch, from eager models without anything of replay; what counts less does not count."""
    hard = {key: (mask == 1).float() for key, mask in units.items()}
    limits = {t: {"going": limit.going, "gone": limit.going, "soft": 0.0} for t, limit in limits.items()}
    eager = Eager(name, limits, votes=votes(name, hard), units=hard)
    if name != "clip":
        losses = []
        for batch in at.validation.inputs["vision"]:
            with eager.installed(batch), torch.no_grad():
                if name == "blip_vqa":
                    losses.append(at.objective.outputs(eager.anatomy, "vision", batch))
                    continue
                logits, labels = eager.model(**batch).logits[:, :-1], batch["labels"][:, 1:]
                loss = torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none", ignore_index=-100)
                losses.append(-loss.sum(1) / (labels >= 0).sum(1))
        return float(torch.cat(losses).mean())
    found = {}
    for tower, batches in at.validation.inputs.items():
        get = eager.model.get_image_features if tower == "vision" else eager.model.get_text_features
        rows = []
        for batch in batches:
            whole = {**inputs(name, len(next(iter(batch.values())))), **batch}
            with eager.installed(whole), torch.no_grad():
                rows.append(get(**batch).pooler_output)
        found[tower] = torch.nn.functional.normalize(torch.cat(rows), dim=-1)
    scores = eager.model.logit_scale.detach().exp() * found["vision"] @ found["text"].T
    return float(scores.log_softmax(1).diag().mean() + scores.log_softmax(0).diag().mean()) / 2


def votes(name, units):
    groups = 2 if name == "llava" else 1
    heads = {key[:2]: mask for key, mask in units.items() if key[2] == "head"}
    return {k: mask.repeat_interleave(groups if k[0] == "text" else 1) for k, mask in heads.items()}


@pytest.mark.parametrize("name", NAMES)
def test_now(bench, name):
    at = bench(name)
    units = units_of(name, "vision", 0.5) | units_of(name, "text")
    assert at.validation.now().accuracy == pytest.approx(plainly(name, at, {}, {}), rel=1e-4)
    with within(at, units, LIMITS):
        found = at.validation.now()
    assert found.accuracy == pytest.approx(plainly(name, at, units, LIMITS), rel=1e-4)
    assert found.flops < at.validation.dense.flops
    assert abs(found.accuracy - at.validation.now().accuracy) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_the_model_that_is_left(bench, name):
    """What masks say is what `evaluate` and torch's own count say of the applied plan."""
    at = bench(name)
    units = units_of(name, "vision") | units_of(name, "text")
    towers = ("text",) if name == "llava" else ("vision", "text")  # LLaVA: who takes patches out skips an unread block
    keep = {tower: {"keep": [0.8, 0.7, 0.5, 0.4]} for tower in towers}
    plan = plan_of(name, units, keep)
    thresholds = {tower: Threshold(keep=tuple(of["keep"])) for tower, of in plan.tokens.items()}
    with within(at, units, thresholds):
        found = at.validation.now()
    model = tiny.build(name)
    vp.apply(model, plan, round_to=1)
    (reported,) = vp.evaluate(model, at.data, at.objective).values() if name == "clip" else [None]
    reported = vp.evaluate(model, at.data, at.objective)["lm_loss"] if reported is None else reported
    assert found.accuracy == pytest.approx(-reported, rel=1e-5)
    batches = batches_of(name, model, ROWS, 1)[1]
    counted = torch.zeros(2, dtype=torch.float64)
    for place, one in enumerate((oracle.model(name), model)):
        with vp.prune_tokens(one), torch.no_grad():
            for tower, of_tower in batches.items():
                for batch in of_tower:
                    batch = without_padding(name, batch)
                    with FlopCounterMode(display=False) as counter, counts_cpu_attention(counter):
                        at.objective.outputs(describe(one), tower, batch)
                    counted[place] += counter.get_total_flops() / ROWS
    assert found.flops / at.validation.dense.flops == pytest.approx(float(counted[1] / counted[0]), rel=0.01)
    assert float(counted[1] / counted[0]) < 0.8


def without_padding(name, one):
    """A batch of one sample."""
    if "attention_mask" not in one or name == "clip":
        return one
    valid = one["attention_mask"][0].bool()
    shown = one | {key: one[key][:, valid] for key in ("input_ids", "attention_mask")}
    return shown | {"labels": one["labels"][:, valid if name == "llava" else one["labels"][0] >= 0]}


@contextmanager
def counts_cpu_attention(counter):
    """What torch does not count on a CPU: products of queries and keys, and of what comes of them and values."""
    plain = torch.nn.functional.scaled_dot_product_attention

    def counted(query, key, value, *args, **kwargs):
        inner = FlopCounterMode(display=False)
        with inner:
            out = plain(query, key, value, *args, **kwargs)
        if inner.get_total_flops() == 0:
            b, h, tq, d = query.shape
            counter.flop_counts["Global"]["attention"] += 4 * b * h * tq * key.shape[2] * d
        return out

    torch.nn.functional.scaled_dot_product_attention = counted
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = plain


def block_runs(model, run):
    """(what a run gives, how many rows went through blocks)"""
    rows = 0
    with Patches() as patches:
        for tower in describe(model).towers.values():
            for block in tower.blocks:
                kind = block.sites["neurons"].out

                def count(_, args):
                    nonlocal rows
                    rows += len(args[0])

                patches.pre_hook(kind, count)
        return run(), rows


@pytest.mark.parametrize("before", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize(
    ("name", "towers"),
    [
        ("clip", ("vision",)),
        ("clip", ("text",)),
        ("clip", ("vision", "text")),
        ("blip_vqa", ("vision",)),
        ("blip_vqa", ("text",)),
        ("blip_vqa", ("text", "decoder")),
        ("llava", ("vision",)),
        ("llava", ("text",)),
        ("llava", ("vision", "text")),
    ],
)
def test_trials(bench, name, towers, before):
    """Each is what the model is within its context, and nothing is left of it."""
    at = bench(name)
    if before:
        at.masks.units = {("vision", 1, "neurons"): torch.ones(64).index_fill_(0, torch.arange(0, 40, 2), 0.5)}
        at.masks.flow.thresholds = {"vision": Threshold(going=0.07, gone=0.06, soft=0.5)}
    units = {key: mask for tower in towers for key, mask in units_of(name, tower, 0.5).items()}
    limits = {tower: LIMITS[tower] for tower in towers if tower != "decoder"}
    contexts = [lambda: within(at, units), lambda: within(at, (), limits), lambda: within(at, units, limits)]
    expected = []
    for context in contexts:
        with context():
            measured, whole = block_runs(at.model, at.validation.now)
            expected.append(measured)
    first = at.validation.now()
    state, hooks = (at.masks.units, dict(at.masks.flow.thresholds)), [len(m._forward_hooks) for m in at.model.modules()]
    found, runs = block_runs(at.model, lambda: at.validation.trials(towers, contexts))
    for one, wanted in zip(found, expected, strict=True):
        assert one.accuracy == pytest.approx(wanted.accuracy, rel=1e-6)
        assert one.flops == wanted.flops
        for tower, counts in wanted.load.entered.items():
            assert all(torch.equal(a, b) for a, b in zip(one.load.entered[tower], counts, strict=True))
    assert len({one.accuracy for one in found} | {first.accuracy}) == 4
    assert runs == (3 * whole if name == "clip" and len(towers) == 2 else ROWS * BLOCKS[name, towers[0]])
    assert runs <= 3 * whole + ROWS
    assert (at.masks.units, at.masks.flow.thresholds) == state
    assert [len(m._forward_hooks) for m in at.model.modules()] == hooks
    (same,) = at.validation.trials(towers[:1], [nullcontext])
    assert same.accuracy == pytest.approx(first.accuracy, rel=1e-6)
    assert same.flops == first.flops
    again = at.validation.now()
    assert (again.accuracy, again.flops) == (first.accuracy, first.flops)


def test_a_trial_that_fails(bench):
    at = bench("blip_vqa")
    first = at.validation.now()

    @contextmanager
    def broken():
        with within(at, units_of("blip_vqa", "text")):
            raise RuntimeError("from inside")
            yield

    with pytest.raises(RuntimeError, match="from inside"):
        at.validation.trials(("text",), [lambda: within(at, (), LIMITS), broken])
    again = at.validation.now()
    assert (again.accuracy, again.flops) == (first.accuracy, first.flops)
