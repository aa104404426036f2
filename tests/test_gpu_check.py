"""scripts/gpu_check.py with tools and a clock that are not real: order, limits, and what survives a kill."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from sampling import evenly

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "gpu_check.py"
TOOLS = ("nvidia-smi", "nvcc", "cmake", "ninja", "compute-sanitizer", "ncu", "python-with-torch")
# Every tool: which part calls it, what it was called with, what that part's file says, else a line and a second.
TOOL = """#!/bin/sh
name=$(basename "$0")
case "$name $*" in
  nvidia-smi*|nvcc*|*"import sys, torch"*) part=machine ;;
  compute-sanitizer*) part=sanitizers ;;
  cmake*|*build_info*) part=build ;;
  ncu*) part=ncu ;;
  *benchmarks/kernels*) part=kernels ;;
  *benchmarks/models*) part=models ;;
  *cuda_graph*) part=smoke ;;
  *"-m pytest"*) part=tests ;;
esac
{ printf '%s' "$part $name"; printf ' [%s]' "$@"; echo; } >> "$FAKE/calls"
if [ -f "$FAKE/$part" ]; then . "$FAKE/$part"; fi
echo "$name was here"
case "$*" in *compute_cap*) echo 9.0 ;; esac
echo 1 >> "$FAKE/clock"
"""


def load():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # where dataclasses look up what their annotations name
    spec.loader.exec_module(module)
    return module


gpu_check = load()
PARTS = list(gpu_check.PARTS)


class Place:
    """A source tree, tools on PATH, a clock that only tools move, and a folder for results."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fake, self.out, self.root = tmp_path / "fake", tmp_path / "out", tmp_path / "root"
        bin_folder = tmp_path / "bin"
        for folder in (self.fake, bin_folder, self.root / "csrc", self.root / "vlprune_ext"):
            folder.mkdir(parents=True)
        (self.root / "CMakeLists.txt").write_text("project")
        (self.root / "csrc" / "ops.h").write_text("ops")
        for name in TOOLS:
            (bin_folder / name).write_text(TOOL)
            (bin_folder / name).chmod(0o755)
        self.bin = bin_folder
        monkeypatch.setenv("PATH", f"{bin_folder}:/usr/bin:/bin")
        monkeypatch.setenv("FAKE", str(self.fake))

    def part_does(self, part: str, commands: str) -> None:
        (self.fake / part).write_text(commands + "\n")

    def clock(self) -> float:
        path = self.fake / "clock"
        return float(sum(map(int, path.read_text().split()))) if path.is_file() else 0.0

    def visit(self, parts: list[str] = PARTS, budget: float = 540.0):
        visit = gpu_check.Visit(self.out, budget, self.root, "python-with-torch", self.clock)
        for part in parts:
            if not visit.run(part) and part == "build":
                break
        return visit

    def calls(self) -> list[str]:
        return (self.fake / "calls").read_text().splitlines()

    def summary(self) -> dict[str, str]:
        lines = re.findall(r"^gpu-check: (\w+): (.+), (\d+ s of \d+)$", (self.out / "summary.log").read_text(), re.M)
        return {part: found for part, found, _ in lines}

    def limits(self) -> dict[str, tuple[int, int]]:
        text = (self.out / "summary.log").read_text()
        return {p: (int(a), int(b)) for p, a, b in re.findall(r"^gpu-check: (\w+): .+, (\d+) s of (\d+)$", text, re.M)}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Place:
    return Place(tmp_path, monkeypatch)


def test_parts_run_in_order_each_within_its_limit(place):
    assert place.visit().failed == []
    assert list(dict.fromkeys(line.split()[0] for line in place.calls())) == PARTS
    assert PARTS == ["machine", "build", "smoke", "kernels", "tests", "sanitizers", "ncu", "models"]
    limits = place.limits()
    assert {part: limits[part][1] for part in PARTS[:-1]} == {p: gpu_check.LIMITS[p] for p in PARTS[:-1]}
    assert limits["models"][1] == 540 - sum(took for part, (took, _) in limits.items() if part != "models")
    assert len(list(place.out.iterdir())) <= 8


