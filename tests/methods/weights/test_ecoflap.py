"""ECoFLaP: how sparse each matrix becomes, and that what is planned is what happens, on disk too."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers
from models import tiny
from models.tiny import digest

import vlprune_ext as vp
from vlprune_ext.anatomy import describe
from vlprune_ext.methods.weights.ecoflap import ESTIMATORS, GRANULARITIES
from vlprune_ext.objectives import Contrastive, Retrieval, objective_named
from vlprune_ext.plan import Plan
from vlprune_ext.weights.allocation import allocate, keep_count
from vlprune_ext.weights.criteria import CRITERIA
from vlprune_ext.weights.layerwise import used_matrices
from vlprune_ext.weights.matrices import matrices
from vlprune_ext.weights.sensitivity import first_order, zeroth_order

QUICK = {"draws": 1, "batch_size": 8}
SAVED = ("clip", "llava", "t5", "blip2_opt")


def load(name, n=6):
    model = tiny.build(name)
    return model, tiny.retrieval_data(name, model, n)


@pytest.fixture(scope="module")
def clip():
    """Only for plans: none of them writes a weight."""
    return load("clip", 4)


@pytest.fixture(scope="module")
def llava():
    return load("llava", 2)


def chosen_of(model, data):
    anatomy = describe(model)
    return used_matrices(anatomy, objective_named(None, anatomy), data)


def groups_of(chosen, granularity):
    """key -> its matrices."""
    key = {
        "layer": lambda m: m.name,
        "block": lambda m: (m.tower, m.layer),
        "model": lambda m: m.tower,
    }[granularity]
    groups: dict = {}
    for matrix in chosen:
        groups.setdefault(key(matrix), []).append(matrix)
    return groups


def kept(plan, chosen, granularity):
    """(kept weights, size, share) of each group; everything in a group has one sparsity."""
    result = {}
    for key, members in groups_of(chosen, granularity).items():
        (share,) = {plan.sparsity[m.name] for m in members}
        size = sum(m.weight.numel() for m in members)
        result[key] = (size * (1 - share), size, share)
    return result


# --- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_tower", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_budgets_are_met_to_the_weight(clip, estimator, granularity, per_tower):
    model, data = clip
    chosen = chosen_of(model, data)
    sparsity = 0.637
    method = vp.ECoFLaP(sparsity=sparsity, estimator=estimator, granularity=granularity, per_tower=per_tower, **QUICK)
    plan = method.plan(model, data)
    plan.check(describe(model))
    assert list(plan.sparsity) == [matrix.name for matrix in chosen]
    if estimator == "magnitude":
        granularity = "layer"  # always
    found = kept(plan, chosen, granularity)
    members = groups_of(chosen, granularity)
    for towers in [("vision",), ("text",)] if per_tower else [("vision", "text")]:
        own = [found[key] for key in found if members[key][0].tower in towers]
        budget = keep_count(sum(size for _, size, _ in own), sparsity)
        if estimator == "uniform":  # not a whole number of each group
            assert math.floor(math.fsum(keep for keep, _, _ in own) + 1e-6) == budget
            continue
        assert all(abs(keep - round(keep)) < 1e-6 for keep, _, _ in own)
        assert sum(round(keep) for keep, _, _ in own) == budget
    # Floors are whole numbers, rounded down: less than one weight beyond.
    assert estimator == "magnitude" or all(size * (share - sparsity - 0.1) < 1 for _, size, share in found.values())
    if estimator == "uniform" or (granularity == "model" and per_tower):
        assert all(abs(share - sparsity) < 1e-3 for _, _, share in found.values())
    else:
        assert len({share for _, _, share in found.values()}) > 1


@pytest.mark.parametrize(
    ("estimator", "most"),
    [("zeroth-order", 0.52), ("outliers", 0.5), ("outliers", 0.52), *(("first-order", p) for p in (0.5, 0.52, 0.7))],
)
def test_no_group_exceeds_the_most(llava, estimator, most):
    model, data = llava
    chosen = chosen_of(model, data)
    fields = {"estimator": estimator, "granularity": "layer", "outlier_range": 0.4, **QUICK}
    plan = vp.ECoFLaP(max_sparsity=most, **fields).plan(model, data)
    found = kept(plan, chosen, "layer").values()
    assert all(size * (share - most) < 1 for _, size, share in found)
    assert sum(round(keep) for keep, _, _ in found) == keep_count(sum(size for _, size, _ in found), 0.5)
    assert max(share for _, _, share in found) == pytest.approx(most, abs=2e-3)


def test_no_sparsity_at_all():
    model, data = load("clip")
    before = digest(model)
    for estimator in ESTIMATORS:
        plan = vp.ECoFLaP(sparsity=0.0, estimator=estimator, **QUICK).plan(model, data)
        assert set(plan.sparsity.values()) == {0.0}
    vp.apply(model, plan, data)
    assert digest(model) == before


# --- importance ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("importance", "aggregate"), [("norm", "sum"), ("norm", "avg"), ("weighted", "avg"), ("squared", "sum")]
)
@pytest.mark.parametrize("estimator", ["zeroth-order", "first-order"])
def test_shares_follow_importance(clip, estimator, importance, aggregate):
    model, data = clip
    anatomy, objective = describe(model), Contrastive()
    chosen = chosen_of(model, data)
    if estimator == "zeroth-order":
        found = zeroth_order(anatomy, objective, data, chosen, draws=1, eps=0.05, seed=3, batch_size=8)
    else:
        found = first_order(anatomy, objective, data, chosen, batch_size=8)
    norms = torch.stack([matrix.weight.detach().double().square().sum() for matrix in chosen])
    value = {"norm": found.slope, "weighted": found.weighted, "squared": norms * found.slope.square()}
    of_matrix = dict(zip([matrix.name for matrix in chosen], value[importance].tolist(), strict=True))
    sizes, totals = [], []
    for members in groups_of(chosen, "block").values():
        sizes.append(sum(m.weight.numel() for m in members))
        totals.append(sum(of_matrix[m.name] for m in members) / (sizes[-1] if aggregate == "avg" else 1))
    expected = allocate(totals, sizes, keep_count(sum(sizes), 0.6), [keep_count(size, 0.75) for size in sizes])
    method = vp.ECoFLaP(
        sparsity=0.6,
        max_sparsity=0.75,
        estimator=estimator,
        granularity="block",
        importance=importance,
        aggregate=aggregate,
        draws=1,
        eps=0.05,
        seed=3,
        batch_size=8,
    )
    plan = method.plan(model, data)
    mine = [round(keep) for keep, _, _ in kept(plan, chosen, "block").values()]
    assert all(abs(a - b) <= 2 for a, b in zip(mine, expected, strict=True))  # of thousands; runs differ in rounding
    mine = dict(zip(method.scores.parameters, method.scores.value.tolist(), strict=True))
    assert mine == pytest.approx(of_matrix, rel=1e-3, abs=1e-6)


def test_what_shares_a_sparsity_by_default(clip):
    """Matrices; for OWL blocks, as published."""
    model, data = clip
    for estimator, usual in (("first-order", "layer"), ("outliers", "block")):
        plans = [vp.ECoFLaP(estimator=estimator, granularity=g, **QUICK).plan(model, data) for g in (None, usual)]
        assert plans[0].sparsity == plans[1].sparsity
        found = kept(plans[0], chosen_of(model, data), usual)
        assert len({share for _, _, share in found.values()}) > 1


def test_seeds(clip):
    model, data = clip
    plans = [vp.ECoFLaP(seed=seed, towers=["text"], **QUICK).plan(model, data).sparsity for seed in (0, 0, 1)]
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]


def outlier_ratio(model, data, matrix, factor):
    """Of |W| times the norms of what enters, in one run of the dense model."""
    seen = []
    handle = matrix.module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        objective = Contrastive()
        for batch in objective.batches(describe(model), matrix.tower, data, 8):
            objective.outputs(describe(model), matrix.tower, batch)
    handle.remove()
    mask = None if matrix.tower == "vision" else batch["attention_mask"].bool()
    (x,) = seen
    x = x.flatten(0, -2) if mask is None else x[mask]
    scores = matrix.weight.detach().abs() * x.square().sum(0).sqrt()
    return (scores > factor * scores.mean()).double().mean().item()


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_outliers_by_the_paper(clip, sparsity):
    """Within lambda of the target, higher where there are fewer, and on average the target (arXiv 2310.05175)."""
    model, data = clip
    chosen = chosen_of(model, data)
    plan = vp.ECoFLaP(
        sparsity=sparsity, max_sparsity=0.95, estimator="outliers", granularity="layer", outlier_factor=3.0, **QUICK
    ).plan(model, data)
    ratio = torch.tensor([outlier_ratio(model, data, m, 3.0) for m in chosen], dtype=torch.float64)
    sizes = torch.tensor([m.weight.numel() for m in chosen], dtype=torch.float64)
    above = 0.16 * (ratio - ratio.min()) / (ratio.max() - ratio.min())
    expected = sparsity - above + (above * sizes).sum() / sizes.sum()
    mine = torch.tensor(list(plan.sparsity.values()), dtype=torch.float64)
    torch.testing.assert_close(mine, expected, rtol=0, atol=2e-3)  # one weight of the smallest matrix
    assert mine.max() - mine.min() == pytest.approx(0.16, abs=2e-3)
    assert ((1 - mine) * sizes).sum().round() == keep_count(int(sizes.sum()), sparsity)


def test_dense_models_are_what_outliers_are_counted_in(clip):
    model, data = clip
    data = data.subset(3)  # a copy
    data.images["pixel_values"][2] = torch.nan
    with pytest.raises(ValueError, match="not finite on row 2 of tower 'vision'"):
        vp.ECoFLaP(estimator="outliers", **QUICK).plan(model, data)


# --- global magnitude ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_tower", [False, True])
def test_global_magnitude_is_one_stable_sort(per_tower):
    """Of all weights of the model, or of a tower, in one row."""
    model, data = load("clip")
    chosen = chosen_of(model, data)
    parts = [[m for m in chosen if m.tower == tower] for tower in ("vision", "text")] if per_tower else [chosen]
    expected = {}
    for part in parts:
        every = torch.cat([matrix.weight.detach().abs().flatten() for matrix in part])
        gone = torch.zeros(len(every), dtype=torch.bool)
        gone[every.sort(stable=True).indices[: len(every) - keep_count(len(every), 0.6)]] = True
        for matrix, mask in zip(part, gone.split([m.weight.numel() for m in part]), strict=True):
            expected[matrix.name] = matrix.weight.detach().masked_fill(mask.view_as(matrix.weight), 0)
    fields = {"estimator": "magnitude", "criterion": "magnitude", "scope": "matrix", "per_tower": per_tower}
    vp.apply(model, vp.ECoFLaP(sparsity=0.6, **fields).plan(model, data), data)
    assert all(torch.equal(matrix.weight, expected[matrix.name]) for matrix in chosen)


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["zeroth-order", "first-order", "outliers"])
def test_scores_serve_every_sparsity(clip, estimator, tmp_path):
    model, data = clip
    fields = {"estimator": estimator, "towers": ("text",), "draws": 2, "batch_size": 8}
    scores = vp.ECoFLaP(**fields).score(model, data)
    chosen = [matrix for matrix in chosen_of(model, data) if matrix.tower == "text"]
    assert scores.parameters == [matrix.name for matrix in chosen]
    assert scores.cost.tolist() == [matrix.weight.numel() for matrix in chosen]
    assert [module[:3] for module in scores.modules] == [("text", "matrix", matrix.layer) for matrix in chosen]
    assert len(set(scores.modules)) == len(chosen)
    assert (scores.block_runs > 0) == (estimator == "zeroth-order") == bool(scores.error.isfinite().all())
    for ending in ("json", "csv"):
        scores.save(tmp_path / f"scores.{ending}")
        again = vp.Scores.load(tmp_path / f"scores.{ending}")
        for sparsity in (0.4, 0.7):
            method = vp.ECoFLaP(sparsity=sparsity, **fields)
            with_scores = method.plan(model, data, scores=again)
            assert method.scores is again
            assert with_scores.sparsity == vp.ECoFLaP(sparsity=sparsity, **fields).plan(model, data).sparsity
    with pytest.raises(ValueError, match=r"scores: of 18 matrices, expected those of the 42 that objective"):
        vp.ECoFLaP(estimator=estimator).plan(model, data, scores=scores)


def test_some_estimators_have_no_scores(clip):
    for estimator in ("uniform", "magnitude"):
        with pytest.raises(ValueError, match=f"estimator: '{estimator}' has no scores"):
            vp.ECoFLaP(estimator=estimator).score(*clip)


def test_errors_shrink_with_draws(clip):
    """The spread over directions, by the square root of their number."""
    model, data = clip
    fields = {"towers": ("text",), "batch_size": 8}
    few, many = (vp.ECoFLaP(draws=draws, **fields).score(model, data) for draws in (8, 32))
    ratio = (few.error / few.value).median() / (many.error / many.value).median()
    assert 1.4 < ratio < 2.8
    one = vp.ECoFLaP(draws=1, **fields).score(model, data)
    assert one.error.isnan().all()


# --- what a plan is --------------------------------------------------------------------------------------------------


def hooks(model) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize(
    ("name", "estimator"),
    [(name, estimator) for name in ("llava", "t5") for estimator in ("zeroth-order", "first-order", "outliers")]
    + [("clip", "zeroth-order"), ("blip_itr", "zeroth-order"), ("blip2_opt", "first-order")],
)
def test_planning_writes_nothing(name, estimator):
    model, data = load(name, 3)
    tiny.outputs(name, model, tiny.inputs(name, model))  # transformers sets up hooks of its own in the first run
    own = hooks(model)
    model.train()
    before, flags = digest(model), [p.requires_grad for p in model.parameters()]
    fields = {"batch_size": 2, "draws": 1, "granularity": "model"}
    if estimator == "zeroth-order":
        fields["towers"] = [list(describe(model).towers)[-1]]
    plan = vp.ECoFLaP(estimator=estimator, **fields).plan(model, data)
    assert digest(model) == before
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert hooks(model) == own
    assert not any("qformer" in key or "crossattention" in key for key in plan.sparsity)


def test_plans_survive_a_file(clip, tmp_path):
    model, data = clip
    fields = {"estimator": "first-order", "criterion": "ria", "scope": "matrix"}
    plan = vp.ECoFLaP(towers=("text",), **fields).plan(model, data)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert json.loads(again.to_json()) == json.loads(plan.to_json())
    assert again.sparsity == plan.sparsity  # to the last bit
    assert again.selection == plan.selection
    copies = [load("clip")[0] for _ in range(2)]
    for copy, which in zip(copies, (plan, again), strict=True):
        vp.apply(copy, which, data)
    assert digest(copies[0]) == digest(copies[1])
    other = tiny.build("blip_itr")
    with pytest.raises(ValueError, match="made for another model"):
        vp.apply(other, again, data)


def test_describe(clip):
    model, data = clip
    method = vp.ECoFLaP(towers=("text",), objective=Contrastive("margin"), estimator="first-order", **QUICK)
    before = method.describe()
    plan = method.plan(model, data)
    assert method.describe() == before == json.loads(json.dumps(before))
    assert before["name"] == method.name == "ecoflap"
    assert before["objective"] == "margin"
    assert before["towers"] == ["text"]
    assert before["sparsity"] == 0.5
    assert "scores" not in before
    assert plan.method == before
    assert plan.selection == {
        "criterion": "wanda",
        "pattern": "unstructured",
        "scope": None,
        "damping": 0.01,
        "dsnot": 0,
        "batch_size": 8,
        "objective": "margin",
    }
    assert vp.ECoFLaP(estimator="uniform").plan(model, data).method["objective"] == "contrastive"


@pytest.mark.parametrize("towers", [None, ("text",), ["text", "vision"]])
def test_towers(clip, towers):
    model, data = clip
    plan = vp.ECoFLaP(estimator="uniform", towers=towers).plan(model, data)
    expected = [matrix.name for matrix in matrices(describe(model), towers)]
    assert list(plan.sparsity) == expected


def test_an_objective_without_a_name_of_its_own():
    """Recall at 3: the plan is carried out on what the model's own objective feeds it."""
    model, data = load("clip")
    plan = vp.ECoFLaP(objective=Retrieval(at=(3,)), estimator="uniform").plan(model, data)
    vp.apply(model, Plan.from_dict(json.loads(plan.to_json())), data)
    assert all((matrix.weight == 0).any() for matrix in matrices(describe(model)))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_patterns_fix_every_sparsity(estimator):
    model, data = load("clip")
    plan = vp.ECoFLaP(sparsity=0.8, estimator=estimator, pattern="2:4").plan(model, data)
    assert set(plan.sparsity.values()) == {0.5}
    vp.apply(model, plan, data)
    for matrix in matrices(describe(model)):
        assert ((matrix.weight.view(-1, 4) == 0).sum(1) == 2).all(), matrix


