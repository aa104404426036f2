"""The built module: what it is linked to, what it leaves undefined, and which instructions are where."""

from __future__ import annotations

import os
import platform
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from vlprune_ext import _native

MODULE = _native._C.__file__
INFO = _native.build_info()
FATBIN_MAGIC = bytes.fromhex("50ed55ba")
# Shared libraries that any Linux has, beside the compiler's own.
ALLOWED = re.compile(r"(lib(stdc\+\+|m|gcc_s|gomp|omp|c|pthread|dl|rt)|ld-linux-[\w-]+)\.so(\.\d+)*")


def output_of(program: str, *arguments: str) -> str:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    result = subprocess.run(
        [program, *arguments], capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"}
    )
    return result.stdout


def test_needs_no_torch_and_no_cuda_library():
    needed = re.findall(r"\(NEEDED\)\s+Shared library: \[(.+?)\]", output_of("readelf", "-d", MODULE))
    assert needed
    assert [name for name in needed if not ALLOWED.fullmatch(name)] == []


def test_no_run_path():
    assert not re.search(r"\((RPATH|RUNPATH)\)", output_of("readelf", "-d", MODULE))


def test_leaves_no_symbol_of_torch_or_cuda_undefined():
    undefined = re.findall(r"^\s+[Uw] (\S+)", output_of("nm", "-D", "--undefined-only", MODULE), re.MULTILINE)
    assert any(name.startswith("Py") for name in undefined)
    foreign = re.compile(r"torch|c10|^_ZNK?2at|cuda|cublas|^cu[A-Z]")
    assert [name for name in undefined if foreign.search(name)] == []


def test_exports_nothing_but_its_entry():
    exported = output_of("nm", "-D", "--defined-only", MODULE).split()[2::3]
    assert [name for name in exported if "vlprune" in name] == []
    assert "PyInit__C" in exported


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 only")
def test_wide_registers_only_where_the_instruction_set_was_chosen():
    """zmm only in namespace avx512, ymm only there and in avx2: what one machine lacks, no shared function may hold."""
    wrong = set()
    seen = set()
    function = ""
    for line in output_of("objdump", "-d", "-C", "--no-show-raw-insn", MODULE).splitlines():
        header = re.match(r"[0-9a-f]+ <(.*)>:$", line)
        if header:
            function = header[1]
            continue
        register = re.search(r"%([zy])mm|\{%k[1-7]\}", line)
        if register is None:
            continue
        wide = "avx512" if register[1] != "y" else "avx2"
        seen.add(wide)
        homes = ("::avx512::",) if wide == "avx512" else ("::avx512::", "::avx2::")
        # A static function's clone of the compiler keeps its namespace in the name.
        if not any(home in function for home in homes) and not any(
            f"{len(h[2:-2])}{h[2:-2]}" in function for h in homes
        ):
            wrong.add(function)
    assert seen == {"avx512", "avx2"}
    assert wrong == set()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 only")
def test_every_instruction_set_was_built():
    symbols = output_of("nm", "-C", MODULE)
    for isa in ("scalar", "avx2", "avx512"):
        for op in ("leave_one_out", "retrieval_rank"):
            assert re.search(rf" [tT] vlprune::cpu::{isa}::{op}\(", symbols), f"{isa} {op}"


def gpu_code() -> tuple[set[str], set[str]]:
    """Architectures of the machine code and of the PTX in the module, read from the headers of its fat binaries."""
    sections = output_of("readelf", "-SW", MODULE)
    offset, size = re.search(r"\.nv_fatbin\s+PROGBITS\s+[0-9a-f]+\s+([0-9a-f]+)\s+([0-9a-f]+)", sections).groups()
    data = Path(MODULE).read_bytes()[int(offset, 16) :][: int(size, 16)]
    found: dict[int, set[str]] = {1: set(), 2: set()}  # kind: 1 PTX, 2 machine code
    at = data.find(FATBIN_MAGIC)
    while at >= 0:
        header, length = struct.unpack_from("<HQ", data, at + 6)
        entry, end = at + header, at + header + length
        while entry < end:
            kind, _, entry_header, payload = struct.unpack_from("<HHIQ", data, entry)
            found[kind].add(str(struct.unpack_from("<I", data, entry + 28)[0]))
            entry += entry_header + payload
        at = data.find(FATBIN_MAGIC, end)
    return found[2], found[1]


@pytest.mark.skipif(not INFO["cuda_built"], reason="built without CUDA")
def test_gpu_code_for_every_architecture():
    machine_code, ptx = gpu_code()
    named = [name for name in INFO["cuda_archs"].split(",") if name != "native"]
    expected = {re.match(r"\d+", name)[0] for name in named if not name.endswith("-virtual")}
    assert machine_code
    assert expected <= machine_code
    assert ptx == ({"80"} if any(not name.endswith("-real") for name in named) else set())


def test_build_info_is_plain_data():
    assert INFO["isa"] in INFO["available_isas"]
    assert isinstance(INFO["cuda_built"], bool)
    assert (INFO["cuda_version"] is None) == (not INFO["cuda_built"])
    assert (INFO["cuda_archs"] is None) == (not INFO["cuda_built"])


def test_a_missing_module_is_explained(tmp_path):
    """Without _C the import error says what to do."""
    package = Path(_native.__file__).parent
    copy = tmp_path / "vlprune_ext"
    shutil.copytree(package / "ops", copy / "ops", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "__init__.py").write_text("")
    shutil.copy(package / "_native.py", copy)
    # An editable install answers for every vlprune_ext.* through a finder of its own.
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r});"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]; import vlprune_ext.ops"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert result.returncode == 1
    assert "ImportError: vlprune_ext: the compiled module vlprune_ext._C cannot be imported" in result.stderr
    assert "pip install" in result.stderr
