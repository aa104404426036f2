"""The model card of a pruned model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from .manifest import MANIFEST

CARD = "README.md"


def model_card(model: nn.Module, record: dict) -> str:
    base = str(getattr(model.config, "_name_or_path", "") or "")
    base = Path(base).name if os.path.exists(base) else base
    name = record["method"].get("name", "") if isinstance(record["method"], Mapping) else str(record["method"])
    lines = ["---", "library_name: transformers", "tags:", "- pruned", "- vlprune"]
    lines += [f"base_model: {base}"] if base.count("/") == 1 else []
    lines += ["---", "", f"# {base or type(model).__name__}, pruned", ""]
    lines += [f"A `{type(model).__name__}`" + (f" pruned with {name}" if name else "") + " by vlprune_ext.", ""]
    if record["loads_with"].startswith("transformers"):
        kind = type(model).__name__
        load = f"from transformers import {kind}\n\nmodel = {kind}.from_pretrained(path)"
    else:
        load = "import vlprune_ext as vp\n\nmodel = vp.load_pruned(path)"
    lines += ["```python", load, "```", ""]
    lines += ["| tower | blocks | " + "heads and neurons that stay, of the original |", "|---|---|---|"]
    for tower, blocks in record["structure"].items():
        original = record["shape"][tower]
        kinds = []
        for kind in original[0]:
            have, had = sum(row.get(kind, 0) for row in blocks), sum(row.get(kind, 0) for row in original)
            kinds.append(f"{kind.replace('_', ' ')} {have} / {had}")
        lines.append(f"| {tower} | {len(blocks)} / {len(original)} | {', '.join(kinds)} |")
    measured = record["measured"]
    keys = list(dict.fromkeys([*(measured["before"] or {}), *(measured["after"] or {})]))
    if keys:
        lines += ["", "| measured | before | after |", "|---|---|---|"]
        for key in keys:
            values = [_shown((measured[when] or {}).get(key, "")) for when in ("before", "after")]
            lines.append(f"| {key} | {values[0]} | {values[1]} |")
    if record["data"]:
        lines += ["", f"Calibration data: {record['data'].get('name')} (sha256 {record['data'].get('hash')})."]
    lines += ["", "Versions: " + ", ".join(f"{key} {value}" for key, value in record["versions"].items()) + "."]
    lines += ["", f"`{MANIFEST}` holds the plan, the method's fields and the units of every block.", ""]
    return "\n".join(lines)


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