def test_commands(place):
    place.visit()
    calls = {part: [line for line in place.calls() if line.startswith(part + " ")] for part in PARTS}
    assert any("[-DCMAKE_CUDA_ARCHITECTURES=90-real]" in line for line in calls["build"])
    assert "[tests/ops] [-m] [gpu] [-k] [cuda_graph]" in calls["smoke"][0]
    for line in calls["sanitizers"]:  # one word for -k, or pytest would take the others for files
        assert "[tests/ops] [-m] [gpu] [-k] [not 2_31 and not cuda_graph] [--sample] [150]" in line
    assert sorted(re.search(r"\[--tool\] \[(\w+)\]", line)[1] for line in calls["sanitizers"]) == [
        "memcheck",
        "racecheck",
    ]
    assert "[tests] [-m] [gpu]" in calls["tests"][0]
    assert "[--clock-control] [none]" in calls["ncu"][0]
    rows = f"[--bench-rows] [{place.out / 'results.jsonl'}]"
    assert [rows in calls[part][0] for part in ("kernels", "models")] == [True, True]


def test_benchmarks_are_there(place):
    """pytest refuses a file that is not there, and would run nothing."""
    extra = place.root / "benchmarks" / "kernels" / "bench_gather.py"
    extra.parent.mkdir(parents=True)
    extra.touch()
    place.visit(["kernels", "models"])
    named = [word for line in place.calls() for word in re.findall(r"\[(benchmarks/[^]]+)\]", line)]
    assert len(named) == 7
    assert named[3] == "benchmarks/kernels/bench_gather.py"
    assert all((ROOT / name).is_file() for name in named if name != named[3])


def test_cub_is_looked_for_where_nvcc_looks(place, tmp_path):
    header = tmp_path / "cuda" / "include" / "cub" / "block" / "block_scan.cuh"
    header.parent.mkdir(parents=True)
    header.touch()
    place.part_does("machine", f"""echo '#$ INCLUDES="-I/nothing" "-isystem" "{tmp_path}/cuda/include"' >&2""")
    place.visit(["machine"])
    assert f"gpu-check: CUB: {tmp_path}/cuda/include\n" in (place.out / "summary.log").read_text()


def test_a_part_that_takes_too_long_leaves_less_for_the_others(place):
    place.part_does("kernels", "echo measured; echo 400 >> $FAKE/clock; sleep 60")
    assert place.visit().failed == ["kernels"]
    assert place.summary()["kernels"] == "out of time"
    assert "measured" in (place.out / "bench.log").read_text()
    limits = place.limits()
    assert limits["tests"][1] == 540 - sum(limits[part][0] for part in PARTS[: PARTS.index("tests")]) < 150


def test_parts_for_which_no_time_is_left_are_named(place):
    assert place.visit(budget=14).failed == ["kernels", "tests", "sanitizers", "ncu", "models"]
    assert place.summary()["smoke"] == "ok"
    assert place.summary()["models"] == "left out, no time left"


@pytest.mark.parametrize("heeded", [signal.SIG_DFL, signal.SIG_IGN], ids=["in front", "in the background"])
def test_an_interrupt_comes_before_the_end(heeded, place):
    before = signal.signal(signal.SIGINT, heeded)
    # Not by the shell's trap: a signal that arrives while the shell opens a file may be lost.
    program = (
        "import signal, sys, time; signal.signal(signal.SIGINT, lambda *_: (print('reported'), sys.exit(2)));"
        "open(sys.argv[1], 'a').write('141\\n'); time.sleep(20); open(sys.argv[1], 'a').write('99\\n')"
    )
    place.part_does("tests", f'exec {sys.executable} -c "{program}" $FAKE/clock')
    try:
        assert place.visit(["tests"]).failed == ["tests"]
    finally:
        signal.signal(signal.SIGINT, before)
    assert place.summary()["tests"] == "out of time"
    assert "reported" in (place.out / "tests.log").read_text()


