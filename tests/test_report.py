"""The report: what it shows, that it stands alone, and that it can be written again from a saved model."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
import torch

from vlprune_ext.figures import cut, heat_map, number, ranking, removed_shares, svg
from vlprune_ext.plan import Module, Plan, Scores
from vlprune_ext.report import (
    Record,
    change,
    comparison_table,
    cut_summary,
    duration,
    indistinguishable,
    load_record,
    metric,
    render,
    save_record,
    si,
    write_report,
)

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


def test_page_shows_the_numbers_the_method_and_the_data(record):
    text = " ".join(_parse(render(record, comparisons={"Random": {**NUMBERS, "recall@1": 0.452}})).text)
    for expected in ("0.919", "0.868", "2.05 M", "1.10 M", "119 M", "Random", "0.452", "MoPE", "keep_heads", "abc123"):
        assert expected in text
    assert "image to text" not in text
    assert "MoPE removed" in text
    assert "recall@1 went from 0.919 to 0.868" in text


def test_titles_are_escaped(record):
    page = render(record, title="<b>&", comparisons={"<i>x</i>": NUMBERS})
    assert "<b>&" not in page
    assert "<i>x" not in page


def test_write_report_replaces_the_file_whole(tmp_path, record):
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


def test_ranking_draws_the_cut_only_where_there_is_one(record):
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


def test_cut_counts_units_and_whole_layers(record):
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


def test_scores_that_measured_no_samples_claim_no_error(record):
    record.scores.error = torch.zeros_like(record.scores.error)
    record.scores.count = torch.zeros_like(record.scores.count)
    record.scores.samples = None
    page = render(record)
    assert "standard error" not in page
    assert "±0" not in page


def test_record_survives_the_folder(tmp_path, record):
    pruning = {
        "plans": [{"plan": json.loads(record.plan.to_json())}],
        "measured": {"before": record.before, "after": record.after},
        "method": record.method,
        "data": record.data,
    }
    (tmp_path / "pruning.json").write_text(json.dumps(pruning))
    save_record(tmp_path, record, {"Random": {"recall@1": 0.45}})
    again, comparisons = load_record(tmp_path)
    assert comparisons == {"Random": {"recall@1": 0.45}}
    assert again.plan == record.plan
    assert again.scores.modules == record.scores.modules
    record.scores.samples = None  # not kept in files
    assert render(again, comparisons=comparisons) == render(record, comparisons=comparisons)
    record.scores = None
    save_record(tmp_path, record)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pruning.json"]


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
