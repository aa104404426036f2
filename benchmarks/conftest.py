"""What every benchmark shares: the device, fair timing beside a baseline, and the table of results.

Results are written only when asked: ``--bench-out DIR`` (``make bench`` does) writes DIR/<device>.json and a Markdown
table beside it.
"""

from __future__ import annotations

import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
KEY = ("what", "shape", "dtype")
COLUMNS = (*KEY, "ms", "GB/s", "TFLOP/s", "baseline", "baseline ms", "ratio", "commit", "notes")

_rows: list[dict[str, Any]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-out", type=Path, help="folder for <device>.json and <device>.md; not written without")
    parser.addoption("--bench-name", help="name of these files, instead of the device's")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: CUDA events on a GPU (launch overhead included only where the GPU waits for it)."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@pytest.fixture
def stopwatch(device) -> Callable[[Callable[[], object]], float]:
    """``stopwatch(run)``: seconds of one call."""
    return lambda run: timed(run, device)


@pytest.fixture
def record() -> Callable[..., None]:
    """``record(what, shape, dtype=..., **numbers)``: one row of the table; keys beyond COLUMNS go to the JSON only."""

    def add(what: str, shape: str, **values: Any) -> None:
        _rows.append({"what": what, "shape": shape, **values})

    return add


@pytest.fixture
def compare(benchmark, device, record) -> Callable[..., dict[str, Any]]:
    """Time ``ours`` beside ``baseline``: turn by turn in one run, caches cold before each, medians of ``rounds``."""
    # Larger than the last-level caches in use (50 MB on an H100, 36 MB on a Xeon).
    cold = torch.empty((256 if device.type == "cuda" else 64) << 20, dtype=torch.uint8, device=device)

    def run(
        what: str,
        shape: str,
        ours: Callable[[], object],
        baseline: Callable[[], object] | None = None,
        *,
        baseline_name: str = "",
        dtype: torch.dtype = torch.float32,
        flops: float = 0,
        moved: float = 0,  # bytes
        rounds: int = 7,
        **extra: Any,
    ) -> dict[str, Any]:
        of_ours: list[float] = []
        of_baseline: list[float] = []

        def baseline_first() -> None:
            if baseline is not None:
                cold.zero_()
                of_baseline.append(timed(baseline, device))
            cold.zero_()

        benchmark.group = what
        benchmark.pedantic(
            lambda: of_ours.append(timed(ours, device)), setup=baseline_first, rounds=rounds, warmup_rounds=1
        )
        seconds = statistics.median(of_ours[1:])
        row: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "ms": seconds * 1e3}
        if moved:
            row["GB/s"] = moved / seconds / 1e9
        if flops:
            row["TFLOP/s"] = flops / seconds / 1e12
        if baseline is not None:
            other = statistics.median(of_baseline[1:])
            row |= {"baseline": baseline_name, "baseline ms": other * 1e3, "ratio": other / seconds}
        row |= extra
        benchmark.extra_info.update(row)
        record(what, shape, **row)
        return row

    return run


def _commit() -> str:
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
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


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def _table(machine: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    head = (
        f"{machine['device']}, {machine['threads']} CPU threads, {machine['isa']};"
        f" torch {machine['torch']}, CUDA {machine['cuda_version'] or 'not built'}."
        " Medians; ratio = baseline ms / ms (above 1: faster than the baseline).\n"
    )
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(_cell(row.get(column)) for column in COLUMNS) + " |" for row in rows]
    return head + "\n" + "\n".join(lines) + "\n"


def _place(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[key] for key in KEY)


def pytest_sessionfinish(session: pytest.Session) -> None:
    folder = session.config.getoption("--bench-out")
    if folder is None or not _rows:
        return
    machine = _machine()
    name = session.config.getoption("--bench-name") or re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row | {"commit": machine["commit"]} for row in _rows]
    path = folder / f"{name}.json"
    if path.is_file():  # what was not measured again stays, with the commit that it was measured at
        new = {_place(row) for row in rows}
        before = json.loads(path.read_text())["rows"]
        rows = sorted([row for row in before if _place(row) not in new] + rows, key=_place)
    path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    (folder / f"{name}.md").write_text(_table(machine, rows))
    print(f"\nwrote {folder / name}.json and .md")
