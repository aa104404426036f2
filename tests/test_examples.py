"""The programs in examples/, as their first lines show them, on the zoo's models and few samples."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from pathlib import Path

import pytest
import transformers
from PIL import Image

import vlprune_ext as vp
from vlprune_ext.workflow import measure as measuring

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Two runs tell the latency instead of twenty; no progress bars."""
    monkeypatch.setitem(inspect.unwrap(measuring.measure).__kwdefaults__, "repeats", 2)
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def run(monkeypatch, name: str, *args: object) -> None:
    """Run a program as its user does."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
    module.main()


def test_prune_clip(monkeypatch, tmp_path, capsys):
    out = tmp_path / "clip"
    run(monkeypatch, "prune_clip", "--limit", 8, "--test-limit", 16, "--steps", 1, "--out", out)
    said = capsys.readouterr().out
    assert "recall@1 is the same" in said
    assert vp.load_pruned(out).num_parameters() < 1_500_000  # of 2,053,505
    assert (out / "processor_config.json").is_file()


def test_prune_llava(monkeypatch, tmp_path, capsys):
    out = tmp_path / "llava"
    run(monkeypatch, "prune_llava", "--limit", 8, "--test-limit", 16, "--out", out)
    said = capsys.readouterr().out
    assert "exact_match is the same" in said
    assert "with 62% of the visual tokens a block" in said
    pruned = vp.load_pruned(out)
    assert sum(int(p.count_nonzero()) for p in pruned.parameters()) < 0.6 * pruned.num_parameters()


def own_data(folder: Path, text: str) -> Path:
    """A JSONL of six scenes of digits; ``text`` has places for a caption, a question and its answer."""
    scenes = vp.zoo.DigitScenes("test", 6)
    lines = []
    for number, (scene, asked) in enumerate(zip(scenes, scenes.asked(0), strict=True)):
        Image.fromarray(scene.image).save(folder / f"{number}.png")
        words = text.format(caption=scene.caption, question=asked.text, answer=asked.answer)
        split = "calibration" if number % 2 else "test"
        lines.append(json.dumps({"image": f"{number}.png", "text": words, "split": split}))
    path = folder / "own.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize(
    ("name", "model", "text", "said", "options"),
    [
        ("prune_clip", "clip-digits", "{caption}", "recall@1 is the same", ["--steps", 1]),
        ("prune_llava", "llava-digits", "<image> {question} {answer}", "lm_loss is the same", []),
    ],
)
def test_own_data(name, model, text, said, options, monkeypatch, tmp_path, capsys):
    run(monkeypatch, name, vp.zoo.path(model), own_data(tmp_path, text), "--out", tmp_path / "out", *options)
    assert said in capsys.readouterr().out
