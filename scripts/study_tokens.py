"""What each method of token pruning is worth: answers of the zoo's models with fewer visual tokens, without training.

    python scripts/study_tokens.py --out results.jsonl [--models llava-digits blip-digits] [--seeds 0 1 2 3 4]
    python scripts/study_tokens.py --out results.jsonl --table

Each seed draws its own scenes (and, of `RandomTokens`, its own tokens). Every result is one line of JSON, written as
soon as it is known; what is there already is not computed again. Settings are chosen by the accuracy on validation
scenes (--choose); the tables hold that on test scenes.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import vlprune_ext as vp
from vlprune_ext.anatomy import describe
from vlprune_ext.checkpoint.models import load_model
from vlprune_ext.objectives import usual_objective
from vlprune_ext.tokens import TokenMethod
from vlprune_ext.workflow.token_trials import judge

KEEPS = (0.5, 0.25, 0.11)
SCENES = 1000
SOURCE = "digits-questions"
Variant = Callable[[float, int], TokenMethod]  # of a share and a seed

# The share is that of the tokens left in the last block (or its cache).
VARIANTS: dict[str, Variant] = {
    "RandomTokens": lambda keep, seed: vp.RandomTokens(keep, seed=seed),
    "RandomTokens, layer 2": lambda keep, seed: vp.RandomTokens(keep, layer=2, seed=seed),
    "DivPrune": lambda keep, _: vp.DivPrune(keep),
    "VisionZip": lambda keep, _: vp.VisionZip(keep),
    "ToMe": lambda keep, _: vp.ToMe(keep),
    "FastV, layer 1": lambda keep, _: vp.FastV(1, keep),
    "FastV, layer 2": lambda keep, _: vp.FastV(2, keep),
    "PyramidDrop": lambda keep, _: vp.PyramidDrop(keep ** (1 / 3)),
    "PLPHP": lambda keep, _: vp.PLPHP(keep),
    "LookM": lambda keep, _: vp.LookM(keep),
}
# The picture is read before the question comes, as in a conversation: what left the cache cannot be asked for. Answers
# of one word, which the prefill itself says, show nothing of methods that change the cache after it; this does.
LATER: dict[str, Variant] = {
    "question later: RandomTokens": lambda keep, seed: vp.RandomTokens(keep, seed=seed),
    "question later: FastV, layer 2": lambda keep, _: vp.FastV(2, keep),
    "question later: PLPHP": lambda keep, _: vp.PLPHP(keep),
    "question later: PLPHP, all blocks": lambda keep, _: vp.PLPHP(keep, skip=0),
    "question later: LookM": lambda keep, _: vp.LookM(keep),
    "question later: LookM, forgetting": lambda keep, _: vp.LookM(keep, merge=False),
}
VARIANTS |= LATER
CHOICES: dict[str, Variant] = {
    **VARIANTS,
    "VisionZip, contextual 0": lambda keep, _: vp.VisionZip(keep, contextual=0.0),
    "VisionZip, contextual 0.5": lambda keep, _: vp.VisionZip(keep, contextual=0.5),
    "VisionZip, contextual 1": lambda keep, _: vp.VisionZip(keep, contextual=1.0),
    "FastV, layer 3": lambda keep, _: vp.FastV(3, keep),
    "FastV, layer 2, renumbered": lambda keep, _: vp.FastV(2, keep, positions="renumber"),
    "DivPrune, renumbered": lambda keep, _: vp.DivPrune(keep, positions="renumber"),
    "DivPrune, layer 2": lambda keep, _: vp.DivPrune(keep, layer=2),
    "PLPHP, all blocks": lambda keep, _: vp.PLPHP(keep, skip=0),
    "LookM, forgetting": lambda keep, _: vp.LookM(keep, merge=False),
    "LookM, from block 2": lambda keep, _: vp.LookM(keep, skip=2),
}


class Task:
    """One model and the scenes of a seed."""

    def __init__(self, name: str, split: str) -> None:
        self.model = load_model(name).model
        self.split = split
        self.metric = usual_objective(describe(self.model), "answer").name
        self.scenes: dict[int, vp.Data] = {}

    def run(self, variant: Variant | None, keep: float, seed: int) -> dict[str, Any]:
        """Accuracy and the mean share of the visual tokens; None: the dense model."""
        if seed not in self.scenes:
            self.scenes = {seed: vp.load_data(SOURCE, self.split, model=self.model, limit=SCENES, seed=seed)}
        data = self.scenes[seed]
        if variant is None:
            return {self.split: judge(self.model, data, {}, self.metric)[0], "share": 1.0}
        try:
            with vp.prune_tokens(self.model, variant(keep, seed)) as pruning:
                if variant in LATER.values():
                    accuracy = self.asked_later(data)
                else:
                    accuracy = vp.evaluate(self.model, data, self.metric, batch_size=100)[self.metric]
        except ValueError as error:  # of methods that a model has no use for
            return {"error": str(error)}
        return {self.split: accuracy, "share": round(pruning.share(), 3)}

    @torch.no_grad()
    def asked_later(self, data: vp.Data) -> float:
        """Accuracy of the answers' first token, the question being a second forward with the cache of the first."""
        model: Any = self.model
        if self.metric != "generated":
            raise ValueError("nothing is cached between picture and question")
        right = 0
        for part in torch.arange(len(data)).split(100):
            batch = data.batch(part)
            ids, labels, mask = (batch[name] for name in ("input_ids", "labels", "attention_mask"))
            end = int((ids == model.config.image_token_id).nonzero()[:, 1].max()) + 1
            seen = model(input_ids=ids[:, :end], attention_mask=mask[:, :end], pixel_values=batch["pixel_values"])
            logits = model(input_ids=ids[:, end:], attention_mask=mask, past_key_values=seen.past_key_values).logits
            first = (labels != -100).int().argmax(1)
            rows = torch.arange(len(ids))
            right += int((logits[rows, first - 1 - end].argmax(-1) == labels[rows, first]).sum())
        return right / len(data)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def key(row: dict) -> tuple:
    return row["model"], row["variant"], row["keep"], row["seed"]


