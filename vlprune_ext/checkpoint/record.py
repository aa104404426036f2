"""What is kept beside a saved pruned model, for a report that is written later."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..plan import Plan, Scores
from .manifest import COMPARISONS, MANIFEST, SCORES


@dataclass
class Record:
    """What a report is about: the part of a `Result` that outlives the model."""

    plan: Plan
    scores: Scores | None = None
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)


def load_record(folder: str | os.PathLike) -> tuple[Record, dict[str, dict]]:
    """Read the record of a saved pruned model, and the numbers of what it was compared with.

    Raises ValueError, naming the file, if the folder holds none or it is malformed.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder}: no {MANIFEST}; expected a folder written by 'vlprune prune --out'")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not content["plans"]:
            raise ValueError(f"{path}: no plan was applied to this model")
        record = Record(
            plan=Plan.from_dict(content["plans"][-1]["plan"]),
            before=content["measured"]["before"] or {},
            after=content["measured"]["after"] or {},
            method=content["method"] or {},
            data=content["data"] or {},
        )
        others = folder / COMPARISONS
        comparisons = json.loads(others.read_text(encoding="utf-8")) if others.is_file() else {}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: malformed ({type(error).__name__}: {error})") from None
    if (folder / SCORES).is_file():
        record.scores = Scores.load(folder / SCORES)
    return record, comparisons


def applied_plan(result: Any) -> Plan:
    """Return the plan as it was carried out: after rounding, where the model has a record of it."""
    plans = getattr(getattr(result, "model", None), "vlprune", {}).get("plans", [])
    return Plan.from_dict(plans[-1]["plan"]) if plans else result.plan
