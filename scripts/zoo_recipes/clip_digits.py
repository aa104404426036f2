"""clip-digits: pictures against captions."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

from vlprune_ext.zoo.digit_scenes import IMAGE_SIZE, DigitScenes

from .card import PURPOSE, table
from .recipe import CAPTION_WORDS, Recipe, Stage, image_processor, pixels_of, word_tokenizer


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
        return self.inputs_of(DigitScenes("validation", self.evaluated), self.tokenizer)

    def score(self) -> float:
        """Recall@1, mean of both ways."""
        return self.recall(self.model, self.validation)["recall@1"]

    def measure(self, split: str) -> dict[str, float]:
        """Recall both ways."""
        return self.recall(self.model, self.inputs_of(DigitScenes(split, self.evaluated), self.tokenizer))

    def about(self) -> str:
        """What it is."""
        return f"""\
A CLIP of {self.parameters:,} parameters (six vision and four text layers of width 128, four heads of 32, 512 neurons;
48-pixel pictures in 8-pixel patches; one token a word), trained from nothing on DigitScenes: one to four handwritten
digits, coloured and placed on a grid, with captions such as "a red 3 top left, a blue 7 bottom right".
{PURPOSE}"""

    def results(self, numbers: dict[str, dict[str, float]]) -> str:
        """Recall."""
        columns = {
            "recall@1": "recall@1",
            "recall@5": "recall@5",
            "image to text @1": "image_to_text_recall@1",
            "text to image @1": "text_to_image_recall@1",
        }
        rows = [[split, *(f"{found[key]:.3f}" for key in columns.values())] for split, found in numbers.items()]
        n = self.evaluated
        return f"""\
Retrieval among {n} scenes with different captions, `DigitScenes(split, {n}, seed=0)`; recall@k without
a direction is the mean of both.

{table(["split", *columns], rows)}"""

    def method(self) -> str:
        """The loss."""
        return "Symmetric contrastive loss with a learned temperature"