def table(rows: list[dict], model: str, split: str) -> str:
    """Accuracy, mean and standard deviation over seeds, and the mean share of the visual tokens, in Markdown."""
    rows = [row for row in rows if row["model"] == model and split in row]
    lines = ["| method | seeds | " + " | ".join(f"keep {keep:g}" for keep in KEEPS) + " |", "|---|---|" + "---|" * 3]
    for name in dict.fromkeys(row["variant"] for row in rows):
        of_variant = [row for row in rows if row["variant"] == name]
        cells = []
        for keep in KEEPS:
            found = [row for row in of_variant if row["keep"] in (keep, 1.0)]
            values = [row[split] for row in found]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            share = statistics.mean(row["share"] for row in found) if found else 0.0
            cells.append(f"{statistics.mean(values):.3f}{spread} ({share:.0%})" if values else "-")
        lines.append(f"| {name} | {len({row['seed'] for row in of_variant})} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["llava-digits", "blip-digits"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--only", nargs="+", help="names of variants")
    parser.add_argument("--choose", action="store_true", help="what settings were chosen among, on validation")
    parser.add_argument("--table", action="store_true", help="print the tables of what is there and stop")
    given = parser.parse_args()
    variants, split = (CHOICES, "validation") if given.choose else (VARIANTS, "test")
    rows = read(given.out)
    if given.table:
        for name in given.models:
            print(f"{name}\n\n{table(rows, name, split)}\n")
        return
    done = {key(row) for row in rows}
    for name in given.models:
        task = Task(name, split)
        for seed in given.seeds:
            cells = [("dense", 1.0), *((variant, keep) for variant in given.only or variants for keep in KEEPS)]
            for variant, keep in cells:
                row = {"model": name, "variant": variant, "keep": keep, "seed": seed}
                if key(row) in done:
                    continue
                row |= task.run(variants.get(variant), keep, seed)
                with given.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(row, flush=True)


if __name__ == "__main__":
    main()
