"""Objectives by their names: the registry, and which one is usual for a model.

Importing this module does not import torch, so that the command line's help can list the names.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from ..anatomy import Anatomy
    from .base import Objective


class Entry(NamedTuple):
    """One objective: where its class is, with which fields it is made, and what it measures."""

    module: str
    title: str
    fields: Mapping[str, Any]
    summary: str


# Name -> entry. The first four are of dual encoders, but for zero_shot they need texts; the last three of models that
# predict tokens.
OBJECTIVES: dict[str, Entry] = {
    "retrieval": Entry("retrieval", "Retrieval", {}, "mean recall@1, 5 and 10, both directions"),
    "recall@1": Entry("retrieval", "Retrieval", {"at": (1,)}, "recall@1, both directions"),
    "contrastive": Entry("retrieval", "Contrastive", {}, "minus the symmetric contrastive cross-entropy"),
    "margin": Entry(
        "retrieval", "Contrastive", {"loss": "margin"}, "cosine of the positive above the hardest negative"
    ),
    "zero_shot": Entry("retrieval", "ZeroShot", {}, "accuracy of the nearest class prompt"),
    "lm_loss": Entry("language", "LMLoss", {}, "minus the next-token cross-entropy of the labels"),
    "exact_match": Entry("language", "ExactMatch", {}, "share of samples whose labels are all the most likely tokens"),
    "generated": Entry("language", "Generated", {}, "share of samples whose labels `generate` gives"),
}

Use = Literal["rank", "report", "decide", "answer"]
# What is usual, by use: of a dual encoder, and of a model that predicts tokens. To rank units a smooth objective is
# better than a count of few right answers; to decide when something has gone too far, it is that count.
_USUAL: dict[str, tuple[str, str]] = {
    "rank": ("contrastive", "lm_loss"),
    "report": ("retrieval", "lm_loss"),
    "decide": ("retrieval", "exact_match"),
}


def usual_objective(anatomy: Anatomy, use: Use) -> Objective:
    """Return the objective that suits a model: to "rank" units, "report" numbers, "decide" by accuracy, or "answer".

    "answer" is for what prunes while a model generates: right answers, generated where the model answers behind its
    prompt.
    """
    if use == "answer":
        return objective_named("exact_match" if anatomy.family.needs_decoder_ids else "generated")
    return objective_named(_USUAL[use][0 if anatomy.pairs else 1])


def objective_named(objective: str | Objective | None, anatomy: Anatomy | None = None, use: Use = "rank") -> Objective:
    """Return an objective from its name; of None, the usual one of the model, for a use.

    Raises ValueError listing the names.
    """
    if objective is None:
        return objective_named("contrastive") if anatomy is None else usual_objective(anatomy, use)
    if not isinstance(objective, str):
        return objective
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: {objective!r}, expected one of {', '.join(OBJECTIVES)}")
    entry = OBJECTIVES[objective]
    return getattr(importlib.import_module(f".{entry.module}", __package__), entry.title)(**entry.fields)
