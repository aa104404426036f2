"""``pruning.json``: what was done to a model, written and read."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers

from .._version import __version__
from ..anatomy import Anatomy
from ..plan.files import FORMAT

MANIFEST = "pruning.json"
SCORES = "scores.json"  # of the method, where a folder has them
COMPARISONS = "comparisons.json"  # measured numbers of other methods, likewise


def manifest_of(model, anatomy: Anatomy, method, data, before, after) -> dict:
    """Return the content of pruning.json for a model."""
    done = getattr(model, "vlprune", None) or {"shape": anatomy.shape(), "plans": []}
    last = done["plans"][-1] if done["plans"] else {"plan": {}, "data": None}
    if method is None:
        method = last["plan"].get("method", {})
    elif dataclasses.is_dataclass(method) and not isinstance(method, type):
        method = {"name": type(method).__name__, **dataclasses.asdict(method)}
    origin = last["data"] if data is None else {"name": getattr(data, "name", ""), "hash": getattr(data, "hash", "")}
    if isinstance(data, Mapping):
        origin = dict(data)
    return {
        "kind": "pruned model",
        "format": FORMAT,
        "loads_with": "",
        "method": method,
        "data": origin,
        "measured": {"before": _numbers(before), "after": _numbers(after)},
        "versions": {
            "vlprune_ext": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "shape": done["shape"],
        "structure": anatomy.shape(),
        "plans": done["plans"],
    }


def _numbers(measured: Mapping[str, float] | None) -> dict | None:
    if measured is None:
        return None
    return {key: value.item() if isinstance(value, torch.Tensor) else value for key, value in measured.items()}


def pretty_json(content: object) -> str:
    """Indented JSON with lists of numbers on one line."""
    text = json.dumps(content, indent=2, default=str)
    return re.sub(r"\[[\s\d,.eE+-]*\]", lambda found: re.sub(r"\s+", " ", found.group()), text) + "\n"


def one_line(error: Exception) -> str:
    """Return what an error says in one line of at most 240 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else text[:237] + "..."


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent}: no {path.name}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return content


def read_manifest(folder: Path) -> dict:
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder}: no {MANIFEST}, so not a pruned model; a plain one loads with from_pretrained")
    record = read_json(path)
    if record.get("kind") != "pruned model":
        raise ValueError(f"{path}: not written by vlprune_ext")
    if record.get("format") != FORMAT:
        raise ValueError(f"{path}: format {record.get('format')}, this version reads {FORMAT}")
    structure = record.get("structure")
    well_formed = isinstance(structure, dict) and all(
        isinstance(blocks, list)
        and all(isinstance(row, dict) and all(type(count) is int for count in row.values()) for row in blocks)
        for blocks in structure.values()
    )
    if not well_formed or "shape" not in record or not isinstance(record.get("plans"), list):
        raise ValueError(f"{path}: malformed, expected 'shape', 'structure' and 'plans'")
    return record