# --- carrying it out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", CRITERIA)
def test_shares_of_zeros(criterion):
    model, data = load("clip")
    plan = vp.ECoFLaP(sparsity=0.6, criterion=criterion, estimator="outliers").plan(model, data)
    vp.apply(model, plan, data)
    for matrix in matrices(describe(model)):
        out, width = matrix.weight.shape
        # A row rounds to the nearest whole number; SparseGPT and matrices as a whole lie nearer.
        share = (matrix.weight == 0).float().mean().item()
        assert share == pytest.approx(plan.sparsity[matrix.name], abs=0.5 / width + 1e-6)
        if criterion == "sparsegpt":
            assert share == pytest.approx(plan.sparsity[matrix.name], abs=0.5 / (out * width) + 1e-6)


@pytest.mark.parametrize("name", SAVED)
def test_saved_and_loaded(name, tmp_path):
    """A model with zeros is an ordinary model: transformers alone loads it."""
    model, data = load(name)
    fields = {"estimator": "first-order", "granularity": "block", "batch_size": 4}
    plan = vp.ECoFLaP(sparsity=0.6, **fields).plan(model, data)
    vp.save_pruned(vp.apply(model, plan, data), tmp_path / "out", data=data)
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert record["loads_with"] == "transformers from_pretrained"
    values = tiny.inputs(name, model, 4)
    expected = tiny.outputs(name, model, values)
    zeros = {matrix.name: matrix.weight == 0 for matrix in matrices(describe(model))}
    assert all(mask.any() for mask in zeros.values())
    transformers.logging.disable_progress_bar()
    plain = type(model).from_pretrained(tmp_path / "out").eval()
    ours = vp.load_pruned(tmp_path / "out")
    transformers.logging.enable_progress_bar()
    for again in (plain, ours):
        parameters = dict(again.named_parameters())
        assert all(torch.equal(parameters[key] == 0, mask) for key, mask in zeros.items())
        assert torch.equal(tiny.outputs(name, again, values), expected)
    assert ours.vlprune == model.vlprune
    assert ours.vlprune["plans"][0]["plan"]["sparsity"] == plan.sparsity
    assert ours.vlprune["plans"][0]["data"] == {"name": data.name, "hash": data.hash}


