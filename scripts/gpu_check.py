"""Check this package on an NVIDIA GPU within a fixed time: build, smoke, benchmarks, tests, sanitizers, ncu, models.

    python scripts/gpu_check.py OUT [--budget SECONDS] [--parts NAME ...]

Needs no network and installs nothing: the module is built, or taken from a wheel that was built before (``make
gpu-wheel``), into the source tree, and the interpreter that runs this must have torch and pytest. A part gets its limit
or what is left of the budget, whichever is less, and writes as it goes: what it has found is in OUT whatever becomes of
it or of a later part. A part that fails does not stop the next. The exit code is 1 if any failed.

OUT has eight files at most: summary.log, build.log, tests.log (smoke and tests), bench.log and results.jsonl (kernels
and models), memcheck.log, racecheck.log, ncu.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {
    "machine": 10,
    "build": 120,
    "smoke": 40,
    "kernels": 150,
    "tests": 150,
    "sanitizers": 90,
    "ncu": 60,
    "models": 600,
}
LEAST = 5.0  # seconds that are worth starting a part for
GRACE = 10.0  # from the interrupt, upon which pytest reports, to the end
SAMPLE = 150  # tests under the sanitizers

Command = Sequence[str]


@dataclass
class Visit:
    """One run of all parts: where it writes, and how much time is left."""

    out: Path
    budget: float = 540.0
    root: Path = ROOT
    python: str = sys.executable
    clock: Callable[[], float] = time.monotonic
    failed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self._end = self.clock() + self.budget

    def say(self, line: str) -> None:
        """Print a line and have it on disk in summary.log."""
        print(line, flush=True)
        with (self.out / "summary.log").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def run(self, name: str) -> bool:
        """Run the part ``name`` within its limit, and say how it ended."""
        began = self.clock()
        limit = min(LIMITS[name], self._end - began)
        if limit < LEAST:
            found = "left out, no time left"
        else:
            try:
                found = PARTS[name](self, began + limit)
            except Exception as error:  # a part of ours that breaks must not take the others with it
                found = f"{type(error).__name__}: {error}"
        if found:
            self.failed.append(name)
        self.say(f"gpu-check: {name}: {found or 'ok'}, {self.clock() - began:.0f} s of {limit:.0f}")
        return not found

    def step(self, log: str, *commands: Command, until: float) -> str:
        """Run commands side by side, each appending to ``log`` (``{i}`` in it: to one each); return what went wrong."""
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(self.root), os.environ.get("PYTHONPATH"))))
        running: list[subprocess.Popen[bytes] | None] = []
        wrong: dict[int, str] = {}
        for i, command in enumerate(commands):
            with (self.out / log.format(i=i)).open("ab") as file:
                file.write(f"$ {' '.join(command)}\n".encode())
                file.flush()
                try:
                    running.append(
                        subprocess.Popen(
                            command,
                            stdin=subprocess.DEVNULL,
                            stdout=file,
                            stderr=subprocess.STDOUT,
                            cwd=self.root,
                            env=environment,
                            start_new_session=True,
                            preexec_fn=_heed_interrupts,
                        )
                    )
                except OSError as error:
                    file.write(f"{error}\n".encode())
                    running.append(None)
                    wrong[i] = f"{command[0]} not found"
        grace = min(GRACE, (until - self.clock()) / 4)
        late: list[int] = []
        while still := [i for i, process in enumerate(running) if process is not None and process.poll() is None]:
            now = self.clock()
            if now >= until - grace and not late:
                late = still
                _signal(running, signal.SIGINT)
            if now >= until:
                break
            time.sleep(0.02)
        _signal(running, signal.SIGKILL)
        for i, process in enumerate(running):
            if process is None:
                continue
            code = process.wait()
            if i in late:
                wrong[i] = "out of time"
            elif code < 0:
                wrong[i] = f"killed by signal {-code}"
            elif code:
                wrong[i] = f"exit code {code}"
        return "; ".join(wrong[i] for i in sorted(wrong))

    def pytest(self, *options: str) -> list[str]:
        """Return the command that runs pytest with ``options``, without what the project's settings make fail here."""
        return [self.python, "-m", "pytest", "-p", "no:cacheprovider", "-W", "default", "-v", "--tb=short", *options]


