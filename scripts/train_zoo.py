"""Train the models of ``vlprune_ext/zoo``; no network. One ``Recipe`` a model, everything else is shared.

    python scripts/train_zoo.py clip-digits --out vlprune_ext/zoo/clip-digits --seed 0
    python scripts/train_zoo.py llava-digits --out vlprune_ext/zoo/llava-digits --seed 0

The same arguments, thread count and torch build give the same weights.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from vlprune_ext import zoo
from vlprune_ext.zoo.digit_scenes import (
    COLOURS,
    IMAGE_SIZE,
    PLAIN_KINDS,
    POSITIONS,
    QUESTION_SHARES,
    DigitScenes,
    Question,
)

EVALUATED = 1000  # scenes of the validation and test sets
IGNORED = -100  # a label that the loss does not count


# --- what every recipe uses ------------------------------------------------------------------------------------------

CAPTION_WORDS = (",", "a", "an", *COLOURS, *map(str, range(10)), *sorted({w for p in POSITIONS for w in p.split()}))


@dataclass(frozen=True)
class Stage:
    """Some steps with one kind of batch and one cosine from ``rate`` to zero."""

    steps: int
    batch: int
    objects: tuple[int, ...]  # how many digits a scene may hold
    alike: int  # scenes in a row that differ in their digits alone
    rate: float


class Recipe(ABC):
    """A model with its processor, what it is trained for, and what its card says."""

    name: ClassVar[str]
    stages: ClassVar[tuple[Stage, ...]]
    tags: ClassVar[str]  # of the card
    scored: ClassVar[str]  # what ``score`` is, the number by which weights are kept
    every: ClassVar[int] = 50  # steps from one score to the next
    model: PreTrainedModel
    processor: ProcessorMixin

    @abstractmethod
    def loss(self, scenes: DigitScenes) -> Tensor:
        """The training loss [] of one batch."""

    def after_step(self) -> None:  # noqa: B027  most weights need nothing
        """Whatever the weights need after an update."""

    @abstractmethod
    def score(self) -> float:
        """Quality on the validation scenes, higher is better."""

    @abstractmethod
    def measure(self, split: str) -> dict[str, float]:
        """All that the card states of one split."""

    @abstractmethod
    def about(self) -> str:
        """The card's first paragraph."""

    @abstractmethod
    def results(self, numbers: dict[str, dict[str, float]]) -> str:
        """The card's tables, from what was measured of each split."""

    @abstractmethod
    def method(self) -> str:
        """The loss, for the card."""

    @property
    def parameters(self) -> int:
        """How many, tied ones once."""
        return sum(p.numel() for p in self.model.parameters())


