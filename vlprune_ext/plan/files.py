"""Atomic file writes, and the JSON files of scores and plans."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path

FORMAT = 1


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file atomically: temporary file, fsync, rename."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_json(path: str | os.PathLike, kind: str) -> dict:
    """Return the content of a JSON file of ``kind`` ("plan" or "scores"); raise ValueError if it is none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON (line {error.lineno}: {error.msg})") from None
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise ValueError(f"{path}: not a {kind} file written by vlprune_ext")
    if content.get("format") != FORMAT:
        raise ValueError(f"{path}: format {content.get('format')}, this version reads {FORMAT}")
    return content
