"""The command line: what it prints, what it writes, and how it refuses. Runs on a tiny CLIP that nobody trained."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from cli.invoke import refused, run

import vlprune_ext as vp
from vlprune_ext.anatomy import FAMILIES
from vlprune_ext.checkpoint.models import load_model
from vlprune_ext.cli import demo
from vlprune_ext.data.sources import SOURCES
from vlprune_ext.methods import JOINT, METHODS, TOKENS, UNITS, WEIGHTS, ECoFLaP
from vlprune_ext.objectives.named import OBJECTIVES
from vlprune_ext.workflow import benchmarks as bench
from vlprune_ext.workflow import measure as measuring

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("demo", "score", "prune", "tokens", "evaluate", "plan-cost", "bench", "info", "report")
SMALL = ("--limit", "8", "--neurons-per-group", "32")
FEW = ("--limit", "8", "--test-limit", "8")


@pytest.fixture(autouse=True)
def _noise():
    """The commands silence transformers; other tests may want to hear it."""
    verbosity = transformers.utils.logging.get_verbosity()
    yield
    transformers.utils.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(autouse=True)
def _latency(monkeypatch):
    """Two runs tell it instead of twenty; nothing here looks at it."""
    monkeypatch.setitem(inspect.unwrap(measuring.measure).__kwdefaults__, "repeats", 2)


@pytest.fixture
def tiny(untrained_clip) -> Path:
    return untrained_clip


# ---- what it prints and writes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    text = run(command, "--help").stdout
    assert "Example" in text
    assert f"vlprune {command}" in text
    assert "--json" in text
    assert "--debug" in text


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("prune", [*METHODS, *OBJECTIVES, *SOURCES]),
        ("score", [*OBJECTIVES, *SOURCES]),
        ("evaluate", [*OBJECTIVES, *SOURCES]),
        ("tokens", TOKENS),
    ],
)
def test_help_names_all_that_there_is(command, names):
    """As one word each, of a terminal wide enough not to break them."""
    words = set(re.findall(r"[\w@-]+", run(command, "--help", width=400).stdout))
    assert set(names) <= words


def test_bare_command_shows_the_commands():
    text = run().stdout
    assert all(command in text for command in COMMANDS)
    assert vp.__version__ in run("--version").stdout


def test_help_does_not_wait_for_torch():
    script = (
        "import sys; from vlprune_ext.cli import app; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_info():
    content = json.loads(run("info", "--json").stdout)
    assert content["torch"] == torch.__version__
    assert content["isa"] in content["available_isas"]
    assert "clip-digits" in content["zoo"]
    assert content["isa"] in run("info").stdout


def test_score(tiny, tmp_path):
    out = tmp_path / "scores.csv"
    text = run("score", tiny, *SMALL, "--modules", "head,neurons,layer", "--out", out, "--top", 3).stdout
    assert "20 modules, 8 images; contrastive is " in text
    assert text.count("vision.") + text.count("text.") == 6
    assert "neighbouring heads" in text.replace("\n", " ")
    assert len(vp.Scores.load(out)) == 20


def test_score_json_is_all_there_is_on_stdout(tiny, tmp_path):
    out = tmp_path / "scores.json"
    result = run("score", tiny, *SMALL, "--towers", "text", "--objective", "margin", "--json", "--out", out)
    content = json.loads(result.stdout)
    assert content["objective"] == "margin"
    assert {(m["tower"], m["kind"]) for m in content["modules"]} == {("text", "head"), ("text", "neurons")}
    assert len(vp.Scores.load(out)) == len(content["modules"]) == 8
    assert result.stderr == ""


def test_prune_save_evaluate_and_report_again(tiny, tmp_path, charts):
    out, report, plan = tmp_path / "deep" / "pruned", tmp_path / "r.html", tmp_path / "plan.json"
    result = run(
        *("prune", tiny, *SMALL, "--steps", 2, "--test-limit", 20, "--distill-steps", 1, "--set", "exact=false"),
        *("--out", out, "--report", report, "--save-plan", plan, "--json"),
    )
    content = json.loads(result.stdout)
    assert content["method"]["name"] == "mope"
    assert content["method"]["exact"] is False
    assert content["after"]["params"] < content["before"]["params"]
    assert set(content["comparisons"]) == {"MoPE, before distillation"}
    assert content["plan"] == json.loads(plan.read_text())

    again = json.loads(run("evaluate", out, "--limit", 20, "--json").stdout)
    same = ("recall@1", "recall@10", "params", "flops")
    assert {key: again[key] for key in same} == {key: content["after"][key] for key in same}

    page = report.read_text(encoding="utf-8")
    assert "MoPE, distilled" in page
    second = tmp_path / "second.html"
    assert str(second) in run("report", out, "--out", second, "--title", f"{tiny.name}, pruned").stdout.replace(
        "\n", ""
    )
    text = second.read_text(encoding="utf-8")
    assert "MoPE, before distillation" in text
    assert text.count("<svg") == page.count("<svg")

    third = json.loads(run("prune", tiny, "--plan", plan, "--limit", 8, "--test-limit", 20, "--json").stdout)
    assert third["after"]["params"] == content["after"]["params"]
    assert third["plan"] == content["plan"]


@pytest.mark.parametrize("method", UNITS)
def test_prune_prints_a_table(tiny, method):
    text = run("prune", tiny, "--method", method, *SMALL, "--steps", 1, "--test-limit", 20, "--keep-heads", 1).stdout
    assert "dense" in text
    assert METHODS[method].__name__ in text
    assert "removed 128 of 256 neurons" in text


def test_prune_by_ecoflap(tiny, tmp_path):
    """Weights are zeroed, none is removed; what was saved loads, and so does the plan."""
    out, plan = tmp_path / "out", tmp_path / "plan.json"
    options = ("--estimator", "first-order", "--sparsity", 0.6, *SMALL[:2], "--test-limit", 20)
    made = run("prune", tiny, "--method", "ecoflap", *options, "--out", out, "--save-plan", plan)
    assert "ECoFLaP" in made.stdout
    assert "not zero" in made.stdout
    assert re.search(r"removed \d+% of the weights of \d+ matrices \(\d+% to \d+%\)", made.stdout)
    model = transformers.CLIPModel.from_pretrained(out)
    shares = json.loads(plan.read_text())["sparsity"]
    weights = {name: p for name, p in model.named_parameters() if name in shares}
    zeros = sum(int((p == 0).sum()) for p in weights.values()) / sum(p.numel() for p in weights.values())
    assert zeros == pytest.approx(0.6, abs=0.01)
    again = json.loads(run("prune", tiny, "--plan", plan, *SMALL[:2], "--test-limit", 20, "--json").stdout)
    assert again["after"]["nonzero"] == sum(int(p.count_nonzero()) for p in model.parameters())


def test_prune_by_comp(tiny, tmp_path, charts):
    """Trains while it prunes; a run that is there already goes on; the report has its stages."""
    out, report, checkpoints = tmp_path / "out", tmp_path / "r.html", tmp_path / "run"
    options = ("--method", "comp", "--flops", 0.8, "--interval", 1, "--set", "step=0.1", *FEW, "--batch-size", 8)
    options = (*options, "--resume", checkpoints, "--out", out, "--report", report)
    first = run("prune", tiny, *options, "--train-steps", 9, "--json")
    content = json.loads(first.stdout)
    method = content["method"]
    assert [entry["mode"] for entry in method["history"]]
    assert method["reached"]["flops"] <= 0.81
    assert content["after"]["flops"] < content["before"]["flops"]
    assert "<h2>Stages</h2>" in report.read_text(encoding="utf-8")
    assert (checkpoints / "checkpoint-9").is_dir()
    pruned = vp.load_pruned(out)
    assert sum(p.numel() for p in pruned.parameters()) == content["after"]["params"]
    assert first.stderr == ""
    again = json.loads(run("prune", tiny, *options[:-4], "--train-steps", 9, "--json").stdout)
    assert again["method"]["history"] == method["history"]
    assert again["after"]["recall@1"] == content["after"]["recall@1"]


def test_comp_says_when_there_were_too_few_steps(tiny):
    options = ("--method", "comp", "--flops", 0.8, "--interval", 1, *FEW, "--batch-size", 8, "--train-steps", 2)
    said = " ".join(run("prune", tiny, *options).stderr.split())
    assert re.search(
        r"warning: CoMP: training ended with 0\.\d+ of the FLOPs left, the target was 0\.8; train longer", said
    )


def test_what_comp_decides_by_is_what_is_told():
    """A model that answers questions is judged by its answers, before and after."""
    options = ("blip-digits", "--method", "comp", "--set", "train=false", "--flops", 0.95, *FEW, "--json")
    content = json.loads(run("prune", *options).stdout)
    assert "exact_match" in content["before"]
    assert "exact_match" in content["after"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "mope", "--resume", "run"), "--resume: run, expected one method that trains; there are 0"),
        (("--method", "comp", "--set", "judged=later"), "judged: 'later', expected one of both, raised, trained"),
        (("--method", "comp", "--flops", 1.5), "flops: 1.5, expected the share to keep"),
        (("--method", "comp", "--sparsity", 0.5), "--sparsity: not a field of comp"),
    ],
)
def test_comp_refuses(tiny, options, message):
    assert message in refused("prune", tiny, *options, code=2)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--sparsity", 1), 2, "sparsity: 1.0, expected a share in"),
        (("--pattern", "4:2"), 2, "pattern: '4:2', expected 'unstructured' or 'n:m'"),
        (("--pattern", "3:7"), 1, "pattern: 3:7, but .* columns, which 7 does not divide"),
        (("--estimator", "hessian"), 2, "estimator: 'hessian', expected one of zeroth-order"),
        (("--criterion", "luck"), 2, "criterion: 'luck', expected one of wanda"),
        (("--keep-heads", 0.5), 2, "--keep-heads: not a field of ecoflap"),
        (("--towers", "audio"), 1, "towers: 'audio', expected some of vision, text"),
    ],
)
def test_bad_input_to_ecoflap(tiny, options, code, message):
    assert re.search(message, refused("prune", tiny, "--method", "ecoflap", "--limit", 8, *options, code=code))


def test_several_ways_to_prune_are_all_reported(tiny, tmp_path):
    """The first is kept, each of the others starts from the dense model and becomes a row of its own."""
    plan, out = tmp_path / "all-heads.json", tmp_path / "out"
    made = run("prune", tiny, "--method", "random", *SMALL, "--test-limit", 20, "--keep-heads", 1, "--save-plan", plan)
    assert "all-heads.json" in made.stdout.replace("\n", "")
    several = ("--plan", plan, "--method", "random", "--method", "mope", "--steps", 1, "--set", "exact=true")
    content = json.loads(run("prune", tiny, *several, *SMALL, "--test-limit", 20, "--out", out, "--json").stdout)
    assert content["plan"] == json.loads(plan.read_text())
    assert set(content["comparisons"]) == {"Random", "MoPE"}
    sizes = {name: numbers["params"] for name, numbers in content["comparisons"].items()}
    assert max(*sizes.values(), content["after"]["params"]) < content["before"]["params"]
    assert vp.load_pruned(out).num_parameters() == content["after"]["params"]


def test_prune_with_the_same_seed_is_the_same(tiny):
    plans = [
        json.loads(run("prune", tiny, "--method", "random", *FEW, "--seed", seed, "--json").stdout)["plan"]
        for seed in (3, 3, 4)
    ]
    assert plans[0] == plans[1]
    assert plans[0]["neurons"] != plans[2]["neurons"] or plans[0]["heads"] != plans[2]["heads"]


def test_plan_cost_counts_block_runs(tiny):
    cost = json.loads(run("plan-cost", tiny, *SMALL, "--json").stdout)
    # Two blocks with two heads and two groups each: 2 + 4 * 2 + 4 * 1 block runs a row, and 8 rows.
    assert {tower: row["block_runs"] for tower, row in cost["towers"].items()} == {"vision": 112, "text": 112}
    assert "112" in run("plan-cost", tiny, *SMALL).stdout


def test_evaluate_zero_shot(tiny):
    text = run("evaluate", tiny, "--data", "digits-classes", "--limit", 10, "--objective", "zero_shot").stdout
    assert "zero shot accuracy" in text
    assert "parameters" in text


def test_own_data(tiny, tmp_path):
    from PIL import Image

    for name in ("a", "b", "c"):
        Image.new("RGB", (60, 50), (200, 30, 30)).save(tmp_path / f"{name}.png")
    lines = [{"image": f"{name}.png", "text": [f"a red {i} top left", "a 3"]} for i, name in enumerate("abc")]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    content = json.loads(run("evaluate", tiny, "--data", path, "--json").stdout)
    assert content["data"]["images"] == 3
    assert content["data"]["name"] == "pairs.jsonl"


@pytest.mark.parametrize("split", [True, False])
def test_prune_reports_on_the_test_split_of_own_data_or_says_that_there_is_none(tiny, tmp_path, split):
    from PIL import Image

    lines = []
    for i in range(8):
        Image.new("RGB", (60, 50), (30 * i, 30, 30)).save(tmp_path / f"{i}.png")
        lines.append({"image": f"{i}.png", "text": f"a red {i} top left"})
        if split:
            lines[-1]["split"] = "test" if i % 2 else "calibration"
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    result = run("prune", tiny, "--data", path, "--method", "magnitude", "--json", width=200)
    content = json.loads(result.stdout)
    assert any("recall" in name for name in content["before"]) == split
    assert ("has no split 'test': no accuracy is measured" in result.stderr) != split


def test_demo_saves_reloads_and_reports(tiny, tmp_path, monkeypatch, charts):
    monkeypatch.setattr(demo, "CLIP", str(tiny))
    sizes = {"CALIBRATION": 8, "TEST": 20, "TRAIN": 16, "DISTILL_STEPS": 1, "SPARSITIES": (0.5,)}
    for name, value in sizes.items():
        monkeypatch.setattr(demo, name, value)
    out, report = tmp_path / "pruned" / "x", tmp_path / "report.html"
    result = run("demo", "--out", out, "--report", report, "--json")
    clip, llava, tokens = json.loads(result.stdout).values()
    said = result.stderr.replace("\n", " ")
    assert set(clip["comparisons"]) == {"Random", "Magnitude", "MoPE, distilled"}
    assert set(llava["comparisons"]) == {"Wanda 0.5", "GlobalMagnitude 0.5"}
    assert "recall@1 is the same" in said
    assert "exact match is the same" in said
    assert vp.load_pruned(out / "clip-digits-mope").num_parameters() == clip["after"]["params"]
    again = vp.load_pruned(out / "llava-digits-ecoflap")
    assert (
        sum(int(p.count_nonzero()) for p in again.parameters()) == llava["after"]["nonzero"] < llava["after"]["params"]
    )
    assert "Magnitude" in report.read_text(encoding="utf-8")
    assert "Wanda" in (tmp_path / "report-llava.html").read_text(encoding="utf-8")
    assert set(tokens["judged"]) == {"FastV", "VisionZip", "RandomTokens"}
    assert tokens["data"]["images"] == 20
    assert "VisionZip" in (tmp_path / "report-tokens.html").read_text(encoding="utf-8")


def test_several_sparsities(tmp_path, monkeypatch):
    """The first is kept, the others compared; scores are measured once, and baselines keep their own fields."""
    calls = []
    score = ECoFLaP._score
    monkeypatch.setattr(ECoFLaP, "_score", lambda self, *args: calls.append(self) or score(self, *args))
    fields = ["--method", "ecoflap", "--method", "wanda", "--sparsity", "0.5,0.25,0.75", "--estimator", "first-order"]
    data = ["--data", "digits-questions", "--limit", "4", "--test-limit", "4", "--metric", "exact_match"]
    content = json.loads(run("prune", "llava-digits", *data, *fields, "--out", tmp_path / "out", "--json").stdout)
    assert len(calls) == 1
    others = content["comparisons"]
    assert list(others) == ["ECoFLaP 0.25", "ECoFLaP 0.75", "Wanda 0.5", "Wanda 0.25", "Wanda 0.75"]
    assert content["method"]["sparsity"] == 0.5
    assert content["method"]["estimator"] == "first-order"
    assert "exact_match" in content["after"]
    left = [others["ECoFLaP 0.25"]["nonzero"], content["after"]["nonzero"], others["ECoFLaP 0.75"]["nonzero"]]
    assert left == sorted(left, reverse=True)
    assert others["Wanda 0.5"]["nonzero"] != content["after"]["nonzero"]
    assert "0.5, 'x'" in refused("prune", "llava-digits", "--method", "wanda", "--sparsity", "0.5, 'x'", code=2)


@pytest.mark.parametrize(
    ("fields", "lost"),
    [
        (["--method", "ecoflap", "--estimator", "first-order"], "nonzero"),
        (["--method", "taylor", "--keep-heads", ".5", "--keep-neurons", ".5", "--steps", "1"], "params"),
    ],
)
def test_a_model_made_for_questions_is_asked_some_by_default(tmp_path, fields, lost):
    few = ["--limit", "8", "--test-limit", "8", "--metric", "exact_match"]
    content = json.loads(run("prune", "blip-digits", *few, *fields, "--out", tmp_path / "out", "--json").stdout)
    assert content["data"]["name"] == "digits-questions"
    assert content["before"]["exact_match"] > 0.8
    assert "exact_match" in content["after"]
    assert content["after"][lost] < 0.75 * content["before"][lost]
    assert vp.load_pruned(tmp_path / "out").num_parameters() == content["after"]["params"]


# ---- how it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--nonsense"], "--nonsense"),
        (["nonsense"], "nonsense"),
        (["score"], "MODEL"),
        (["score", "MODEL", "--limit", "0"], "--limit"),
        (["score", "MODEL", "--limit", "many"], "--limit"),
        (["score", "MODEL", "--objective", "nonsense"], "expected one of retrieval"),
        (["score", "MODEL", "--modules", "head,feet"], "'feet', expected some of head"),
        (["score", "MODEL", "--modules", ","], "none given"),
        (["score", "MODEL", "--dtype", "float8"], "expected one of float32"),
        (["score", "MODEL", "--out", "FILE/x.json"], "not a folder that can be written to"),
        (["score", "MODEL", "--out", "FOLDER"], "a folder, expected the name of a file"),
        (["evaluate", "MODEL", "--objective", "nonsense"], "expected one of retrieval"),
        (["plan-cost", "MODEL", "--modules", "feet"], "'feet'"),
        (["prune", "MODEL", "--method", "nonsense"], "expected one of mope"),
        (["prune", "MODEL", "--keep-heads", "1.5"], "keep_heads: 1.5, expected a share in (0, 1]"),
        (["prune", "MODEL", "--keep-neurons", "0"], "keep_neurons: 0.0"),
        (["prune", "MODEL", "--keep-layers", "-1"], "keep_layers: -1.0"),
        (["prune", "MODEL", "--steps", "0"], "steps: 0"),
        (["prune", "MODEL", "--sparsity", "0.5"], "--sparsity: not a field of mope"),
        (["prune", "MODEL", "--method", "wanda", "--sparsity", "half"], "--sparsity: 'half', expected shares"),
        (["prune", "MODEL", "--method", "wanda", "--sparsity", ","], "--sparsity: ',', expected shares"),
        (["prune", "MODEL", "--method", "wanda", "--sparsity", "0.5,1"], "sparsity: 1.0, expected a share in [0, 1)"),
        (["prune", "MODEL", "--method", "wanda", "--estimator", "uniform"], "--estimator: not a field of wanda"),
        (["prune", "MODEL", "--metric", "nonsense"], "expected one of retrieval"),
        (["prune", "MODEL", "--scope", "nonsense"], "scope: 'nonsense'"),
        (["prune", "MODEL", "--stage", "nonsense"], "stage: 'nonsense'"),
        (["prune", "MODEL", "--mode", "nonsense"], "expected one of"),
        (["prune", "MODEL", "--objective", "nonsense"], "expected one of retrieval"),
        (["prune", "MODEL", "--set", "nonsense=1"], "a field of mope"),
        (["prune", "MODEL", "--set", "exact"], "expected FIELD=VALUE"),
        (["prune", "MODEL", "--method", "mope", "--method", "nonsense"], "--method: 'nonsense'"),
        (["prune", "MODEL", "--method", "magnitude", "--set", "exact=false"], "a field of magnitude"),
        (["prune", "MODEL", "--plan", "PLAN", "--keep-heads", "0.5"], "--keep-heads: not a field of a plan"),
        (["prune", "MODEL", "--out", "FILE"], "a file, expected a folder"),
        (["prune", "MODEL", "--out", "FILE/below"], "not a folder that can be written to"),
        (["prune", "MODEL", "--report", "absent/r.html"], "not a folder that can be written to"),
        (["demo", "--keep", "2"], "--keep: 2.0"),
        (["demo", "--out", "FILE"], "a file, expected a folder"),
        (["report", "absent"], "no such folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage(args, message, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("something")
    (tmp_path / "FOLDER").mkdir()
    vp.Plan(shape={}).save(tmp_path / "PLAN")
    error = refused(*[str(tiny) if arg == "MODEL" else arg for arg in args], code=2)
    assert message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["FILE", "FOLDER", "PLAN"]


def _broken(tiny: Path, folder: Path, what: str) -> Path:
    if what == "absent":
        return folder / "absent"
    if what == "file":
        (folder / "file").write_text("")
        return folder / "file"
    path = folder / "model"
    shutil.copytree(tiny, path)
    config = json.loads((path / "config.json").read_text())
    weights = path / "model.safetensors"
    if what == "empty":
        shutil.rmtree(path)
        path.mkdir()
    elif what == "config":
        (path / "config.json").write_text("{")
    elif what == "type":
        (path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    elif what == "architecture":
        (path / "config.json").write_text(json.dumps({**config, "architectures": ["os"]}))
    elif what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif what == "pickle":
        weights.rename(path / "pytorch_model.bin")
    elif what == "tensors":
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        tensors.pop("text_projection.weight")
        save_file(tensors, weights, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("absent", "no such model folder"),
        ("file", "a file, expected a model folder"),
        ("empty", "no config.json in it"),
        ("config", "its config cannot be read"),
        ("type", "a model of type 'bert' (BertModel) is not known; known are "),
        ("architecture", "(os) is not known"),
        ("truncated", "cannot be loaded"),
        ("pickle", "cannot be loaded"),
        ("tensors", "lack 1 tensors of a CLIPModel, among them text_projection.weight"),
    ],
)
def test_broken_models(what, message, tiny, tmp_path):
    path = _broken(tiny, tmp_path, what)
    assert message in refused("evaluate", path, "--limit", 8, code=1)


def test_unknown_zoo_name():
    error = refused("score", "clip-letters", code=1)
    assert "clip-letters: no such model folder, and the zoo has blip-digits, clip-digits" in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"image": "a.png", "text": "x"}\n{"image": ', "line 2: not JSON"),
        ('{"image": "a.png", "text": "x"}\n\n["a.png"]', "line 3: a list"),
        ('{"image": "absent.png", "text": "x"}', "line 1: no image"),
        ('{"image": "data.jsonl", "text": "x"}', "line 1: "),
    ],
)
def test_bad_data(content, message, tiny, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    out = tmp_path / "out"
    assert message in refused("prune", tiny, "--data", path, "--out", out, code=1)
    assert not out.exists()


def test_data_that_is_not_there(tiny, tmp_path):
    assert "no file" in refused("score", tiny, "--data", tmp_path / "absent.jsonl", code=1)
    assert "'nonsense'" in refused("score", tiny, "--split", "nonsense", code=1)


def test_towers_and_objectives_that_do_not_fit_the_model(tiny):
    assert "'ears', expected some of vision, text" in refused("score", tiny, *SMALL, "--towers", "ears", code=1)
    assert "needs a model that predicts tokens" in refused("evaluate", tiny, "--objective", "lm_loss", code=1)


@pytest.mark.parametrize("command", ["score", "prune", "evaluate", "plan-cost"])
def test_zero_shot_without_classes_says_where_there_are_some(command, tiny):
    error = refused(command, tiny, "--objective", "zero_shot", "--limit", 8, code=1)
    assert "digits has no classes; try --data digits-classes" in error


def test_a_plan_for_another_model(tiny, tmp_path):
    plan = tmp_path / "plan.json"
    vp.Plan(shape={"vision": [{"head": 9}]}).save(plan)
    out = tmp_path / "out"
    assert "made for another model" in refused("prune", tiny, "--plan", plan, *FEW, "--out", out, code=1)
    assert not out.exists()
    plan.write_text("{")
    assert "not JSON" in refused("prune", tiny, "--plan", plan, code=1)
    assert "No such file" in refused("prune", tiny, "--plan", tmp_path / "absent.json", code=1)


def test_a_folder_that_must_not_be_replaced(tiny, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    error = refused("prune", tiny, "--method", "magnitude", *FEW, "--out", tmp_path, code=1)
    assert "not empty and not an earlier pruned model" in error
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_report_of_a_folder_that_holds_none(tiny, tmp_path):
    out = tmp_path / "r.html"
    assert "no pruning.json" in refused("report", tiny, "--out", out, code=1)
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tiny):
    assert "torch sees no GPU" in refused("evaluate", tiny, "--device", "cuda", code=1)
    assert "expected auto, cpu" in refused("evaluate", tiny, "--device", "toaster", code=1)


def test_debug_shows_where(tmp_path):
    result = run("report", tmp_path, "--debug", code=1)
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_unexpected_errors_and_interrupts_are_one_line_too(monkeypatch):
    def fail(error):
        def raise_it():
            raise error

        return raise_it

    monkeypatch.setattr("vlprune_ext.workflow.machine.environment", fail(ZeroDivisionError("a\nb")))
    assert refused("info", code=1) == "error: ZeroDivisionError: a b (--debug shows where)\n"
    monkeypatch.setattr("vlprune_ext.workflow.machine.environment", fail(KeyboardInterrupt()))
    assert refused("info", code=1) == "error: interrupted\n"


# ---- benchmarks -----------------------------------------------------------------------------------------------------


def test_bench_runs_the_benchmarks_of_the_source_tree(monkeypatch):
    seen = []

    def fake(command, **_):
        seen.append(command)
        folder = Path(command[command.index("--bench-out") + 1])
        (folder / "results.md").write_text("| a table |\n")
        (folder / "results.json").write_text('{"rows": []}\n')
        return subprocess.CompletedProcess(command, len(seen) - 1 if len(seen) < 3 else 5)

    monkeypatch.setattr(bench.subprocess, "run", fake)
    assert run("bench").stdout == "| a table |\n"
    assert seen[0][3] == str(ROOT / "benchmarks")
    assert "pytest exit code 1" in refused("bench", code=1)
    assert "no benchmark's name contains 'x'" in refused("bench", "--only", "x", code=2)


def test_bench_without_a_source_tree(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "vlprune_ext" / "workflow" / "benchmarks.py"))
    assert "in the source tree" in refused("bench", code=1)


# ---- what the README says -------------------------------------------------------------------------------------------


def _readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_example_runs_as_shown(tmp_path, monkeypatch, capsys):
    example, fewer_tokens, together = re.findall(r"```python\n(.*?)```", _readme(), flags=re.S)
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    llava = load_model("llava-digits").model
    row = vp.load_data("digits-questions", "test", model=llava, limit=1).batch(torch.tensor([0]))
    inputs = {name: row[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    exec(compile(fewer_tokens, "README.md", "exec"), {"vp": vp, "model": llava, "inputs": inputs})
    given = {"vp": vp, "model": llava, "inputs": inputs}
    given |= {split: vp.load_data("digits-questions", split, model=llava, limit=8) for split in ("train", "validation")}
    with pytest.warns(UserWarning, match="training ended"):
        exec(compile(together.replace("steps=2000", "steps=1"), "README.md", "exec"), given)
    assert re.search(r"recall@1 [\d.]+ -> [\d.]+", capsys.readouterr().out)
    assert (tmp_path / "pruned" / "pruning.json").is_file()


def test_readme_names_every_method_model_and_command():
    text = _readme()
    listed = re.findall(r"^\| `[\w-]+` \| `vp\.(\w+)` \|", text, flags=re.M)
    assert set(listed) == {method.__name__ for method in (*METHODS.values(), *TOKENS.values())}
    table = text.split("## Models")[1].split("##")[0]
    assert set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| (`[^|]*) \|", table, flags=re.M)))) == set(FAMILIES)
    used = set(re.findall(r"^vlprune ([a-z-]+)", text, flags=re.M))
    assert used <= set(COMMANDS)


def test_readme_commands_parse():
    """Every option that the README uses exists."""
    shell = _readme().split("## From the shell")[1].split("```")[1].replace("\\\n", " ")
    for line in shell.strip().splitlines():
        command, *rest = line.split()[1:]
        known = run(command, "--help").stdout
        for option in re.findall(r"--[a-z-]+", " ".join(rest)):
            assert option in known, f"{command} {option}"


@pytest.mark.parametrize(
    ("page", "methods"),
    [
        ("mope.md", UNITS.values()),
        ("ecoflap.md", WEIGHTS.values()),
        ("tokens.md", TOKENS.values()),
        ("comp.md", JOINT.values()),
    ],
)
def test_pages_name_every_field(page, methods):
    import dataclasses

    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for method in methods:
        for field in dataclasses.fields(method):
            if field.init:
                assert f"`{field.name}`" in text, f"{method.__name__}.{field.name}"