def word_tokenizer(tokens: Sequence[str], template: str, **arguments) -> PreTrainedTokenizerFast:
    """One token a word, ids in the order of ``tokens``; ``template`` says where <bos> and <eos> go around ``$A``."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(t, vocabulary[t]) for t in ("<bos>", "<eos>") if t in template]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_input_names=["input_ids", "attention_mask"],
        **arguments,
    )


def image_processor() -> CLIPImageProcessorPil:
    """48 pixels, to [-1, 1]; needs only Pillow."""
    return CLIPImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def pixels_of(scenes: DigitScenes) -> Tensor:
    """What ``image_processor`` gives for these scenes [N, 3, 48, 48], without going through Pillow one by one."""
    return torch.from_numpy(scenes.images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(
        ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|", *(f"| {' | '.join(r)} |" for r in rows)]
    )


# --- clip-digits -----------------------------------------------------------------------------------------------------


class ClipDigits(Recipe):
    """CLIP from nothing: pictures against captions."""

    name = "clip-digits"
    # What a digit is, is the hard part: random scenes are told apart by colours and places, and teach little of it.
    stages = (
        Stage(steps=500, batch=128, objects=(1,), alike=8, rate=1e-3),
        Stage(steps=1800, batch=128, objects=(1, 2, 3, 4), alike=4, rate=1e-3),
    )
    tags = "clip, vlprune-ext"
    scored = "recall@1"

    def __init__(self) -> None:
        self.processor = CLIPProcessor(image_processor(), self.make_tokenizer(max_length=32))
        self.tokenizer = self.processor.tokenizer
        self.model = self.make_model(self.tokenizer)

    @staticmethod
    def make_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
        """EOS has the highest id and is not 2, so both ways CLIP has of finding it agree."""
        tokens = ["<pad>", "<unk>", "<bos>", *CAPTION_WORDS, "<eos>"]
        return word_tokenizer(tokens, "<bos> $A <eos>", model_max_length=max_length)

    @staticmethod
    def make_model(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
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

    @staticmethod
    def inputs_of(scenes: DigitScenes, tokenizer: PreTrainedTokenizerFast) -> dict[str, Tensor]:
        """What the processor gives for these scenes and their captions."""
        return {"pixel_values": pixels_of(scenes), **tokenizer(scenes.captions, padding=True, return_tensors="pt")}

    @staticmethod
    @torch.no_grad()
    def recall(model: CLIPModel, inputs: dict[str, Tensor], batch: int = 250) -> dict[str, float]:
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
            both = measured[f"image_to_text_recall@{k}"], measured[f"text_to_image_recall@{k}"]
            measured[f"recall@{k}"] = sum(both) / 2
        return measured

    def loss(self, scenes: DigitScenes) -> Tensor:
        """Symmetric contrastive loss."""
        logits = self.model(**self.inputs_of(scenes, self.tokenizer)).logits_per_text  # [B, B]
        target = torch.arange(len(scenes))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    def after_step(self) -> None:
        """The temperature stays above 1/100."""
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=math.log(100))

    @functools.cached_property
    def validation(self) -> dict[str, Tensor]:
        """The inputs of ``score``."""
        return self.inputs_of(DigitScenes("validation", EVALUATED), self.tokenizer)

    def score(self) -> float:
        """Recall@1, mean of both ways."""
        return self.recall(self.model, self.validation)["recall@1"]

    def measure(self, split: str) -> dict[str, float]:
        """Recall both ways."""
        return self.recall(self.model, self.inputs_of(DigitScenes(split, EVALUATED), self.tokenizer))

    def about(self) -> str:
        """What it is."""
        return f"""\
A CLIP of {self.parameters:,} parameters (six vision and four text layers of width 128, four heads of 32, 512 neurons;
48-pixel pictures in 8-pixel patches; one token a word), trained from nothing on DigitScenes: one to four handwritten
digits, coloured and placed on a grid, with captions such as "a red 3 top left, a blue 7 bottom right". It is there to
be pruned: small enough for any machine, good enough to have something to lose. It knows nothing else."""

    def results(self, numbers: dict[str, dict[str, float]]) -> str:
        """Recall."""
        columns = {
            "recall@1": "recall@1",
            "recall@5": "recall@5",
            "image to text @1": "image_to_text_recall@1",
            "text to image @1": "text_to_image_recall@1",
        }
        rows = [[split, *(f"{found[key]:.3f}" for key in columns.values())] for split, found in numbers.items()]
        return f"""\
Retrieval among {EVALUATED} scenes with different captions, `DigitScenes(split, {EVALUATED}, seed=0)`; recall@k without
a direction is the mean of both.

