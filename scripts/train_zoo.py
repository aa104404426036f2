"""Train the models of ``vlprune_ext/zoo``; no network. One ``Recipe`` a model, in ``zoo_recipes``; the rest is shared.

    python scripts/train_zoo.py clip-digits --out vlprune_ext/zoo/clip-digits --seed 0
    python scripts/train_zoo.py llava-digits --out vlprune_ext/zoo/llava-digits --seed 0
    python scripts/train_zoo.py blip-digits --out vlprune_ext/zoo/blip-digits --seed 0

The same arguments, thread count and torch build give the same weights, also when a run is cut and resumed.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Protocol

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from zoo_recipes.blip_digits import BlipDigits
from zoo_recipes.card import card
from zoo_recipes.clip_digits import ClipDigits
from zoo_recipes.llava_digits import LlavaDigits
from zoo_recipes.recipe import Recipe, Stage

from vlprune_ext.zoo.digit_scenes import DigitScenes

RECIPES: dict[str, type[Recipe]] = {recipe.name: recipe for recipe in (ClipDigits, LlavaDigits, BlipDigits)}


class Stateful(Protocol):
    """What a state is taken of and given back to."""

    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> object: ...


@dataclass
class Progress:
    """How far a training is; ``save`` at every score, so that a cut loses little."""

    file: Path
    stage: int = 0  # the one at work
    step: int = 0  # done of it
    best: float = -1.0
    best_state: dict = field(default_factory=dict)
    seconds: float = 0.0

    def save(self, parts: dict[str, Stateful]) -> None:
        """All of it, and the state of model, optimizer and schedule."""
        whole = {name: part.state_dict() for name, part in parts.items()}
        counts = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "file"}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        torch.save(whole | counts, partial)
        partial.replace(self.file)

    def load(self) -> dict[str, dict]:
        """The states that ``save`` was given; its own is back in place."""
        found = torch.load(self.file, weights_only=True)
        for f in fields(self):
            if f.name in found:
                setattr(self, f.name, found.pop(f.name))
        return found


def train_stage(recipe: Recipe, stage: Stage, first_seed: int, progress: Progress, state: dict[str, dict]) -> None:
    """Train on scenes composed anew each step, from where ``progress`` and ``state`` are; keep the best by score."""
    model = recipe.model
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=stage.rate,
        betas=(0.9, 0.98),
    )
    warm_up = max(1, min(50, stage.steps // 10))

    def relative_rate(done: int) -> float:
        if done < warm_up:
            return (done + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (done - warm_up) / max(1, stage.steps - warm_up)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, relative_rate)
    parts: dict[str, Stateful] = {"model": model, "optimizer": optimizer, "schedule": schedule}
    for name, saved in state.items():
        parts[name].load_state_dict(saved)
    began = time.perf_counter() - progress.seconds
    for step in range(progress.step + 1, stage.steps + 1):
        model.train()
        loss = recipe.loss(DigitScenes("train", stage.batch, first_seed + step, stage.objects, stage.alike))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recipe.after_step()
        if step % max(1, min(recipe.every, stage.steps // 4)) == 0 or step == stage.steps:
            found = recipe.score()
            if found > progress.best:
                progress.best, progress.best_state = found, copy.deepcopy(model.state_dict())
            progress.step, progress.seconds = step, time.perf_counter() - began
            progress.save(parts)
            print(
                f"step {step:5d}  loss {loss.item():.4f}  validation {recipe.scored} {found:.4f}  "
                f"{progress.seconds:.0f} s",
                flush=True,
            )


def train(
    name: str, out: Path, seed: int, threads: int, stages: Sequence[Stage] | None = None, resume: bool = False
) -> None:
    """Train stage after stage, keep the best by the recipe's score; write the model, its processor and its card."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    recipe = RECIPES[name]()
    stages = recipe.stages if stages is None else stages
    progress = Progress(out.with_name(f"{out.name}.training"))
    state = progress.load() if resume else {}
    print(f"{name}: {recipe.parameters:,} parameters, {threads} threads", flush=True)
    for at in range(progress.stage, len(stages)):
        print(stages[at], flush=True)
        done = sum(stage.steps for stage in stages[:at])
        train_stage(recipe, stages[at], seed * 1_000_000 + done, progress, state)
        progress.stage, progress.step, state = at + 1, 0, {}
    recipe.model.load_state_dict(progress.best_state)
    write(out, recipe, stages, f"--seed {seed} --threads {threads}", progress.seconds / 60)
    progress.file.unlink()


def write(out: Path, recipe: Recipe, stages: Sequence[Stage], arguments: str, minutes: float) -> None:
    """The ``save_pretrained`` folder with a card that says what was measured."""
    numbers = {split: recipe.measure(split) for split in ("validation", "test")}
    out.mkdir(parents=True, exist_ok=True)
    recipe.model.save_pretrained(out)
    recipe.processor.save_pretrained(out)
    (out / "README.md").write_text(card(recipe, stages, numbers, arguments, minutes), encoding="utf-8")
    print(f"{out}: {minutes:.0f} minutes; test " + ", ".join(f"{k} {v:.4f}" for k, v in numbers["test"].items()))


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(RECIPES))
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="go on from the last score of a run that was cut")
    given = parser.parse_args()
    train(given.model, given.out, given.seed, given.threads, resume=given.resume)


if __name__ == "__main__":
    main()
