"""The model card: what every model of the zoo says, around what its recipe says."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .recipe import Recipe, Stage

PURPOSE = (
    "It is there to be pruned: small enough for any machine, good enough to have something to lose. "
    "It knows nothing else."
)

CARD = """\
---
license: apache-2.0
library_name: transformers
tags: [{tags}]
---
# {name}

{about}

## Measured

{results}

Digits are divided among train, calibration, validation and test before scenes are composed. The weights kept
are those best on validation.

## Training

    {command}

{stages}

{method}.
AdamW, one cosine a stage; {minutes} minutes on CPU cores shared with other work, torch {torch}.

## Data and licence

The digits are the 1,797 images of scikit-learn's `load_digits`: the test set of E. Alpaydin and C. Kaynak, "Optical
Recognition of Handwritten Digits" (UCI Machine Learning Repository, 1998), CC BY 4.0. Colours, places, sizes, noise and
texts are ours. Thirteen people wrote them, and the split is by digit image, not by writer.
"""


def card(
    recipe: Recipe, stages: Sequence[Stage], numbers: dict[str, dict[str, float]], arguments: str, minutes: float
) -> str:
    """The text of a card; ``numbers`` is what was measured of each split."""
    return CARD.format(
        name=recipe.name,
        tags=recipe.tags,
        about=recipe.about(),
        results=recipe.results(numbers),
        command=f"python scripts/train_zoo.py {recipe.name} --out DIR {arguments}",
        stages="\n".join(
            f"- {stage.steps} steps of {stage.batch} new scenes, digits a scene: {', '.join(map(str, stage.objects))}"
            + (f"; every {stage.alike} in a row differ in their digits alone" if stage.alike > 1 else "")
            for stage in stages
        ),
        method=recipe.method(),
        minutes=f"{minutes:.0f}",
        torch=torch.__version__,
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(
        ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|", *(f"| {' | '.join(r)} |" for r in rows)]
    )
