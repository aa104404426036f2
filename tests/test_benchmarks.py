"""The benchmarks' own tools: timing with a GPU that is not real, rows that survive, the table; and one benchmark."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import types
import weakref
from pathlib import Path

import pytest
import table
import timing
import torch

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


class FakeCuda:
    """What timing uses of torch.cuda, with a clock that `work` moves; what a graph captures works when replayed."""

    def __init__(self) -> None:
        self.now, self.captured = 0.0, None  # ms
        self.CUDAGraph = lambda: types.SimpleNamespace(work=0.0, replay=None)
        self.Stream = lambda: types.SimpleNamespace(wait_stream=lambda _: None)
        self.current_stream = self.Stream

    def work(self, milliseconds: float) -> None:
        if self.captured is None:
            self.now += milliseconds
        else:
            self.captured.work += milliseconds

    def get_device_properties(self, _device):
        return types.SimpleNamespace(L2_cache_size=1 << 10)

    def synchronize(self) -> None:
        if self.captured is not None:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    @contextlib.contextmanager
    def stream(self, _stream):
        yield

    @contextlib.contextmanager
    def graph(self, graph):
        self.captured = graph
        try:
            yield
        finally:
            self.captured = None
        graph.replay = lambda: self.work(graph.work)

    def Event(self, enable_timing):
        event = types.SimpleNamespace(at=0.0)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda later: later.at - event.at
        return event


@pytest.fixture
def cuda(monkeypatch) -> FakeCuda:
    monkeypatch.setattr(timing.GpuTimer, "_settle", lambda self: True)
    return FakeCuda()


@pytest.fixture
def timer(cuda) -> timing.GpuTimer:
    return timing.GpuTimer(CPU, cuda)


@pytest.mark.parametrize(("milliseconds", "calls"), [(0.01, 16), (0.5, 5), (30.0, 1)])
def test_a_graph_has_as_many_calls_as_its_length_wants(milliseconds, calls, cuda, timer):
    sets = timer.sets(lambda: (torch.zeros(4),))
    assert len(sets) == timing.SETS
    seen = []

    def call(tensor):
        seen.append(tensor.data_ptr() if cuda.captured else None)
        cuda.work(milliseconds)

    run = timer.run(call, sets)
    assert run.once() == pytest.approx(milliseconds / 1e3)
    assert len(set(filter(None, seen))) == calls  # of other sets each
    assert run.notes == ""


def test_what_a_captured_call_returns_lives_until_the_capture_ends(cuda, timer):
    results, alive = [], []

    def call(tensor):
        result = tensor.clone()
        if cuda.captured:
            alive.append(all(earlier() is not None for earlier in results))
            results.append(weakref.ref(result))
        cuda.work(0.01)
        return result

    timer.run(call, timer.sets(lambda: (torch.zeros(4),)))
    assert alive == [True] * timing.SETS
    assert all(result() is None for result in results)


def test_setup_comes_before_each_replay_and_is_not_timed(cuda, timer):
    sets = timer.sets(lambda: (torch.zeros(1),))

    def setup(weight):
        weight.fill_(1)
        cuda.work(1000)

    def call(weight):
        assert cuda.captured or weight.item() == 1
        weight.fill_(0)
        cuda.work(0.5)

    run = timer.run(call, sets, setup)
    run.ready()
    assert sum(weight.item() for (weight,) in sets) == 5  # those that the graph has
    assert run.once() == pytest.approx(0.5e-3)


def test_a_call_that_cannot_be_captured_is_timed_by_the_host(cuda, timer):
    run = timer.run(lambda: cuda.synchronize(), [()])
    assert run.notes == "not as a graph (operation not permitted when stream is capturing)"
    assert 0 < run.once() < 1
    assert timer.run(lambda: cuda.synchronize(), [()], graph=False).notes == ""


def test_sets_are_bounded_by_memory(timer, monkeypatch):
    monkeypatch.setattr(timing, "SETS_BYTES", 1000)
    assert len(timer.sets(lambda: ([torch.zeros(50)], torch.zeros(25)))) == 3
    assert len(timer.sets(lambda: (torch.zeros(500),))) == 1


def test_clocks_settle_when_three_batches_agree(monkeypatch):
    monkeypatch.setattr(torch, "randn", lambda *size, device: torch.zeros(1))
    taken = iter([3.0, 2.0, 1.0, 1.001, 1.002, 9.0])
    monkeypatch.setattr(timing.GpuTimer, "seconds_of", lambda self, call: next(taken))
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: a)
    assert timing.GpuTimer(CPU, FakeCuda()).settled
    assert next(taken) == 9.0
    monkeypatch.setattr(timing.GpuTimer, "seconds_of", lambda self, call: float(id(object())))
    assert not timing.GpuTimer(CPU, FakeCuda())._settle(limit=0.0)


def test_ceilings_are_of_the_row_s_size(cuda, timer, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "copy_", lambda into, source: cuda.work(into.numel() * 1e-3))
    ceilings = timing.Ceilings(timer, CPU)
    assert ceilings.copy_seconds(2000) == pytest.approx(1e-3)
    monkeypatch.setattr(torch, "matmul", lambda a, b: cuda.work(2 * len(a) ** 3 * 1e-6))
    assert timing.Ceilings(timer, CPU).product_seconds(1e6, torch.float32) == pytest.approx(1e-3)


MACHINE = {"device": "A GPU (2)", "threads": 1, "isa": "avx2", "torch": "2", "cuda_version": None, "commit": "abc"}


def row(what: str, ms: float) -> dict:
    return {"what": what, "shape": "s", "dtype": "float32", "ms": ms}


def test_rows_survive_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    table.append(path, {"machine": MACHINE})
    table.append(path, row("a", 1.0))
    with path.open("a") as file:
        file.write('{"what": "b", "sha')
    assert table.read(path) == (MACHINE, [row("a", 1.0)])
    path.write_text('{"what": "b"}\n')
    with pytest.raises(ValueError, match="no line about the machine"):
        table.read(path)


def test_rows_measured_again_replace_the_old(tmp_path):
    table.write(MACHINE, [row("b", 1.0), row("a", 2.0)], tmp_path)
    path = table.write(MACHINE | {"commit": "def"}, [row("b", 3.0)], tmp_path)
    assert path.name == "a-gpu-2.md"
    rows = json.loads(path.with_suffix(".json").read_text())["rows"]
    assert [(r["what"], r["ms"], r["commit"]) for r in rows] == [("a", 2.0, "abc"), ("b", 3.0, "def")]
    assert path.read_text().count("\n| a | s | float32 | 2 |") == 1


def test_a_benchmark_writes_rows_and_a_table(tmp_path):
    command = [sys.executable, "-m", "pytest", "benchmarks/kernels/bench_token.py", "-k", "select_tokens and 576", "-q"]
    command += ["-o", "python_files=bench_*.py", "-o", "filterwarnings=default", "-p", "no:cacheprovider"]
    command += ["--bench-rows", str(tmp_path / "rows.jsonl"), "--bench-out", str(tmp_path), "--bench-name", "results"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # no worker of xdist
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    machine, (measured,) = table.read(tmp_path / "rows.jsonl")
    assert machine["commit"]
    assert measured["what"] == "select_tokens"
    assert measured["ms"] > 0
    assert measured["ratio"] == pytest.approx(measured["baseline ms"] / measured["ms"])
    assert measured["of copy"] > 0
    assert json.loads((tmp_path / "results.json").read_text())["rows"][0]["ms"] == measured["ms"]
    assert "| select_tokens | score=[8, 576], keep=144 | float32 |" in (tmp_path / "results.md").read_text()
