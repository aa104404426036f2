"""Registry of objectives by name, and the default objective of a model.

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
    """One registered objective.

    Parameters
    ----------
    module : str
        Module of its class, within this package.
    class_name : str
        Name of its class.
    fields : mapping
        Arguments of its constructor.
    summary : str
        What it measures, for the help.
    """

    module: str
    class_name: str
    fields: Mapping[str, Any]
    summary: str


# The first five apply to dual encoders and, all but zero_shot, need captions; the last three to models that predict
# tokens.
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
# Use -> default of a dual encoder, of a model that predicts tokens. A smooth loss ranks units better than accuracy on
# few samples; accuracy is the criterion of how far to prune.
_USUAL: dict[str, tuple[str, str]] = {
    "rank": ("contrastive", "lm_loss"),
    "report": ("retrieval", "lm_loss"),
    "decide": ("retrieval", "exact_match"),
}


def usual_objective(anatomy: Anatomy, use: Use) -> Objective:
    """Return the default objective of a model for a use.

    Parameters
    ----------
    anatomy : Anatomy
        The model.
    use : {"rank", "report", "decide", "answer"}
        To rank units, to report metrics, to decide by accuracy how far to prune, or to score answers of a model whose
        tokens are pruned while it generates: those are generated, except by encoder-decoders.
    """
    if use == "answer":
        return objective_named("exact_match" if anatomy.family.needs_decoder_ids else "generated")
    return objective_named(_USUAL[use][0 if anatomy.is_dual_encoder else 1])


def objective_named(objective: str | Objective | None, anatomy: Anatomy | None = None, use: Use = "rank") -> Objective:
    """Return an objective by its name.

    Parameters
    ----------
    objective : str, Objective or None
        A name in `OBJECTIVES`; an `Objective` is returned as it is; None: the default of the model.
    anatomy : Anatomy, optional
        The model, for the default; without it, "contrastive".
    use : {"rank", "report", "decide", "answer"}
        The use, for the default; see `usual_objective`.

    Raises
    ------
    ValueError
        An unknown name; the message lists the known ones.
    """
    if objective is None:
        return objective_named("contrastive") if anatomy is None else usual_objective(anatomy, use)
    if not isinstance(objective, str):
        return objective
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: {objective!r}, expected one of {', '.join(OBJECTIVES)}")
    entry = OBJECTIVES[objective]
    return getattr(importlib.import_module(f".{entry.module}", __package__), entry.class_name)(**entry.fields)
