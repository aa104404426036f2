"""Train the models of ``vlprune_ext/zoo``; no network. One ``Recipe`` a model, in ``zoo_recipes``; the rest is shared.

    python scripts/train_zoo.py clip-digits --out vlprune_ext/zoo/clip-digits --seed 0
    python scripts/train_zoo.py llava-digits --out vlprune_ext/zoo/llava-digits --seed 0

The same arguments, thread count and torch build give the same weights.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from zoo_recipes.card import card
from zoo_recipes.clip_digits import ClipDigits
from zoo_recipes.llava_digits import LlavaDigits
from zoo_recipes.recipe import Recipe, Stage

from vlprune_ext.zoo.digit_scenes import DigitScenes

RECIPES: dict[str, type[Recipe]] = {recipe.name: recipe for recipe in (ClipDigits, LlavaDigits)}


def train_stage(recipe: Recipe, stage: Stage, scene_seeds: range, validate: Callable[[int, float], None]) -> None:
    """Train on scenes composed anew each step; ``validate(step, loss)`` now and then."""
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
    for step, scene_seed in enumerate(scene_seeds, start=1):
        model.train()
        loss = recipe.loss(DigitScenes("train", stage.batch, scene_seed, stage.objects, stage.alike))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recipe.after_step()
        if step % max(1, min(recipe.every, stage.steps // 4)) == 0 or step == stage.steps:
            validate(step, loss.item())


def train(name: str, out: Path, seed: int, threads: int, stages: Sequence[Stage] | None = None) -> None:
    """Train stage after stage, keep the best by the recipe's score; write the model, its processor and its card."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    recipe = RECIPES[name]()
    stages = recipe.stages if stages is None else stages
    began = time.perf_counter()
    print(f"{name}: {recipe.parameters:,} parameters, {threads} threads", flush=True)
    best, best_state, done = -1.0, copy.deepcopy(recipe.model.state_dict()), 0

    def validate(step: int, loss: float) -> None:
        nonlocal best, best_state
        found = recipe.score()
        if found > best:
            best, best_state = found, copy.deepcopy(recipe.model.state_dict())
        print(
            f"step {done + step:5d}  loss {loss:.4f}  validation {recipe.scored} {found:.4f}  "
            f"{time.perf_counter() - began:.0f} s",
            flush=True,
        )

    for stage in stages:
        print(stage, flush=True)
        first = seed * 1_000_000 + done + 1
        train_stage(recipe, stage, range(first, first + stage.steps), validate)
        done += stage.steps
    recipe.model.load_state_dict(best_state)
    minutes = (time.perf_counter() - began) / 60
    write(out, recipe, stages, f"--seed {seed} --threads {threads}", minutes)


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
    given = parser.parse_args()
    train(given.model, given.out, given.seed, given.threads)


if __name__ == "__main__":
    main()
