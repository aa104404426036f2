"""Train the models of ``vlprune_ext/zoo`` from nothing; no network.

    python scripts/train_zoo.py clip-digits --out vlprune_ext/zoo/clip-digits --seed 0

The same arguments, thread count and torch build give the same weights.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from vlprune_ext.zoo.digit_scenes import COLOURS, IMAGE_SIZE, POSITIONS, DigitScenes

EVALUATED = 1000  # scenes of the validation and test sets


def make_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """One token a word. EOS has the highest id and is not 2, so both ways CLIP has of finding it agree."""
    words = [",", "a", "an", *COLOURS, *map(str, range(10)), *sorted({w for p in POSITIONS for w in p.split()})]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<unk>", "<bos>", *words, "<eos>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[(t, vocabulary[t]) for t in ("<bos>", "<eos>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_input_names=["input_ids", "attention_mask"],
    )


def make_processor(max_length: int) -> CLIPProcessor:
    """Word-level tokenizer and a 48-pixel image processor that needs only Pillow; pixels to [-1, 1]."""
    images = CLIPImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return CLIPProcessor(images, make_tokenizer(max_length))


def make_clip(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """Six vision and four text layers of width 128, four heads of 32, 512 neurons: about 2.0M parameters."""
    tower = {
        "hidden_act": "gelu",
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "projection_dim": 128,
    }
    config = CLIPConfig(
        vision_config=tower | {"num_hidden_layers": 6, "image_size": IMAGE_SIZE, "patch_size": 8},
        text_config=tower
        | {
            "num_hidden_layers": 4,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": tokenizer.model_max_length,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        projection_dim=128,
    )
    return CLIPModel(config)


def inputs_of(scenes: DigitScenes, tokenizer: PreTrainedTokenizerFast) -> dict[str, torch.Tensor]:
    """What the processor gives for these scenes, without going through Pillow picture by picture."""
    pixels = torch.from_numpy(scenes.images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()
    return {"pixel_values": pixels, **tokenizer(scenes.captions, padding=True, return_tensors="pt")}


@torch.no_grad()
def recall(model: CLIPModel, inputs: dict[str, torch.Tensor], batch: int = 250) -> dict[str, float]:
    """Recall@1 and @5 of retrieval both ways, and their means; row i of both towers belongs together."""
    model.eval()
    towers = [
        model(**{name: value[start : start + batch] for name, value in inputs.items()})
        for start in range(0, len(inputs["input_ids"]), batch)
    ]
    image = torch.cat([t.image_embeds for t in towers])  # [N, D], normalised
    text = torch.cat([t.text_embeds for t in towers])  # [N, D], normalised
    measured = {}
    for way, scores in (("image_to_text", image @ text.T), ("text_to_image", text @ image.T)):
        rank = (scores > scores.diagonal()[:, None]).sum(1)
        for k in (1, 5):
            measured[f"{way}_recall@{k}"] = (rank < k).double().mean().item()
    for k in (1, 5):
        measured[f"recall@{k}"] = (measured[f"image_to_text_recall@{k}"] + measured[f"text_to_image_recall@{k}"]) / 2
    return measured


@dataclass(frozen=True)
class Stage:
    """Some steps with one kind of batch and one cosine from ``rate`` to zero."""

    steps: int
    batch: int
    objects: tuple[int, ...]  # how many digits a scene may hold
    alike: int  # scenes in a row that differ in their digits alone
    rate: float


# What a digit is, is the hard part: random scenes are told apart by colours and places, and teach little of it.
CLIP_DIGITS = (
    Stage(steps=500, batch=128, objects=(1,), alike=8, rate=1e-3),
    Stage(steps=1800, batch=128, objects=(1, 2, 3, 4), alike=4, rate=1e-3),
)


def train_stage(
    model: CLIPModel, stage: Stage, tokenizer: PreTrainedTokenizerFast, scene_seeds: range, validate: Callable
) -> None:
    """Symmetric contrastive training on scenes composed anew each step; ``validate(step, loss)`` now and then."""
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
    target = torch.arange(stage.batch)
    for step, scene_seed in enumerate(scene_seeds, start=1):
        model.train()
        scenes = DigitScenes("train", stage.batch, scene_seed, stage.objects, stage.alike)
        inputs = inputs_of(scenes, tokenizer)
        logits = model(**inputs).logits_per_text  # [B, B]
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if step % max(1, min(50, stage.steps // 4)) == 0 or step == stage.steps:
            validate(step, loss.item())


def train_clip_digits(out: Path, seed: int, threads: int, stages: Sequence[Stage] = CLIP_DIGITS) -> None:
    """Train stage after stage, keep the best by validation recall@1; write the model, its processor and its card."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    processor = make_processor(max_length=32)
    tokenizer = processor.tokenizer
    model = make_clip(tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    validation = inputs_of(DigitScenes("validation", EVALUATED), tokenizer)
    began = time.perf_counter()
    print(f"clip-digits: {parameters:,} parameters, {threads} threads", flush=True)
    best, best_state, done = -1.0, copy.deepcopy(model.state_dict()), 0

    def validate(step: int, loss: float) -> None:
        nonlocal best, best_state
        found = recall(model, validation)["recall@1"]
        if found > best:
            best, best_state = found, copy.deepcopy(model.state_dict())
        print(
            f"step {done + step:5d}  loss {loss:.4f}  scale {model.logit_scale.exp().item():.1f}  "
            f"validation recall@1 {found:.4f}  {time.perf_counter() - began:.0f} s",
            flush=True,
        )

    for stage in stages:
        print(stage, flush=True)
        first = seed * 1_000_000 + done + 1
        train_stage(model, stage, tokenizer, range(first, first + stage.steps), validate)
        done += stage.steps
    model.load_state_dict(best_state)
    minutes = (time.perf_counter() - began) / 60
    write_clip_digits(out, model, processor, stages, f"--seed {seed} --threads {threads}", minutes)


def write_clip_digits(
    out: Path, model: CLIPModel, processor: CLIPProcessor, stages: Sequence[Stage], arguments: str, minutes: float
) -> None:
    """The ``save_pretrained`` folder with a card that says what was measured."""
    numbers = {
        split: recall(model, inputs_of(DigitScenes(split, EVALUATED), processor.tokenizer))
        for split in ("validation", "test")
    }
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    rows = (
        f"| {split} | " + " | ".join(f"{found[key]:.3f}" for key in COLUMNS) + " |" for split, found in numbers.items()
    )
    card = CARD.format(
        parameters=f"{sum(p.numel() for p in model.parameters()):,}",
        rows="\n".join(rows),
        scenes=EVALUATED,
        command=f"python scripts/train_zoo.py clip-digits --out DIR {arguments}",
        minutes=f"{minutes:.0f}",
        stages="\n".join(
            f"- {stage.steps} steps of {stage.batch} new scenes, digits a scene: {', '.join(map(str, stage.objects))}"
            + (f"; every {stage.alike} in a row differ in their digits alone" if stage.alike > 1 else "")
            for stage in stages
        ),
        torch=torch.__version__,
    )
    (out / "README.md").write_text(card, encoding="utf-8")
    print(f"{out}: {minutes:.0f} minutes; test " + ", ".join(f"{k} {v:.4f}" for k, v in numbers["test"].items()))


COLUMNS = ("recall@1", "recall@5", "image_to_text_recall@1", "text_to_image_recall@1")

CARD = """\
---
license: apache-2.0
library_name: transformers
tags: [clip, vlprune-ext]
---
# clip-digits

A CLIP of {parameters} parameters (six vision and four text layers of width 128, four heads of 32, 512 neurons;
48-pixel pictures in 8-pixel patches; one token a word), trained from nothing on DigitScenes: one to four handwritten
digits, coloured and placed on a grid, with captions such as "a red 3 top left, a blue 7 bottom right". It is there to
be pruned: small enough for any machine, good enough to have something to lose. It knows nothing else.

## Measured

Retrieval among {scenes} scenes with different captions, `DigitScenes(split, {scenes}, seed=0)`; recall@k without a
direction is the mean of both.

| split | recall@1 | recall@5 | image to text @1 | text to image @1 |
|---|---|---|---|---|
{rows}

Digits are divided among train, calibration, validation and test before scenes are composed. The weights kept
are those best on validation.

## Training

    {command}

{stages}

Symmetric contrastive loss with a learned temperature, AdamW, one cosine a stage; {minutes} minutes on CPU cores shared
with other work, torch {torch}.

## Data and licence

The digits are the 1,797 images of scikit-learn's `load_digits`: the test set of E. Alpaydin and C. Kaynak, "Optical
Recognition of Handwritten Digits" (UCI Machine Learning Repository, 1998), CC BY 4.0. Colours, places, sizes, noise and
captions are ours. Thirteen people wrote them, and the split is by digit image, not by writer.
"""


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["clip-digits"])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    train_clip_digits(given.out, given.seed, given.threads)


if __name__ == "__main__":
    main()
