"""The choice of the instruction set, and what a build says of itself."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from vlprune_ext import _native, ops

INFO = _native.build_info()
PROGRAM = "from vlprune_ext import _C; print(_C.cpu.isa())"  # without torch, which is slow to import


def run(isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "VLPRUNE_FORCE_ISA": isa}
    return subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("isa", INFO["available_isas"])
def test_environment_forces_an_instruction_set(isa):
    result = run(isa)
    assert result.stdout.split() == [isa], result.stderr


def test_environment_with_an_unknown_word():
    result = run("avx1024")
    assert result.returncode != 0
    assert "VLPRUNE_FORCE_ISA=avx1024: unknown instruction set, expected scalar, avx2 or avx512" in result.stderr


def test_an_instruction_set_that_is_not_there(monkeypatch):
    missing = [name for name in ("avx2", "avx512") if name not in INFO["available_isas"]]
    for name in missing:
        with pytest.raises(RuntimeError, match=f"VLPRUNE_FORCE_ISA={name}: this machine or this build lacks it"):
            _native._C.cpu.force_isa(name)
    with pytest.raises(RuntimeError, match="unknown instruction set"):
        _native._C.cpu.force_isa("sse2")
    assert _native.build_info()["isa"] == INFO["isa"]


def test_force_isa_is_undone_after_an_error():
    def fail():
        with _native.force_isa("scalar"):
            assert _native.build_info()["isa"] == "scalar"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert _native.build_info()["isa"] == INFO["isa"]


def test_cpu_build_names_the_remedy_for_cuda_tensors(monkeypatch):
    monkeypatch.setattr(_native._C, "cuda_built", False)
    with pytest.raises(RuntimeError, match=r"leave_one_out got a tensor on cuda:0.*CPU kernels only.*VLPRUNE_CUDA=ON"):
        _native._launch("leave_one_out", torch.device("cuda", 0))


def test_the_gil_is_released():
    """Another Python thread counts on while a kernel runs."""
    import threading

    query, gallery = torch.randn(1500, 256), torch.randn(6000, 256)
    positives = torch.zeros(1500, dtype=torch.int64)
    running, ticks = True, 0

    def count():
        nonlocal ticks
        while running:
            ticks += 1

    ops.retrieval_rank(query, gallery, positives)
    torch.set_num_threads(1)
    with _native.force_isa("scalar"):
        thread = threading.Thread(target=count)
        thread.start()
        try:
            before = ticks
            torch.ops.vlprune.retrieval_rank(query, gallery, positives)
            during = ticks - before
        finally:
            running = False
            thread.join()
    assert during > 1000