def test_what_a_part_left_running_is_ended(place):
    place.part_does("smoke", "sleep 60 & echo $! > $FAKE/left")
    assert place.visit(["smoke"]).failed == []
    left = (place.fake / "left").read_text().strip()
    status = Path(f"/proc/{left}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()


@pytest.mark.parametrize("part", PARTS)
def test_a_tool_that_is_killed_stops_no_other_part(place, part):
    place.part_does(part, "echo so far; kill -9 $$")
    assert place.visit().failed == [part]
    assert "killed by signal 9" in place.summary()[part]
    others = PARTS[: PARTS.index("build") + 1] if part == "build" else PARTS
    assert {p: found for p, found in place.summary().items() if p != part} == {p: "ok" for p in others if p != part}
    text = "".join(path.read_text() for path in place.out.iterdir())
    assert "so far" in text


@pytest.mark.parametrize("part", PARTS)
def test_results_survive_a_kill_of_the_script_in_a_later_part(place, part):
    place.part_does("kernels", f"echo '{{\"a row\": 1}}' >> {place.out}/results.jsonl")
    place.part_does(part, "kill -9 $PPID; exit 0")
    program = (
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import gpu_check as g; from pathlib import Path as P;"
        f"v = g.Visit(P({str(place.out)!r}), 540.0, P({str(place.root)!r}), 'python-with-torch');"
        "[v.run(name) for name in g.PARTS]"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == -9
    before = PARTS[: PARTS.index(part)]
    if before:
        assert list(place.summary()) == before
        assert set(place.summary().values()) == {"ok"}
    assert (place.out / "results.jsonl").is_file() == ("kernels" in before)
    assert (place.out / "racecheck.log").is_file() == ("sanitizers" in before)


def test_a_tool_that_is_not_there(place):
    (place.bin / "ncu").unlink()
    assert place.visit().failed == ["ncu"]
    assert place.summary()["ncu"] == "ncu not found"


def test_a_test_run_without_a_test_fails(place):
    place.part_does("smoke", "exit 5")  # pytest's, when it collected nothing
    assert place.visit(["smoke"]).failed == ["smoke"]
    assert place.summary()["smoke"] == "exit code 5"


def put_wheel(place: Place, digest: str) -> Path:
    folder = place.root / "gpu-wheel" / digest
    folder.mkdir(parents=True)
    wheel = folder / f"vlprune_ext-1-cp{sys.version_info.major}{sys.version_info.minor}-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vlprune_ext/_C.so", "compiled")
        archive.writestr("vlprune_ext/plan.py", "not to be taken")
    return place.root / "vlprune_ext" / "_C.so"


def test_a_wheel_of_these_sources_is_taken(place):
    module = put_wheel(place, gpu_check.digest(place.root))
    assert place.visit(["build"]).failed == []
    assert module.read_text() == "compiled"
    assert not (place.root / "vlprune_ext" / "plan.py").exists()
    assert not any("cmake" in line for line in place.calls())


def test_a_wheel_that_does_not_load_is_replaced_by_a_build(place):
    module = put_wheel(place, gpu_check.digest(place.root))
    place.part_does("build", '[ "$name" = cmake ] || [ -f $FAKE/second ] || { touch $FAKE/second; exit 1; }')
    assert place.visit(["build"]).failed == []
    assert not module.exists()
    assert sum("cmake" in line for line in place.calls()) == 3


def test_a_wheel_of_other_sources_is_not_taken(place):
    module = put_wheel(place, "0" * 12)
    assert place.visit(["build"]).failed == []
    assert not module.exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_names_the_wheel_by_the_same_digest():
    printed = subprocess.run(["make", "-n", "gpu-wheel"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"gpu-wheel/{gpu_check.digest(ROOT)}" in printed


def test_counters_of_ncu(tmp_path):
    path = tmp_path / "ncu.csv"
    path.write_text(
        "$ ncu --csv\n==PROF== Connected\n"
        '"ID","Kernel Name","gpu__time_duration.sum","gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",'
        '"lts__throughput.avg.pct_of_peak_sustained_elapsed","sm__inst_issued.avg.pct_of_peak_sustained_active"\n'
        '"","","nsecond","%","%","%"\n'
        '"0","void vlprune::cuda::perturb_kernel<float>(Args)","12,500","60.5","40","71.25"\n'
    )
    (line,) = gpu_check.counters(path)
    assert line.strip() == "vlprune::cuda::perturb_kernel<float>: us 12.5, DRAM % 60.5, L2 % 40.0, issue % 71.2, ALU ?"


def test_the_command_line(place, capsys):
    fields = {"root": place.root, "python": "python-with-torch", "clock": place.clock}
    place.part_does("smoke", "echo a test fell over; exit 1")
    assert gpu_check.main([str(place.out), "--parts", "machine", "smoke"], **fields) == 1
    printed = capsys.readouterr().out
    assert "gpu-check: machine: ok" in printed
    assert "a test fell over" in printed
    assert "gpu-check: smoke failed" in printed
    with pytest.raises(SystemExit):
        gpu_check.main([str(place.out), "--parts", "kernel"])


@pytest.mark.parametrize(
    ("groups", "count", "expected"),
    [("aaaabbbbcc", 6, [0, 2, 4, 6, 8, 9]), ("aabbbbbb", 5, [0, 1, 2, 4, 6]), ("ab", 5, [0, 1]), ("", 3, [])],
)
def test_sample_of_the_tests(groups, count, expected):
    assert evenly(groups, count) == expected


def test_environment_is_kept_for_the_tools(place, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    place.part_does("smoke", 'echo "path $PYTHONPATH"')
    place.visit(["smoke"])
    assert f"path {place.root}{os.pathsep}/somewhere" in (place.out / "tests.log").read_text()