{table(["split", *columns], rows)}"""

    def method(self) -> str:
        """The loss."""
        return "Symmetric contrastive loss with a learned temperature"


# --- llava-digits ----------------------------------------------------------------------------------------------------


class LlavaDigits(Recipe):
    """LLaVA on the vision tower of clip-digits: captions and questions."""

    name = "llava-digits"
    stages = (Stage(steps=1200, batch=32, objects=(1, 2, 3, 4), alike=1, rate=1e-3),)
    tags = "llava, visual-question-answering, vlprune-ext"
    scored = "exact match"
    every = 100
    asked = 6  # questions a scene and step

    def __init__(self) -> None:
        clip = CLIPModel.from_pretrained(zoo.path("clip-digits"))
        vision = clip.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        self.tokenizer = self.make_tokenizer(max_length=96)
        self.processor = LlavaProcessor(
            image_processor(),
            self.tokenizer,
            patch_size=vision.patch_size,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
        self.prefix = [self.tokenizer.bos_token_id, *[self.tokenizer.image_token_id] * patches]
        self.model = self.make_model(self.tokenizer, vision, patches)
        self.model.model.vision_tower.load_state_dict(clip.vision_model.state_dict())

    @staticmethod
    def make_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
        """The words of captions, questions and answers, and a token for a patch of the picture."""
        asking = ("what", "digit", "colour", "is", "the", "how", "many", "digits", "are", "there", "?", "none")
        return word_tokenizer(
            ["<pad>", "<unk>", "<bos>", "<eos>", "<image>", *CAPTION_WORDS, *asking],
            "<bos> $A",
            model_max_length=max_length,
            padding_side="left",
            extra_special_tokens={"image_token": "<image>"},
        )

    @staticmethod
    def make_model(tokenizer: PreTrainedTokenizerFast, vision, patches: int) -> LlavaForConditionalGeneration:
        """Four LLaMA layers of width 128, four heads on two key-value heads of 32, 384 neurons; about 2.0M in all."""
        special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
        text = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            tie_word_embeddings=False,
            **special,
        )
        config = LlavaConfig(
            vision_config=copy.deepcopy(vision),
            text_config=text,
            image_token_index=tokenizer.image_token_id,
            image_seq_length=patches,
            vision_feature_layer=-1,  # with so few layers none is left unused
            vision_feature_select_strategy="default",
        )
        model = LlavaForConditionalGeneration(config)
        model.generation_config = GenerationConfig(do_sample=False, **special)
        return model

    def ids(self, text: str) -> list[int]:
        """Its words, nothing around them."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def packed(
        self, scenes: DigitScenes, questions: Sequence[Sequence[Question]], captions: bool = False
    ) -> dict[str, Tensor]:
        """Inputs with one row a scene: its picture, then its caption if asked for, then its questions with answers.

        Each text has positions as if it alone came after the picture, and sees only the picture and itself: the loss
        is that of a row for each text, at a fraction of the work. Labels are captions, answers and the EOS of both.
        """
        rows = []
        for scene, asked in zip(scenes, questions, strict=True):
            texts = [([], self.ids(scene.caption))] if captions else []
            texts += [(self.ids(question.text), self.ids(question.answer)) for question in asked]
            row = [(token, position, 0, IGNORED) for position, token in enumerate(self.prefix)]
            for owner, (given, wanted) in enumerate(texts, start=1):
                tokens = [*given, *wanted, self.tokenizer.eos_token_id]
                labels = [IGNORED] * len(given) + tokens[len(given) :]
                at = range(len(self.prefix), len(self.prefix) + len(tokens))
                row += zip(tokens, at, [owner] * len(tokens), labels, strict=True)
            rows.append(row)
        longest = max(map(len, rows))
        padding = (self.tokenizer.pad_token_id, 0, -1, IGNORED)
        whole = torch.tensor([row + [padding] * (longest - len(row)) for row in rows])  # [B, S, 4]
        tokens, positions, owner, labels = (part.contiguous() for part in whole.unbind(-1))  # [B, S] each
        seen = (owner[:, None, :] == 0) | (owner[:, None, :] == owner[:, :, None])  # [B, S, S], query by key
        return {
            "pixel_values": pixels_of(scenes),
            "input_ids": tokens,
            "position_ids": positions,
            "attention_mask": seen.tril()[:, None],
            "labels": labels,
        }

    def examined(
        self, split: str, kinds: Sequence[str] = tuple(QUESTION_SHARES)
    ) -> tuple[list[Question], dict[str, Tensor]]:
        """One question for each scene of a split, and the inputs that ask it."""
        scenes = DigitScenes(split, EVALUATED)
        questions = scenes.asked(kinds=kinds)
        return questions, self.packed(scenes, [[question] for question in questions])

    @staticmethod
    @torch.no_grad()
    def matches(model: LlavaForConditionalGeneration, inputs: dict[str, Tensor], batch: int = 250) -> Tensor:
        """Rows [N] bool in which every label is the likeliest token: those that greedy decoding gets right."""
        model.eval()
        right = []
        for start in range(0, len(inputs["input_ids"]), batch):
            part = {name: value[start : start + batch] for name, value in inputs.items()}
            label = part.pop("labels")[:, 1:]
            likeliest = model(**part).logits[:, :-1].argmax(-1)  # [B, S - 1]
            right.append(((likeliest == label) | (label == IGNORED)).all(1))
        return torch.cat(right)

    def loss(self, scenes: DigitScenes) -> Tensor:
        """Cross-entropy of captions and answers."""
        questions = zip(*(scenes.asked(seed) for seed in range(self.asked)), strict=True)
        return self.model(**self.packed(scenes, list(questions), captions=True)).loss

    @functools.cached_property
    def validation(self) -> dict[str, Tensor]:
        """The inputs of ``score``."""
        return self.examined("validation")[1]

    def score(self) -> float:
        """Exact match of the answers."""
        return self.matches(self.model, self.validation).double().mean().item()

    def measure(self, split: str) -> dict[str, float]:
        """Exact match over all kinds of question, of each kind, over plain kinds asked alone, and of captions."""
        questions, inputs = self.examined(split)
        right = self.matches(self.model, inputs).double()
        measured = {self.scored: right.mean().item()}
        for kind in QUESTION_SHARES:
            measured[kind] = right[[question.kind == kind for question in questions]].mean().item()
        plain = self.matches(self.model, self.examined(split, PLAIN_KINDS)[1])
        measured["plain kinds only"] = plain.double().mean().item()
        scenes = DigitScenes(split, EVALUATED)
        captioned = self.matches(self.model, self.packed(scenes, [()] * len(scenes), captions=True))
        return measured | {"caption": captioned.double().mean().item()}

    def about(self) -> str:
        """What it is."""
        return f"""\
A LLaVA of {self.parameters:,} parameters that answers questions about DigitScenes: one to four handwritten digits,
coloured and placed on a grid. The vision tower began as that of clip-digits (six layers of width 128, four heads of 32,
512 neurons; 48-pixel pictures in 8-pixel patches: 36 tokens); a projector; four LLaMA layers of width 128, four heads
on two key-value heads, 384 neurons; one token a word. It is there to be pruned: small enough for any machine, good
enough to have something to lose. It knows nothing else.

    inputs = processor(images=[picture], text=["<image> what digit is top left ?"], return_tensors="pt")
    model.generate(**inputs, max_new_tokens=2)

A bare `<image>` asks for a caption, such as "a red 3 top left, a blue 7 bottom right"; give that 24 tokens."""

    def results(self, numbers: dict[str, dict[str, float]]) -> str:
        """Exact match."""
        asks = {
            "digit": "what digit is top left ?",
            "colour": "what colour is top left ?",
            "digit by colour": "what digit is red ?",
            "colour by digit": "what colour is the 3 ?",
            "count": "how many digits are there ?",
        }
        rows = [
            [name, asks.get(name, ""), *(f"{found[name]:.3f}" for found in numbers.values())]
            for name in next(iter(numbers.values()))
        ]
        return f"""\
Exact match of greedy answers to one question for each of {EVALUATED} scenes, `DigitScenes(split, {EVALUATED}).asked()`;
for an empty place the answer is "none". The first row is over all kinds, mixed by `QUESTION_SHARES`; "plain kinds only"
is `asked(kinds=PLAIN_KINDS)`: digit, colour and count, without the two that must be searched for. Captions are right
as a whole or wrong.

{table(["", "for example", *numbers], rows)}"""

    def method(self) -> str:
        """The loss."""
        return f"Cross-entropy of each scene's caption and of the answers to {self.asked} of its questions, all weights"


# --- training and writing --------------------------------------------------------------------------------------------

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
    card = CARD.format(
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
    (out / "README.md").write_text(card, encoding="utf-8")
    print(f"{out}: {minutes:.0f} minutes; test " + ", ".join(f"{k} {v:.4f}" for k, v in numbers["test"].items()))


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