def _heed_interrupts() -> None:
    """In the child: be interruptible also where this script was started in the background, which ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _signal(running: Sequence[subprocess.Popen[bytes] | None], which: signal.Signals) -> None:
    """Send a signal to all processes of each command, also to those that outlived it."""
    for process in running:
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, which)


# ---- the parts ------------------------------------------------------------------------------------------------------


def machine(visit: Visit, until: float) -> str:
    """Log the GPU, the versions, and whether CUB lies beside nvcc."""
    versions = (
        "import sys, torch, transformers, numpy, pytest; print(sys.version);"
        "print('torch', torch.__version__, 'CUDA', torch.version.cuda, 'sees a GPU:', torch.cuda.is_available());"
        "print('transformers', transformers.__version__, 'numpy', numpy.__version__, 'pytest', pytest.__version__)"
    )
    commands = [["nvidia-smi"], ["nvcc", "--version"], [visit.python, "-c", versions]]
    found = [visit.step("summary.log", command, until=until) for command in commands]
    visit.say(f"gpu-check: CUB: {_cub() or 'not where nvcc looks'}")
    visit.say(f"gpu-check: commit {os.environ.get('COMMIT') or 'unknown'}, csrc {digest(visit.root)}")
    return "; ".join(filter(None, found))


def _cub() -> Path | None:
    """Return the folder of headers with CUB in it among those where nvcc looks."""
    try:
        asked = ["nvcc", "--dryrun", "-x", "cu", "-E", "/dev/null"]
        said = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=5).stderr
    except (OSError, subprocess.TimeoutExpired):
        return None
    folders = (Path(path).resolve() for path in re.findall(r'"(?:-I)?(/[^"]+)"', said))
    return next((folder for folder in folders if (folder / "cub/block/block_scan.cuh").is_file()), None)


def digest(root: Path) -> str:
    """Return a hash of what the compiled module is made of (the Makefile's gpu-wheel computes the same)."""
    files = [root / "CMakeLists.txt", *sorted((f for f in (root / "csrc").rglob("*") if f.is_file()), key=str)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def build(visit: Visit, until: float) -> str:
    """Take the module from a wheel that was built of these sources, or build it for the GPU in the machine."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    for wheel in sorted((visit.root / "gpu-wheel" / digest(visit.root)).glob(f"*-{tag}-*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.startswith("vlprune_ext/_C.")]
            archive.extractall(visit.root, members)
        if not _built(visit, until):
            visit.say(f"gpu-check: the module is that of {wheel.name}")
            return ""
        for name in members:
            (visit.root / name).unlink()
    asked = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    capability = re.findall(r"^(\d+)\.(\d+)$", answer, re.MULTILINE)
    folder = visit.root / "build" / "gpu-check"
    shutil.rmtree(folder, ignore_errors=True)
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DVLPRUNE_CUDA=ON", f"-DPython_EXECUTABLE={visit.python}"]
    options += [f"-DCMAKE_CUDA_ARCHITECTURES={''.join(capability[0])}-real"] if capability else []
    options += ["-G", "Ninja"] if shutil.which("ninja") else []
    for command in (
        ["cmake", "-S", str(visit.root), "-B", str(folder), *options],
        ["cmake", "--build", str(folder), "-j", str(os.cpu_count())],
        ["cmake", "--install", str(folder), "--prefix", str(visit.root)],
    ):
        if found := visit.step("build.log", command, until=until):
            return found
    return _built(visit, until)


def _built(visit: Visit, until: float) -> str:
    program = "from vlprune_ext._native import build_info as b; i = b(); print(i); exit(not i['cuda_built'])"
    return visit.step("build.log", [visit.python, "-c", program], until=until)


def smoke(visit: Visit, until: float) -> str:
    """Capture and replay each op in a CUDA graph."""
    return visit.step("tests.log", visit.pytest("tests/ops", "-m", "gpu", "-k", "cuda_graph"), until=until)


def _benchmarks(visit: Visit, folder: str, first: Sequence[str], until: float) -> str:
    """Run a folder of benchmarks, the files ``first`` before the others."""
    found = sorted(path.name for path in (visit.root / "benchmarks" / folder).glob("bench_*.py"))
    names = dict.fromkeys([*(f"bench_{name}.py" for name in first), *found])
    places = [f"benchmarks/{folder}/{name}" for name in names]
    rows = ["--bench-rows", str(visit.out / "results.jsonl")]
    command = visit.pytest(*places, "-o", "python_files=bench_*.py", *rows)
    return visit.step("bench.log", command, until=until)


def kernels(visit: Visit, until: float) -> str:
    """Time the kernels, alone on the GPU."""
    return _benchmarks(visit, "kernels", ["weights", "token", "ablation"], until)


def tests(visit: Visit, until: float) -> str:
    """Run every test that needs a GPU, eight at a time where pytest-xdist is there."""
    workers = ["-n", "8", "--dist", "loadgroup"] if importlib.util.find_spec("xdist") else []
    command = visit.pytest("tests", "-m", "gpu", "-p", "no:benchmark", "--durations=15", *workers)
    return visit.step("tests.log", command, until=until)


def sanitizers(visit: Visit, until: float) -> str:
    """Run a sample of the ops' tests under memcheck and, beside it, under racecheck."""
    of_ops = ["tests/ops", "-m", "gpu", "-k", "not 2_31 and not cuda_graph", "--sample", str(SAMPLE)]
    # Only this extension's kernels are instrumented: torch's own are not ours to check, and each costs time.
    options = ["--kernel-regex", "kns=vlprune", "--report-api-errors", "no", "--error-exitcode", "9"]
    tools = ("memcheck", "racecheck")
    commands = [
        ["compute-sanitizer", "--tool", tool, *options, *visit.pytest(*of_ops, "-p", "no:benchmark")] for tool in tools
    ]
    result = visit.step("check-{i}.log", *commands, until=until)
    for i, tool in enumerate(tools):
        (visit.out / f"check-{i}.log").replace(visit.out / f"{tool}.log")
    return result


def ncu(visit: Visit, until: float) -> str:
    """Read the hardware counters of a dozen launches, the clocks as they are."""
    options = ["--clock-control", "none", "--kernel-name-base", "demangled", "--kernel-name", "regex:vlprune"]
    options += ["--section", "SpeedOfLight", "--section", "ComputeWorkloadAnalysis", "--csv", "--page", "raw"]
    command = ["ncu", *options, visit.python, "benchmarks/launches.py"]
    return visit.step("ncu.csv", command, until=until)


def models(visit: Visit, until: float) -> str:
    """Time whole models with what is left: scoring a tower, the coarse stage, a prefill of 7B with FastV."""
    return _benchmarks(visit, "models", ["scoring", "coarse_stage", "prune_tokens"], until)


PARTS: dict[str, Callable[[Visit, float], str]] = {
    part.__name__: part for part in (machine, build, smoke, kernels, tests, sanitizers, ncu, models)
}

# ---- what was found -------------------------------------------------------------------------------------------------

# Column: names of the metric in ncu's sections, by version.
COUNTERS = {
    "us": ("gpu__time_duration.sum",),
    "DRAM %": (
        "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
        "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    ),
    "L2 %": ("lts__throughput.avg.pct_of_peak_sustained_elapsed",),
    "issue %": (
        "sm__inst_issued.avg.pct_of_peak_sustained_active",
        "sm__issue_active.avg.pct_of_peak_sustained_active",
    ),
    "ALU %": ("sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",),
}
MICROSECONDS = {"nsecond": 1e-3, "ns": 1e-3, "usecond": 1.0, "us": 1.0, "msecond": 1e3, "ms": 1e3}


def counters(path: Path) -> list[str]:
    """Return a line a launch of ncu.csv: the kernel and COUNTERS, "?" for what is not in the file."""
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.startswith('"')]
    units, *launches = list(csv.DictReader(lines)) or [{}]
    found = []
    for launch in launches:
        values = []
        for column, names in COUNTERS.items():
            name = next((name for name in names if launch.get(name)), None)
            if name is None:
                values.append(f"{column.replace('%', '').strip()} ?")
                continue
            value = float(launch[name].replace(",", "")) * MICROSECONDS.get(units.get(name, ""), 1.0)
            values.append(f"{column} {value:.1f}")
        kernel = launch.get("Kernel Name", "?").replace("void ", "").replace("<unnamed>::", "").split("(")[0]
        found.append(f"  {kernel[:72]}: {', '.join(values)}")
    return found


def _table(path: Path) -> list[str]:
    """Return a short line for each row of results.jsonl."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import table

    lines = []
    for row in table.read(path)[1]:
        copy, ratio = row.get("of copy"), row.get("ratio")
        bound = "" if copy is None else f", {100 * copy:.0f}% of copy"
        beside = "" if ratio is None else f", {ratio:.2f}x {row['baseline']}"
        lines.append(f"  {row['what']} | {row['shape']} | {row['dtype']}: {row['ms']:.4g} ms{bound}{beside}")
    return lines


def report(visit: Visit) -> None:
    """Print the tables, and the ends of the logs of what failed."""
    for name, lines in (("results.jsonl", _table), ("ncu.csv", counters)):
        if (visit.out / name).is_file():
            try:
                print("\n".join([name, *lines(visit.out / name)]))
            except (ValueError, KeyError) as error:
                print(f"{name}: {error}")
    logs = {"build": "build", "smoke": "tests", "tests": "tests", "kernels": "bench", "models": "bench"}
    of_failed = [logs.get(name, "") for name in visit.failed]
    of_failed += ["memcheck", "racecheck"] if "sanitizers" in visit.failed else []
    for log in dict.fromkeys(of_failed):
        path = visit.out / f"{log}.log"
        if path.is_file():
            print(f"---- {path.name}")
            print("\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-25:]))
    print(f"gpu-check: {', '.join(visit.failed) or 'nothing'} failed; all logs in {visit.out}")


def main(arguments: Sequence[str] | None = None, **of_visit: Any) -> int:
    parser = argparse.ArgumentParser(description="Check this package on an NVIDIA GPU within a fixed time.")
    parser.add_argument("out", type=Path, help="folder for logs and results")
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything (540)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    given = parser.parse_args(arguments)
    visit = Visit(given.out.absolute(), given.budget, **of_visit)
    for name in (name for name in PARTS if name in given.parts):
        if not visit.run(name) and name == "build":
            break  # nothing to test
    report(visit)
    return 1 if visit.failed else 0


if __name__ == "__main__":
    sys.exit(main())