def test_prune_measures(tmp_path):
    model, data = load("clip", 12)
    numbers = vp.measure(model, data, repeats=1)
    result = vp.prune(model, data, vp.ECoFLaP(estimator="outliers"), evaluation=data)
    assert {"recall@1", "params", "flops", "latency_ms"} <= set(result.before)
    assert result.before["params"] == result.after["params"] == numbers["params"]
    assert result.after["recall@1"] == vp.evaluate(model, data)["recall@1"]
    result.save(tmp_path / "out")
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert record["method"] == result.method
    assert record["loads_with"] == "transformers from_pretrained"
    assert result.scores.parameters == list(result.plan.sparsity)
    assert result.method == result.plan.method
    assert result.data == {"name": data.name, "split": data.split, "hash": data.hash, "images": 12}
    again = load("clip", 12)[0]
    assert vp.prune(again, data, result.plan).plan is result.plan
    assert digest(again) == digest(model)


def test_prune_weights_is_uniform():
    model, data = load("clip")
    assert vp.prune_weights(model, data, 0.75, criterion="magnitude", towers=["text"]) is model
    for matrix in matrices(describe(model)):
        gone = 0.75 if matrix.tower == "text" else 0
        assert ((matrix.weight == 0).sum(1) == gone * matrix.weight.shape[1]).all()
    assert model.vlprune["plans"][0]["plan"]["method"]["estimator"] == "uniform"


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity: 1.0, expected a share in \[0, 1\)"),
        ({"sparsity": -0.1}, "sparsity: -0.1"),
        ({"sparsity": math.nan}, "sparsity: nan"),
        ({"max_sparsity": 0.4}, r"max_sparsity: 0.4, expected a share in \[0.5, 1\]"),
        ({"max_sparsity": 1.1}, "max_sparsity: 1.1"),
        (
            {"estimator": "guess"},
            "estimator: 'guess', expected one of zeroth-order, first-order, outliers, magnitude, uniform",
        ),
        ({"importance": "l1"}, "importance: 'l1', expected one of norm, weighted, squared"),
        ({"granularity": "row"}, "granularity: 'row', expected one of None, layer, block, model"),
        ({"aggregate": "max"}, "aggregate: 'max', expected one of sum, avg"),
        ({"draws": 0}, "draws: 0, expected at least 1"),
        ({"samples_per_loss": 0}, "samples_per_loss: 0"),
        ({"eps": 0.0}, "eps: 0.0, expected a number above 0"),
        ({"eps": math.inf}, "eps: inf"),
        ({"outlier_factor": -1.0}, "outlier_factor: -1.0, expected a number of at least 0"),
        ({"outlier_range": math.nan}, "outlier_range: nan"),
        ({"criterion": "x"}, "criterion: 'x'"),
        ({"pattern": "4:4"}, "pattern: '4:4'"),
        ({"scope": "x"}, "scope: 'x'"),
        ({"damping": 2.0}, "damping: 2.0"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"objective": "x"}, "objective: 'x'"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        vp.ECoFLaP(**fields)


