"""What token pruning costs: one question answered with all visual tokens and with fewer, and many of them judged."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..anatomy import describe
from ..anatomy.patch import Patches, evaluation_mode
from ..checkpoint.models import Loaded
from ..data import Data
from ..objectives import usual_objective
from ..progress import Progress
from ..tokens import EvictTokens, TokenMethod, prune_tokens
from .measure import evaluate


@dataclass
class Trial:
    """What came of one run.

    answer     the text
    seconds    of `generate`, median
    cache      bytes of keys and values of the language model at the end
    peak       bytes allocated on a GPU at most, beyond what was there; 0 on a CPU
    share      of the visual tokens: what a block computes with or holds in its cache, mean over blocks
    kept       [P] bool, the visual tokens that are left at last, for one image of P; None for the dense model
    """

    answer: str
    seconds: float
    cache: int
    peak: int
    share: float
    kept: Tensor | None


def ask(processor: Any, image: Any, question: str, model: nn.Module) -> dict[str, Tensor]:
    """Process a picture and a question, by the processor's chat template if it has one, into model inputs."""
    token = getattr(processor, "image_token", None)
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        turns = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(turns, add_generation_prompt=True)
    else:
        text = question if token is None or token in question else f"{token} {question}"
    # Lists, since some processors take several images a text.
    found = processor(images=[image], text=[text], return_tensors="pt")
    like = next(model.parameters())
    return {
        name: value.to(like) if value.is_floating_point() else value.to(like.device)
        for name, value in found.items()
        if isinstance(value, Tensor)
    }


@torch.no_grad()
def run_trial(
    model: nn.Module,
    processor: Any,
    inputs: dict[str, Tensor],
    method: TokenMethod | None,
    *,
    length: int = 32,
    repeats: int = 5,
) -> Trial:
    """Answer a question about one picture under a method; None: with all visual tokens.

    inputs     what `ask` gives
    length     tokens of the answer at most

    Raises ValueError for a model that does not generate.
    """
    anatomy = describe(model)
    generator: Any = model
    if not hasattr(generator, "generate"):
        raise ValueError(f"model: a {type(model).__name__} does not answer questions; expected one that generates text")
    caches: list[Any] = []

    def note(_: nn.Module, __: tuple, kwargs: dict[str, Any]) -> None:
        caches[:] = [kwargs.get("past_key_values")]

    seconds, peak = [], 0
    cuda = anatomy.device.type == "cuda"
    context = nullcontext() if method is None else prune_tokens(model, method)
    with evaluation_mode(model), context as pruning, Patches() as patches:
        towers = list(anatomy.towers.values())
        patches.pre_hook(towers[-1].container[-1], note, with_kwargs=True)
        for turn in range(repeats + 1):  # the first one warms up
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                peak = -torch.cuda.memory_allocated()
            start = time.perf_counter()
            ids = generator.generate(**inputs, max_new_tokens=length, do_sample=False)
            if cuda:
                torch.cuda.synchronize()
                peak += torch.cuda.max_memory_allocated()
            seconds += [time.perf_counter() - start] * bool(turn)
    prompt = 0 if anatomy.family.needs_decoder_ids else inputs["input_ids"].shape[1]
    return Trial(
        answer=processor.batch_decode(ids[:, prompt:], skip_special_tokens=True)[0].strip(),
        seconds=statistics.median(seconds),
        cache=_bytes(caches[0]) if caches else 0,
        peak=peak,
        share=1.0 if pruning is None else pruning.share(),
        kept=None if pruning is None else pruning.left(),
    )


def _bytes(cache: Any) -> int:
    caches = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    layers = [layer for one in (cache, *caches) for layer in getattr(one, "layers", ())]
    parts = [x for layer in layers for x in (layer.keys, layer.values) if x is not None]
    return sum(x.numel() * x.element_size() for x in parts)


