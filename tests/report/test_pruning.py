"""The report: what it shows, that it stands alone, and that it can be written again from a saved model."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from vlprune_ext.checkpoint.record import Record, load_record
from vlprune_ext.plan import Module, Plan, Scores
from vlprune_ext.report import pruning as report
from vlprune_ext.report.figures.plans import cut, sparsity
from vlprune_ext.report.figures.quality import quality_against_savings
from vlprune_ext.report.figures.scores import heat_map, names, place, ranking, removed_shares
from vlprune_ext.report.figures.style import number, svg
from vlprune_ext.report.pruning import render, write_report
from vlprune_ext.report.tables import comparison_table, extremes, indistinguishable
from vlprune_ext.report.words import change, cut_summary, duration, metric, si

NUMBERS = {"recall@1": 0.919, "image_to_text_recall@1": 0.92, "params": 2_053_505, "flops": 119_000_000}


def make_record(layers: dict[str, int], heads: int = 4, groups: int = 4, group: int = 8, samples: int = 50) -> Record:
    """Scores that grow with the position, so that the lowest half is known; a few are negative."""
    generator = torch.Generator().manual_seed(0)
    shape = {tower: [{"head": heads, "neurons": groups * group}] * count for tower, count in layers.items()}
    modules = [
        Module(tower, kind, layer, index)
        for tower, count in layers.items()
        for layer in range(count)
        for kind, many in (("head", heads), ("neurons", groups))
        for index in range(many)
    ]
    value = torch.linspace(-0.1, 1.0, len(modules), dtype=torch.float64)
    drops = value[:, None].float() + 0.05 * torch.randn(len(modules), samples, generator=generator)
    scores = Scores(
        modules=modules,
        value=value,
        error=torch.full((len(modules),), 0.02, dtype=torch.float64),
        count=torch.full((len(modules),), samples),
        cost=torch.full((len(modules),), 1000.0, dtype=torch.float64),
        objective="contrastive",
        dense=-0.25,
        neurons={
            tower: {i: [list(range(g * group, (g + 1) * group)) for g in range(groups)] for i in range(count)}
            for tower, count in layers.items()
        },
        samples=drops,
        block_runs=1234,
    )
    plan = Plan(shape=shape)
    for i in scores.ranking()[: len(modules) // 2]:
        m = modules[i]
        plan.add(
            m.tower, m.kind, m.layer, scores.neurons[m.tower][m.layer][m.index] if m.kind == "neurons" else [m.index]
        )
    after = {**NUMBERS, "recall@1": 0.868, "params": 1_100_000}
    data = {"name": "digits", "split": "calibration", "hash": "abc123"}
    return Record(plan, scores, NUMBERS, after, {"name": "mope", "keep_heads": 0.5, "towers": None}, data)


@pytest.fixture
def record() -> Record:
    return make_record({"vision": 3, "text": 2})


class _Balance(HTMLParser):
    """Every tag that is opened is closed, in order."""

    VOID = ("meta", "br", "link", "img", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.ids += [value for key, value in attrs if key == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.ids += [value for key, value in attrs if key == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def _parse(page: str) -> _Balance:
    parser = _Balance()
    parser.feed(page)
    assert parser.open == []
    return parser


def test_page_is_well_formed_and_loads_nothing(record):
    page = render(record)
    assert page == render(record)
    parser = _parse(page)
    assert len(parser.ids) == len(set(parser.ids))
    assert page.count("<svg") == page.count('role="img" aria-label="') == 5
    page = re.sub(r' xmlns(:\w+)?="[^"]*"', "", page)  # names, not addresses
    assert not re.search(r"<script|<link|<iframe|\bsrc=|@import|\bon\w+=", page)
    assert "http://" not in page
    assert "https://" not in page
    targets = re.findall(r"url\(#([^)]*)\)", page) + re.findall(r'href="#([^"]*)"', page)
    assert targets
    assert set(targets) <= set(parser.ids)
    assert page.count("url(") == page.count("url(#")


def test_page_shows_the_numbers_the_method_and_the_data(record, charts):
    text = " ".join(_parse(render(record, comparisons={"Random": {**NUMBERS, "recall@1": 0.452}})).text)
    for expected in ("0.919", "0.868", "2.05 M", "1.10 M", "119 M", "Random", "0.452", "MoPE", "keep_heads", "abc123"):
        assert expected in text
    assert "image to text" not in text
    assert "MoPE removed" in text
    assert "recall@1 went from 0.919 to 0.868" in text


def test_titles_are_escaped(record, charts):
    record.scores = None
    page = render(record, title="<b>&", comparisons={"<i>x</i>": NUMBERS})
    assert "<b>&" not in page
    assert "<i>x" not in page


def test_write_report_replaces_the_file_whole(tmp_path, record, charts):
    record.scores = None
    path = tmp_path / "r.html"
    path.write_text("old")
    write_report(path, record)
    assert path.read_text(encoding="utf-8") == render(record)
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="absent"):
        write_report(tmp_path / "absent" / "r.html", record)


def test_heat_map_shows_values_errors_and_hatches_what_goes(record):
    vision, text, colours = heat_map(record.scores, record.plan, kind="head").axes
    assert [axes.get_title("left") for axes in (vision, text)] == [
        "vision, in units of 0.001",
        "text, in units of 0.001",
    ]
    assert vision.images[0].get_array().shape == (3, 4)
    assert vision.images[0].get_array()[0, 0] == pytest.approx(-0.1)
    assert vision.texts[0].get_text() == "−100\n±20"  # noqa: RUF001
    for tower, axes in (("vision", vision), ("text", text)):
        hatched = sum((steps.get_data().values - steps.get_data().baseline).sum() for steps in axes.patches)
        assert hatched == sum(len(heads) for heads in record.plan.heads.get(tower, {}).values())
    assert colours.get_xlim()[0] == pytest.approx(-0.1)
    with pytest.raises(ValueError, match="nothing of kind 'layer'"):
        heat_map(record.scores, kind="layer")


def test_heat_map_without_room_for_numbers_dots_what_may_be_zero():
    record = make_record({"vision": 2}, groups=20)
    axes = heat_map(record.scores, kind="neurons").axes[0]
    assert not axes.texts
    expected = sum(abs(value) <= 1.96 * 0.02 for module, value in record.scores if module.kind == "neurons")
    assert len(axes.lines[0].get_xdata()) == expected > 0


def test_ranking_draws_the_cut_only_where_there_is_one(record, charts):
    axes = ranking(record.scores, record.plan, kind="head").axes[0]
    assert [text.get_text() for text in axes.texts] == [" cut"]
    kept, gone, errors = (steps.get_data() for steps in axes.patches)
    assert sorted(gone.values) == list(gone.values) == pytest.approx(list(errors.values - 0.02))
    assert (kept.values == gone.baseline).all()
    assert axes.get_xticklabels()[0].get_text() == "vision.0.head0"
    assert "not simply the lowest" not in render(record)
    best = record.scores.modules[record.scores.ranking(kind="head")[-1]]
    record.plan.add(best.tower, "head", best.layer, [best.index])
    assert not ranking(record.scores, record.plan, kind="head").axes[0].texts
    assert "not simply the lowest" in render(record)


def test_charts_without_a_plan_and_with_all_scores_equal():
    record = make_record({"vision": 1})
    record.scores.value = torch.zeros_like(record.scores.value)
    record.scores.error = torch.zeros_like(record.scores.error)
    assert "nan" not in svg(ranking(record.scores, kind="head")) + svg(heat_map(record.scores))


def test_cut_counts_units_and_whole_layers(record, charts):
    record.plan.add("vision", "layer", 2, [])
    kept = [4 - len(record.plan.removed("vision", "head", layer)) for layer in (0, 1)] + [0]
    axes = cut(record.plan).axes[0]
    assert axes.get_title("left") == f"vision: {sum(kept)} of 12 heads kept"
    assert [text.get_text() for text in axes.texts] == list(map(str, kept))
    assert "Whole layers removed: vision 2." in render(record)


def test_removed_shares_count_parts_of_groups(record):
    record.plan.neurons = {"vision": {0: [0, 1, 8, 9, 10, 11, 12, 13, 14, 15]}}
    places = [record.scores.modules.index(Module("vision", "neurons", 0, g)) for g in range(4)]
    for _ in range(2):
        shares = removed_shares(record.scores, record.plan)
        assert [shares[i] for i in places] == [0.25, 1.0, 0.0, 0.0]
        record.scores.neurons = {}  # as read from CSV
    assert set(removed_shares(record.scores, None)) == {0.0}


def test_large_models_make_a_page_of_sensible_size():
    page = render(make_record({"vision": 48}, heads=25, groups=100, group=64, samples=2))
    _parse(page)
    assert len(page) < 1_500_000


def test_a_result_without_scores_or_numbers_still_makes_a_page(record):
    bare = Record(plan=Plan(shape=record.plan.shape))
    text = " ".join(_parse(render(bare)).text)
    assert "removed nothing" in text
    assert comparison_table(bare) is None


def test_scores_that_measured_no_samples_claim_no_error(record, charts):
    record.scores.error = torch.zeros_like(record.scores.error)
    record.scores.count = torch.zeros_like(record.scores.count)
    record.scores.samples = None
    page = render(record)
    assert "standard error" not in page
    assert "±" not in page
    assert not any("±" in text.get_text() for text in charts["Importance of heads"].axes[0].texts)


def test_record_survives_the_folder(tmp_path, record, charts):
    pruning = {
        "plans": [{"plan": json.loads(record.plan.to_json())}],
        "measured": {"before": record.before, "after": record.after},
        "method": record.method,
        "data": record.data,
    }
    (tmp_path / "pruning.json").write_text(json.dumps(pruning))
    record.scores.save(tmp_path / "scores.json")
    (tmp_path / "comparisons.json").write_text(json.dumps({"Random": {"recall@1": 0.45}}))
    again, comparisons = load_record(tmp_path)
    assert comparisons == {"Random": {"recall@1": 0.45}}
    assert again.plan == record.plan
    assert again.scores.modules == record.scores.modules
    record.scores.samples = None  # not kept in files
    assert render(again, comparisons=comparisons) == render(record, comparisons=comparisons)


def test_broken_records_name_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"no pruning\.json"):
        load_record(tmp_path)
    for content in ("{", "[]", "{}", '{"plans": [{}]}', '{"plans": [], "measured": {}}'):
        (tmp_path / "pruning.json").write_text(content)
        with pytest.raises(ValueError, match=r"pruning\.json"):
            load_record(tmp_path)


def test_indistinguishable_counts_neighbours(record):
    assert "19 neighbouring heads" in indistinguishable(record.scores)
    record.scores.samples = None
    assert indistinguishable(record.scores) == ""


def test_numbers_read_well():
    assert [number(v) for v in (0.0, 1.949, 0.0123, 240.4, float("inf"))] == ["0", "1.9", "0.012", "240", "–"]  # noqa: RUF001
    assert [si(v) for v in (950, 1_234, 12_345_678, 7e9, 1.5e12)] == ["950", "1.23 k", "12.3 M", "7.00 G", "1.50 T"]
    assert si(947_000, "B") == "947 kB"
    assert [duration(s) for s in (0.42, 12.3, 200, 18_600)] == ["0.4 s", "12 s", "3 min 20 s", "5 h 10 min"]
    assert metric("latency_ms", 12.34) == "12.3 ms"
    assert metric("recall@1", 0.9187) == "0.919"
    assert metric("recall@1", None) == "–"  # noqa: RUF001
    assert change("params", 200, 100) == "−50 %"  # noqa: RUF001
    assert change("recall@1", 0.5, 0.75) == "+0.250"
    assert change("recall@1", None, 0.75) == ""


def test_cut_summary_lists_what_went():
    plan = Plan(shape={"vision": [{"head": 4, "neurons": 64}] * 3})
    assert cut_summary(plan) == "nothing"
    plan.add("vision", "head", 0, [1, 2])
    assert cut_summary(plan) == "2 of 12 heads"
    plan.add("vision", "layer", 2, [])
    assert cut_summary(plan) == "6 of 12 heads, 64 of 192 neurons and 1 of 3 layers"


# ---- weights that are zero ------------------------------------------------------------------------------------------

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj")
T5 = ("layer.0.SelfAttention.q", "layer.1.EncDecAttention.q", "layer.2.DenseReluDense.wi_0")
SIZED = {"params": 1000, "nonzero": 1000}


def sparse_plan(prefix: str, paths: tuple[str, ...], layers: int, by_block: bool = False) -> Plan:
    """Shares that differ everywhere, or from block to block."""
    shares = {
        f"{prefix}.{layer}.{path}.weight": 0.4 + 0.05 * layer + (0 if by_block else 0.01 * number)
        for layer in range(layers)
        for number, path in enumerate(paths)
    }
    return Plan(shape={"text": [{"head": 4}] * layers}, sparsity=shares)


def sparse_record(estimator: str = "first-order") -> Record:
    """A text tower of three blocks, two matrices each; importance grows over four decades."""
    plan = sparse_plan("model.layers", ATTENTION, 3)
    known = estimator == "zeroth-order"
    value = torch.logspace(-4, 0, 6, dtype=torch.float64)
    scores = Scores(
        modules=[Module("text", "matrix", layer, index) for layer in range(3) for index in range(2)],
        value=value,
        error=value / 10 if known else torch.full((6,), math.nan, dtype=torch.float64),
        count=torch.full((6,), 64),
        cost=torch.full((6,), 1024.0, dtype=torch.float64),
        objective="lm_loss",
        parameters=list(plan.sparsity),
    )
    plan.method = {"name": "ecoflap", "sparsity": 0.47, "estimator": estimator, "importance": None}
    before = {"exact_match": 0.9, **SIZED, "flops": 10}
    return Record(plan, scores, before, {**before, "exact_match": 0.85, "nonzero": 550}, plan.method)


@pytest.mark.parametrize(
    ("parameter", "expected"),
    [
        (
            "vision_model.encoder.layers.10.self_attn.q_proj.weight",
            ("vision_model.encoder.layers", 10, "self_attn.q_proj"),
        ),
        (
            "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
            ("model.vision_tower.vision_model.encoder.layers", 0, "mlp.fc1"),
        ),
        ("encoder.block.3.layer.0.SelfAttention.q.weight", ("encoder.block", 3, "layer.0.SelfAttention.q")),
        (
            "qformer.encoder.layer.1.attention.attention.query.weight",
            ("qformer.encoder.layer", 1, "attention.attention.query"),
        ),
    ],
)
def test_names_of_parameters_say_where_a_matrix_stands(parameter, expected):
    assert place(parameter) == expected


@pytest.mark.parametrize("parameter", ["visual_projection.weight", "layers.3.weight", "layers.3.fc1.bias", ""])
def test_other_names_are_refused(parameter):
    with pytest.raises(ValueError, match="not the name of a weight in a numbered block"):
        sparsity(Plan({}, sparsity={parameter: 0.5}))


@pytest.mark.parametrize(
    ("prefix", "paths", "labels"),
    [
        ("text_model.encoder.layers", ATTENTION, ["q_proj", "k_proj"]),
        ("decoder.block", T5, ["SelfAttention.q", "EncDecAttention.q", "wi_0"]),
        (
            "qformer.encoder.layer",
            ("attention.output.dense", "output.dense"),
            ["attention.output.dense", "output.dense"],
        ),
    ],
)
def test_sparsity_draws_the_shares_of_the_plan(prefix, paths, labels):
    plan = sparse_plan(prefix, paths, 4)
    axes, _ = sparsity(plan).axes
    assert axes.get_title("left") == prefix
    assert [label.get_text() for label in axes.get_yticklabels()] == labels
    drawn = axes.images[0].get_array()
    assert drawn.shape == (len(paths), 4)
    for row, path in enumerate(paths):
        for layer in range(4):
            assert drawn[row, layer] == plan.sparsity[f"{prefix}.{layer}.{path}.weight"]
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written[(3, 1)] == "56"
    assert len(written) == drawn.size


def test_sparsity_has_a_panel_a_tower_and_one_row_where_blocks_are_alike():
    plan = sparse_plan("text_model.encoder.layers", ATTENTION, 3, by_block=True)
    plan.sparsity |= sparse_plan("vision_model.encoder.layers", ATTENTION, 2).sparsity
    text, vision, colours = sparsity(plan).axes
    assert [label.get_text() for label in text.get_yticklabels()] == ["all matrices"]
    assert text.images[0].get_array().tolist() == [pytest.approx([0.4, 0.45, 0.5])]
    assert vision.images[0].get_array().shape == (2, 2)
    assert text.images[0].get_clim() == vision.images[0].get_clim() == pytest.approx((0.4, 0.5))
    assert "46%" in [label.get_text() for label in colours.get_xticklabels()]


def test_sparsity_leaves_blank_what_is_not_pruned_and_writes_only_where_there_is_room():
    plan = sparse_plan("layers", ATTENTION, 3)
    del plan.sparsity["layers.1.self_attn.k_proj.weight"]
    axes = sparsity(plan).axes[0]
    assert axes.images[0].get_array().mask.tolist() == [[False] * 3, [False, True, False]]
    assert (1, 1) not in [text.get_position() for text in axes.texts]
    assert len(sparsity(sparse_plan("layers", ATTENTION, 32)).axes[0].texts) == 64
    assert not sparsity(sparse_plan("layers", ATTENTION, 48, by_block=True)).axes[0].texts
    with pytest.raises(ValueError, match="no matrix has a sparsity"):
        sparsity(Plan({}))


def test_heat_map_of_matrices_names_them_and_shows_errors_only_where_known():
    scores = sparse_record("zeroth-order").scores
    axes, colours = heat_map(scores, kind="matrix").axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["q_proj", "k_proj"]
    assert (axes.get_title("left"), axes.get_xlabel()) == ("text", "")
    assert axes.images[0].get_array().flatten().tolist() == scores.value.tolist()
    assert [text.get_text() for text in axes.texts][::5] == ["0.00010\n±1.0e\N{MINUS SIGN}05", "1.0\n±0.10"]
    assert colours.get_xlim()[0] == 0
    axes = heat_map(sparse_record().scores, kind="matrix").axes[0]
    assert [text.get_text() for text in axes.texts][::5] == ["0.00010", "1.0"]


def test_heat_map_numbers_matrices_where_blocks_differ():
    scores = sparse_record().scores
    scores.parameters[-1] = "model.layers.2.mlp.fc1.weight"
    axes = heat_map(scores, kind="matrix").axes[0]
    assert axes.get_xlabel() == "matrix"
    assert "q_proj" not in [label.get_text() for label in axes.get_xticklabels()]


def test_ranking_of_matrices_hatches_nothing():
    record = sparse_record("zeroth-order")
    axes = ranking(record.scores, record.plan, kind="matrix").axes[0]
    kept, gone, errors = (steps.get_data() for steps in axes.patches)
    assert kept.values.tolist() == gone.values.tolist() == gone.baseline.tolist() == record.scores.value.tolist()
    assert (errors.values - errors.baseline).tolist() == pytest.approx((record.scores.value / 5).tolist())
    assert [label.get_text() for label in axes.get_xticklabels()][:2] == ["text.0.q_proj", "text.0.k_proj"]
    assert not axes.texts
    assert axes.get_ylim()[0] == 0
    record = sparse_record()
    assert removed_shares(record.scores, record.plan) == [0.0] * 6
    errors = ranking(record.scores, kind="matrix").axes[0].patches[2].get_data()
    assert (errors.values == errors.baseline).all()


def test_extremes_name_matrices_and_claim_no_error_where_none_is_known():
    record = sparse_record()
    (_, least), (_, most) = extremes(record.scores, record.plan)
    assert (
        [row["module"] for row in least]
        == ["text.0.q_proj", "text.0.k_proj", "text.1.q_proj"]
        == names(record.scores)[:3]
    )
    assert most[0]["module"] == "text.2.k_proj"
    assert (most[0]["error"], most[0]["cost"], most[0]["removed"]) == ("\N{EN DASH}", "1.02 k", False)


@pytest.mark.parametrize(
    ("estimator", "importance", "expected"),
    [
        ("first-order", None, "the loss L (lm_loss) depends on each matrix: the sum of |w| |∂L/∂w|"),
        ("first-order", "norm", "depends on each matrix: the mean |∂L/∂w|"),
        ("zeroth-order", None, "depends on each matrix: the mean |L(W + εz)"),
        ("zeroth-order", "weighted", "depends on each matrix: the sum of |w| times the mean |L(W + εz)"),
        ("zeroth-order", "squared", "depends on each matrix: the sum of w² times the square of the mean |L(W + εz)"),
        ("outliers", None, "How many weights w of each matrix have |w| ‖x‖, where x is their input, above 5 times"),
        ("mine", None, "depends on each matrix."),
    ],
)
def test_page_says_what_the_scores_of_matrices_are(charts, estimator, importance, expected):
    record = sparse_record(estimator)
    record.method = {**record.method, "importance": importance}
    page = render(record)
    assert expected in page
    assert ("one standard error" in page) == ("± s.e." in page) == (estimator == "zeroth-order")
    for wrong in ("left out", "Hatched", "removed", "per sample"):
        assert wrong not in page[page.index("<main>") :]
    assert "<td>matrices scored</td><td>6</td>" in page


def test_page_shows_only_what_happened(charts, record):
    render(replace(record, scores=None))
    assert list(charts) == ["Units kept in every block"]
    charts.clear()
    render(replace(sparse_record(), scores=None))
    assert list(charts) == ["Share of every matrix that is zero"]
    charts.clear()
    both = Plan(record.plan.shape, heads=record.plan.heads, sparsity=sparse_record().plan.sparsity)
    text = " ".join(_parse(render(Record(both))).text)
    assert "What was removed" in text
    assert "Sparsity of every block" in text
    charts.clear()
    untouched = Plan(both.shape, heads={"vision": {0: []}}, sparsity=dict.fromkeys(both.sparsity, 0.0))
    text = " ".join(_parse(render(Record(untouched))).text)
    assert not charts
    assert "removed nothing" in text
    assert "What was removed" not in text
    assert "Sparsity of every block" not in text


def test_page_of_a_sparse_model_is_well_formed():
    page = render(sparse_record("zeroth-order"), comparisons={"Wanda 0.6": {"exact_match": 0.7, "nonzero": 400}})
    parser = _parse(page)
    assert len(parser.ids) == len(set(parser.ids))
    assert page.count("<svg") == 4
    assert "nan" not in page


def test_sparse_records_survive_the_folder(tmp_path, charts):
    record = sparse_record()
    plan = json.loads(record.plan.to_json())
    measured = {"before": record.before, "after": record.after}
    pruning = {"plans": [{"plan": plan}], "measured": measured, "method": record.method, "data": {}}
    (tmp_path / "pruning.json").write_text(json.dumps(pruning))
    record.scores.save(tmp_path / "scores.json")
    again, _ = load_record(tmp_path)
    assert again.plan == record.plan
    assert again.scores.parameters == record.scores.parameters
    assert again.scores.error.isnan().all()
    assert render(again) == render(record)


def test_summaries_of_sparse_plans_read_well():
    record = sparse_record()
    assert cut_summary(record.plan) == "47% of the weights of 6 matrices (40% to 51%)"
    assert "ECoFLaP zeroed 47% of the weights of 6 matrices (40% to 51%). 45% of all parameters are zero;" in (
        report._lede(record, record.plan)
    )
    assert "fewer" not in report._lede(record, record.plan)
    record.plan.method = {}
    assert cut_summary(record.plan) == "40% to 51% of the weights of 6 matrices"
    record.plan.add("text", "head", 0, [1])
    assert cut_summary(record.plan) == "1 of 12 heads and 40% to 51% of the weights of 6 matrices"
    assert "removed 1 of 12 heads and zeroed 40% to 51% of" in report._lede(record, record.plan)
    assert cut_summary(Plan({}, sparsity={"layers.0.fc.weight": 0.5})) == "50% of the weights of 1 matrix"


# ---- quality against savings ----------------------------------------------------------------------------------------


def test_names_that_differ_in_their_sparsity_are_one_line():
    rows = [("dense", 0.0, 0.9), ("ECoFLaP", 0.58, 0.8), ("Wanda 0.7", 0.68, 0.3), ("Wanda 0.5", 0.48, 0.7)]
    rows += [("RIA, 50%", 0.48, 0.6), ("RIA, 60 %", 0.58, 0.5), ("Wanda 2:4", 0.49, 0.75), ("OWL (0.5)", 0.48, 0.7)]
    axes = quality_against_savings(rows, "recall@1").axes[0]
    dense, *lines = axes.lines
    assert list(dense.get_ydata()) == [0.9, 0.9]
    assert dense.get_linestyle() == "--"
    drawn = {line.get_label(): (tuple(line.get_xdata()), tuple(line.get_ydata())) for line in lines}
    assert drawn == {
        "ECoFLaP": ((0.58,), (0.8,)),
        "Wanda": ((0.48, 0.68), (0.7, 0.3)),
        "RIA": ((0.48, 0.58), (0.6, 0.5)),
        "Wanda 2:4": ((0.49,), (0.75,)),
        "OWL (0.5)": ((0.48,), (0.7,)),
    }
    assert [line.get_linestyle() for line in lines] == ["None", "-", "-", "None", "None"]
    assert axes.get_ylabel() == "recall@1"
    legend = [text.get_text() for text in axes.figure.legends[0].get_texts()]
    assert legend == ["dense", "ECoFLaP", "Wanda 2:4", "OWL (0.5)", "RIA", "Wanda"]


def test_series_differ_in_more_than_colour():
    lines = quality_against_savings([("dense", 0, 1), *((f"m{'x' * n}", n, n) for n in range(20))]).axes[0].lines[1:]
    assert len({(line.get_marker(), line.get_fillstyle()) for line in lines}) == 20


def test_page_draws_quality_against_what_is_left_of_the_dense_model(charts):
    record = replace(sparse_record(), scores=None)
    small = {"exact_match": 0.6, "params": 300, "nonzero": 300}
    useless = {"nothing": {"nonzero": 100}, "inf": {"exact_match": math.inf, "nonzero": 10}, "text": {"exact_match": 1}}
    page = render(record, comparisons={"MoPE": small, **useless})
    assert "Quality against savings" in page
    _, *lines = charts["exact match against savings"].axes[0].lines
    drawn = {line.get_label(): (line.get_xdata()[0], line.get_ydata()[0]) for line in lines}
    assert drawn == {"ECoFLaP": (pytest.approx(0.45), 0.85), "MoPE": (pytest.approx(0.7), 0.6)}


@pytest.mark.parametrize(
    "comparisons", [{}, {"Wanda": {"exact_match": 0.7, "nonzero": 551}}, {"MoPE": {"exact_match": 0.8, "params": 300}}]
)
def test_one_sparsity_is_no_trade_off(charts, comparisons):
    record = replace(sparse_record(), scores=None)
    assert "Quality against savings" not in render(record, comparisons=comparisons)
    record.before = {}
    assert "Quality against savings" not in render(record, comparisons={"MoPE": {"exact_match": 0.6, "nonzero": 300}})


@pytest.mark.parametrize(("flops", "across"), [(480, ""), (300, "share of FLOPs saved")])
def test_models_of_nearly_one_sparsity_are_told_apart_by_flops_or_not_drawn(flops, across, charts):
    """The result has 55% of its parameters; 54.5% of another, a hundredth beside it, would be a vertical line."""
    record = replace(sparse_record(), scores=None)
    record.before["flops"], record.after["flops"] = 1000, 485
    other = {"exact_match": 0.7, "nonzero": record.after["nonzero"] - 5, "flops": flops}
    page = render(record, comparisons={"Wanda": other})
    assert ("Quality against savings" in page) == bool(across)
    if across:
        axes = charts["exact match against savings"].axes[0]
        assert axes.get_xlabel() == across
        assert [line.get_xdata()[0] for line in axes.lines[1:]] == pytest.approx([0.515, 0.7])


def test_a_method_among_others_of_its_name_says_its_sparsity():
    numbers = {"recall@1": 0.5, "params": 10, "nonzero": 4}
    plan = Plan(shape={}, sparsity={"layers.0.q.weight": 0.6}, method={"name": "ecoflap", "sparsity": 0.6})
    record = Record(plan=plan, before={**numbers, "nonzero": 10}, after=numbers, method=plan.method)
    for others, expected in (
        ({"ECoFLaP 0.5": numbers}, "ECoFLaP 0.6"),
        ({"Wanda 0.5": numbers}, "ECoFLaP"),
        ({}, "ECoFLaP"),
    ):
        assert [row["name"] for row in comparison_table(record, others)["rows"]] == ["dense", expected, *others]