class Quantised(torch.nn.Module):
    """Not a Linear, as the layers of some quantised models."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight, self.bias)


def test_a_tower_of_quantised_weights_is_refused_and_another_pruned():
    model, data = load("clip")
    for block in model.text_model.encoder.layers:
        for path, module in list(block.named_modules()):
            if isinstance(module, torch.nn.Linear):
                block.set_submodule(path, Quantised(module))
    for towers in (None, ("text",)):
        with pytest.raises(ValueError, match=r"text_model\.encoder\.layers\.0 is a .*Quantised, expected a torch\.nn"):
            vp.ECoFLaP(towers=towers).plan(model, data)
    plan = vp.ECoFLaP(towers=("vision",), estimator="first-order").plan(model, data)
    assert set(plan.sparsity) == {matrix.name for matrix in matrices(describe(model), ["vision"])}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"towers": ("audio",)}, "towers: 'audio', expected some of vision, text"),
        ({"objective": "lm_loss"}, "needs a model that predicts tokens"),
        ({"objective": "recall@1", "estimator": "first-order"}, "'recall@1' has no gradient"),
        ({"pattern": "1:5"}, "pattern: 1:5, but vision_model"),
    ],
)
def test_what_a_model_cannot_give(clip, fields, message):
    model, data = clip
    with pytest.raises(ValueError, match=message):
        vp.ECoFLaP(**fields).plan(model, data)


@pytest.mark.parametrize("estimator", ["zeroth-order", "first-order", "outliers", "uniform"])
def test_weights_that_are_not_finite(estimator):
    model, data = load("clip")
    with torch.no_grad():
        model.vision_model.encoder.layers[2].self_attn.v_proj.weight[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"^vision_model.encoder.layers.2.self_attn.v_proj.weight\[1, 2\] is nan"):
        vp.ECoFLaP(estimator=estimator, **QUICK).plan(model, data)


@pytest.mark.parametrize("estimator", ["zeroth-order", "first-order", "outliers"])
def test_losses_that_are_not_finite(estimator):
    model, data = load("llava", 4)
    data.images["pixel_values"][3] = torch.inf
    with pytest.raises(ValueError, match=r"not finite (for sample|on row) 3"):
        vp.ECoFLaP(estimator=estimator, towers=("text",), granularity="model", **QUICK).plan(model, data)
