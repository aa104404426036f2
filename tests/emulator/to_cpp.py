"""Turns a CUDA source into C++ for the emulator: kernel launches and declarations of shared memory become calls.

python to_cpp.py csrc/cuda/OP.cu BUILD/OP.cpp
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

LAUNCH = re.compile(r"^([ \t]+)(\w[\w:<>, /]*?)<<<(.*?)>>>\(", re.MULTILINE | re.DOTALL)
DYNAMIC = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?char (\w+)\[\];")
SHARED = re.compile(r"__shared__ (?:__align__\((\d+)\) )?([^;]*?)(\w+)((?:\[[^;]*\])?);")


def to_cpp(source: str, name: str) -> str:
    def arguments(text: str) -> list[str]:
        parts, depth = [""], 0
        for character in text:
            depth += {"(": 1, ")": -1}.get(character, 0)
            if character == "," and depth == 0:
                parts.append("")
            else:
                parts[-1] += character
        return [part.strip() for part in parts]

    def launch(match: re.Match[str]) -> str:
        indent, kernel, configuration = match.groups()
        blocks, threads, shared_bytes, stream = arguments(configuration)
        line = source.count("\n", 0, match.start()) + 1
        where = f'"{name}:{line} {kernel}"'
        return (
            f"{indent}::emulator::launch({{{where}, dim3({blocks}), dim3({threads}), size_t({shared_bytes})}},"
            f" {stream}, [&](const auto&... p) {{ {kernel}(p...); }}, "
        )

    def shared(match: re.Match[str]) -> str:
        alignment, kind, variable, extents = match.groups()
        return (
            f"using {variable}_type = {kind}{extents};"
            f" {variable}_type& {variable} = *static_cast<{variable}_type*>(::emulator::shared(EMULATOR_SITE,"
            f" sizeof({variable}_type), std::max<size_t>(alignof({variable}_type), {alignment or 1})));"
        )

    source = DYNAMIC.sub(r"char* const \1 = static_cast<char*>(::emulator::dynamic_shared());", source)
    return SHARED.sub(shared, LAUNCH.sub(launch, source))


if __name__ == "__main__":
    source, destination = map(Path, sys.argv[1:])
    text = to_cpp(source.read_text(), source.name)
    destination.write_text(f'#line 1 "{source}"\n{text}')