def squares(kept: Tensor, inputs: dict[str, Tensor], model: nn.Module) -> np.ndarray:
    """[height, width] bool: the squares of a picture that its visual tokens [P] stand for.

    Raises ValueError where they are none: several images or tiles, newlines among them.
    """
    config: Any = model.config
    if len(inputs.get("image_grid_thw", ())) == 1:
        _, height, width = (inputs["image_grid_thw"][0] // config.vision_config.spatial_merge_size).tolist()
    else:
        height = width = math.isqrt(kept.numel())
    if height * width != kept.numel():
        raise ValueError(f"{kept.numel()} visual tokens: not the squares of one picture, which could be drawn over it")
    return kept.view(height, width).cpu().numpy()


def seen_picture(image: Any, inputs: dict[str, Tensor], processor: Any) -> np.ndarray:
    """[H, W, 3] in 0..1: the picture as its image processor cuts and scales it; as it came if that gives patches."""
    pixels = inputs["pixel_values"]
    whole = pixels.reshape(-1, *pixels.shape[-3:]) if pixels.dim() >= 4 else pixels[:0]
    if len(whole) != 1:
        return np.asarray(image.convert("RGB")) / 255
    images = getattr(processor, "image_processor", processor)
    mean, deviation = (torch.tensor(getattr(images, f"image_{name}"), dtype=torch.float32) for name in ("mean", "std"))
    shown = whole[0].float().cpu().permute(1, 2, 0) * deviation + mean
    return shown.clamp(0, 1).numpy()


@dataclass
class Judged:
    """What a model does on data under one method.

    share      of the visual tokens: what a block computes with or holds in its cache, mean over blocks
    quality    the objective's first number
    """

    method: TokenMethod
    share: float
    quality: float


def judge(
    model: nn.Module,
    data: Data,
    methods: Mapping[str, Sequence[TokenMethod]],
    metric: str | None = None,
    *,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> tuple[float, dict[str, list[Judged]]]:
    """(quality of the dense model, name -> what each of the methods leaves of it).

    Raises ValueError for methods that change the key-value cache and a metric that uses none.
    """
    metric = usual_objective(describe(model), "answer").name if metric is None else metric
    evicting = [name for name, several in methods.items() if any(isinstance(one, EvictTokens) for one in several)]
    if evicting and metric != "generated":
        raise ValueError(f"metric is {metric!r}; expected 'generated' for {evicting[0]}, which changes what is cached")
    dense = _quality(model, data, metric, batch_size)
    found: dict[str, list[Judged]] = {}
    total = sum(map(len, methods.values()))
    for name, several in methods.items():
        for method in several:
            with prune_tokens(model, method) as pruning:
                quality = _quality(model, data, metric, batch_size)
                found.setdefault(name, []).append(Judged(method, pruning.share(), quality))
            if progress is not None:
                progress(sum(map(len, found.values())), total, name)
    return dense, found


def _quality(model: nn.Module, data: Data, metric: str, batch_size: int) -> float:
    return next(iter(evaluate(model, data, metric, batch_size=batch_size).values()))


@dataclass
class TokenComparison:
    """Methods side by side: on one picture, and (where there is data) by how often they are right.

    trials            name -> what came of it; "all tokens" first
    picture, squares  [H, W, 3] in 0..1; name -> [height, width] bool: those that stay at last
    dense, judged     quality of the dense model; name -> what `judge` found
    """

    question: str
    trials: dict[str, Trial]
    picture: np.ndarray
    squares: dict[str, np.ndarray]
    metric: str = ""
    dense: float = math.nan
    judged: dict[str, list[Judged]] = field(default_factory=dict)
    data: Data | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for --json."""
        told = ("answer", "seconds", "cache", "peak", "share")
        found: dict[str, Any] = {
            "question": self.question,
            "trials": {name: {key: getattr(trial, key) for key in told} for name, trial in self.trials.items()},
        }
        if self.data is not None:
            found |= {"data": self.source, "metric": self.metric, "dense": self.dense}
            found["judged"] = {
                name: [{"keep": one.method.keep, "share": one.share, self.metric: one.quality} for one in several]
                for name, several in self.judged.items()
            }
        return found

    @property
    def source(self) -> dict[str, Any]:
        """Which data it was; empty without."""
        data = self.data
        if data is None:
            return {}
        return data.origin


def compare_tokens(
    loaded: Loaded,
    image: Any,
    question: str,
    methods: Mapping[str, Sequence[TokenMethod]],
    *,
    data: Data | None = None,
    metric: str | None = None,
    length: int = 32,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> TokenComparison:
    """Ask about a picture with all visual tokens and under the first of each name's methods; judge all on ``data``."""
    model, processor = loaded.model, loaded.processor
    inputs = ask(processor, image, question, model)
    first: dict[str, TokenMethod | None] = {"all tokens": None, **{name: ways[0] for name, ways in methods.items()}}
    trials = {name: run_trial(model, processor, inputs, method, length=length) for name, method in first.items()}
    found = TokenComparison(
        question,
        trials,
        seen_picture(image, inputs, processor),
        {name: squares(trial.kept, inputs, model) for name, trial in trials.items() if trial.kept is not None},
    )
    if data is not None:
        found.data, found.metric = data, metric or usual_objective(describe(model), "answer").name
        found.dense, found.judged = judge(model, data, methods, found.metric, batch_size=batch_size, progress=progress)
    return found
