"""What every benchmark shares: the device, a comparison with a baseline, and where its rows go.

``--bench-out DIR`` (``make bench``) writes DIR/<device>.json and a Markdown table beside it when all is done;
``--bench-rows FILE`` appends each row to FILE when it is measured. Without either, nothing is written.
"""

from __future__ import annotations

import gc
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import table
import torch
from timing import Call, Ceilings, CpuTimer, GpuTimer, Inputs, timer_of

ROOT = Path(__file__).resolve().parent.parent

_rows: list[table.Row] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-out", type=Path, help="folder for <device>.json and <device>.md; not written without")
    parser.addoption("--bench-name", help="name of these files, instead of the device's")
    parser.addoption("--bench-rows", type=Path, help="file to append each row to when it is measured")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def timer(device) -> CpuTimer | GpuTimer:
    return timer_of(device)


@pytest.fixture(scope="session")
def ceilings(timer, device) -> Ceilings:
    return Ceilings(timer, device)


@pytest.fixture
def stopwatch(timer) -> Callable[[Callable[[], object]], float]:
    """``stopwatch(run)``: seconds of one call by the host's clock, until the device is done."""

    def seconds(run: Callable[[], object]) -> float:
        timer.synchronize()
        begin = time.perf_counter()
        run()
        timer.synchronize()
        return time.perf_counter() - begin

    return seconds


@pytest.fixture
def record(pytestconfig) -> Callable[..., None]:
    """``record(what, shape, dtype=..., **numbers)``: one row; keys beyond table.COLUMNS go to the JSON only."""
    path = pytestconfig.getoption("--bench-rows")

    def add(what: str, shape: str, **values: Any) -> None:
        row = {"what": what, "shape": shape, **values}
        if path is not None:
            if not _rows:
                table.append(path, {"machine": _machine()})
            table.append(path, row)
        _rows.append(row)

    return add


@pytest.fixture
def compare(benchmark, timer, ceilings, record) -> Callable[..., table.Row]:
    """Time ``ours`` beside ``baseline``, turn by turn; medians, and what the machine can do at this size."""

    def run(
        what: str,
        shape: str,
        ours: Call,
        baseline: Call | None = None,
        *,
        inputs: Callable[[], Inputs] = tuple,  # makes a set of what both are called with
        setup: Call | None = None,  # with the same, before each call, not timed
        graph: bool = True,  # on a GPU: the kernels alone, without launches by Python and looks at the data
        baseline_name: str = "",
        dtype: torch.dtype = torch.float32,
        flops: float = 0,
        moved: float = 0,  # bytes
        rounds: int = 7,  # on a CPU
        notes: str = "",
        **extra: Any,
    ) -> table.Row:
        sets = timer.sets(inputs)
        other = None if baseline is None else timer.run(baseline, sets, setup, graph=graph)
        own = timer.run(ours, sets, setup, graph=graph)
        of_ours: list[float] = []
        of_baseline: list[float] = []

        def baseline_first() -> None:
            if other is not None:
                other.ready()
                of_baseline.append(other.once())
            own.ready()

        benchmark.group = what
        benchmark.pedantic(
            lambda: of_ours.append(own.once()),
            setup=baseline_first,
            rounds=timer.rounds(rounds, own.seconds + (other.seconds if other else 0)),
            warmup_rounds=1,
        )
        taken = of_ours[1:] or of_ours  # without the warm-up; --benchmark-disable runs one round
        seconds = statistics.median(taken)
        row: table.Row = {"dtype": str(dtype).removeprefix("torch."), "ms": seconds * 1e3}
        if moved:
            row |= {"GB/s": moved / seconds / 1e9, "of copy": ceilings.copy_seconds(moved) / seconds}
        if flops:
            row |= {"TFLOP/s": flops / seconds / 1e12, "of product": ceilings.product_seconds(flops, dtype) / seconds}
        if other is not None:
            theirs = statistics.median(of_baseline[1:] or of_baseline)
            row |= {"baseline": baseline_name, "baseline ms": theirs * 1e3, "ratio": theirs / seconds}
        quarter = statistics.quantiles(taken) if len(taken) > 1 else [seconds] * 3
        row |= {"spread": (quarter[2] - quarter[0]) / seconds, **extra}
        unsettled = "" if timer.settled else "clocks not settled"
        if said := "; ".join(filter(None, (notes, own.notes, other.notes if other else "", unsettled))):
            row["notes"] = said
        benchmark.extra_info.update(row)
        record(what, shape, **row)
        return row

    return run


def _commit() -> str:
    """Of the working tree; where there is no repository, what COMMIT in the environment says."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT") or "unknown"
    return head.stdout.strip() + (" with changes" if changed.stdout.strip() else "")


def _machine() -> dict[str, Any]:
    import transformers

    import vlprune_ext
    from vlprune_ext import _native

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        name = platform.processor() or platform.machine()
        cpuinfo = Path("/proc/cpuinfo")
        if cpuinfo.is_file():
            models = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text())
            name = models[0] if models else name
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "vlprune_ext": vlprune_ext.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        **_native.build_info(),
    }


def pytest_sessionfinish(session: pytest.Session) -> None:
    folder = session.config.getoption("--bench-out")
    if folder is None or not _rows:
        return
    path = table.write(_machine(), _rows, folder, session.config.getoption("--bench-name"))
    print(f"\nwrote {path} and the .json beside it")


def pytest_collection_finish() -> None:
    """What is imported by now stays, so that no capture of a graph has to look at it again."""
    gc.collect()
    gc.freeze()
