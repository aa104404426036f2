"""Preprocessing of images and texts into model inputs, by the processor of each model family."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor, PreTrainedTokenizerBase
from transformers.image_processing_base import ImageProcessingMixin

from .samples import Prompts, Sample
from .tensors import Classes, Data

IGNORED = -100  # label of positions without a loss: ignore_index of cross-entropy

_CHUNK = 64  # images or texts handed to a processor at once


class Preparer:
    """Preprocess records into `Data` for one model, by its processor and the signature of its forward.

    Parameters
    ----------
    model : PreTrainedModel or None
        None: every output of the processor is taken.
    processor : object
        A processor, tokenizer or image processor; None: loaded from the model's folder.
    fallback : Path or None
        Folder of a processor, in place of the model's.

    Raises
    ------
    ValueError
        No processor, or one that lacks what the model's forward takes.
    """

    def __init__(self, model: Any, processor: Any, fallback: Path | None) -> None:
        if processor is None:
            processor = _find_processor(model, fallback)
        self.processor = processor
        self.tokenizer: Any = getattr(processor, "tokenizer", None)
        self.image_processor: Any = getattr(processor, "image_processor", None)
        if isinstance(processor, PreTrainedTokenizerBase):
            self.tokenizer = processor
        elif isinstance(processor, ImageProcessingMixin):
            self.image_processor = processor
        if self.tokenizer is None and self.image_processor is None:
            raise ValueError(
                f"processor is a {type(processor).__name__}, expected a processor, tokenizer or image processor"
            )

        self.accepts: set[str] | None = None
        if model is not None:
            self.accepts = set(inspect.signature(model.forward).parameters)
            for key, part, what in (
                ("pixel_values", self.image_processor, "image processor"),
                ("input_ids", self.tokenizer, "tokenizer"),
            ):
                if key in self.accepts and part is None:
                    raise ValueError(f"{type(model).__name__} takes {key}, but the processor has no {what}")
        self.has_images = self.image_processor is not None and self._taken("pixel_values")
        self.has_texts = self.tokenizer is not None and self._taken("input_ids")
        if not (self.has_images or self.has_texts):
            raise ValueError(f"{type(model).__name__} takes neither pixel_values nor input_ids")

        token = getattr(processor, "image_token", None)
        self.image_token = str(token) if token and self.has_images and self.has_texts else ""
        # Processors whose placeholder is wrapped: Gemma3 writes the wrapping itself, Qwen-VL expects it in the text.
        start, end = (getattr(processor, f"vision_{side}_token", "") for side in ("start", "end"))
        self.image_prefix = f"{start or ''}{self.image_token}{end or ''}"
        self.adds_image = hasattr(processor, "num_query_tokens")  # BLIP-2's: its texts are to have no placeholder
        self.scored = bool(self.image_token) or (model is not None and getattr(model, "can_generate", lambda: False)())
        config = getattr(model, "config", None)
        text_config: Any = getattr(config, "text_config", config)
        # BLIP's question answering: an encoder reads the question, a decoder starts with a token of its own.
        self.only_answers = (
            self.scored and self.has_images and not self.image_token and "decoder_input_ids" in (self.accepts or ())
        )
        # Of an encoder-decoder such as T5, the decoder reads this token and then the labels.
        seq2seq = self.scored and getattr(text_config, "is_encoder_decoder", False)
        self.decoder_start: int | None = text_config.decoder_start_token_id if seq2seq else None
        self.decoder_end: list[int] = []  # appended to labels where the tokenizer adds no EOS
        if self.only_answers:
            self.decoder_start, self.decoder_end = text_config.bos_token_id, [text_config.sep_token_id]
        if seq2seq and self.decoder_start is None:
            raise ValueError(
                f"{type(model).__name__}: its config has no decoder_start_token_id, which labels begin with"
            )
        self.max_length = min(
            getattr(self.tokenizer, "model_max_length", None) or 10**9,
            getattr(text_config, "max_position_embeddings", None) or 10**9,
        )
        # SigLIP pools the last position and was trained with every text padded to full length, without a mask.
        kind = getattr(config, "model_type", type(processor).__name__)
        self.full_length = str(kind).lower().startswith("siglip")

    def _taken(self, key: str) -> bool:
        """Return whether the model's forward takes an input; without a model, any."""
        return self.accepts is None or key in self.accepts

    def __call__(self, name: str, split: str, records: Sequence[Sample], prompts: Prompts | None) -> Data:
        owner = [i for i, record in enumerate(records) for _ in record.texts]
        texts = [text for record in records for text in record.texts]
        images: dict[str, Tensor] = {}
        rows: dict[str, Tensor] = {}
        goes_on = bool(self.image_token) and self.decoder_start is None
        if any(record.question for record in records) and not (goes_on or self.only_answers):
            raise ValueError(
                f"{name} asks questions, expected a model that reads an image token and goes on from there"
                " or one made for questions"
            )
        if self.image_token:
            images, rows = self._images_with_texts(records)
        else:
            if self.has_images:
                images = self._images(records)
            if self.only_answers:
                rows = self._texts(texts, True, [record.question for record in records for _ in record.texts])
            elif self.has_texts:
                rows = self._texts(texts, scored=self.scored)
        if not self.has_texts:
            owner = list(range(len(records)))
        classes = labels = None
        if prompts is not None:
            names = list(prompts)
            labels = torch.tensor([names.index(str(record.label)) for record in records])
            if not self.has_texts:
                classes = Classes({}, torch.arange(len(names)), names)
            elif not self.image_token and self.has_images:
                of_prompt = [i for i, name in enumerate(names) for _ in prompts[name]]
                every = [prompt for name in names for prompt in prompts[name]]
                classes = Classes(self._texts(every), torch.tensor(of_prompt), names)
        return Data(name, split, images, rows, torch.tensor(owner), classes, labels)

    def _images(self, records: Sequence[Sample]) -> dict[str, Tensor]:
        """Preprocess the images of all records, a chunk at a time."""
        outputs = []
        for chunk in _chunks(records):
            output = self.image_processor(images=[record.open() for record in chunk], return_tensors="pt")
            outputs.append({key: value for key, value in output.items() if self._is_input(key, value)})
        return _concatenated(outputs, len(records))

    def _limits(self, spare: int = 0) -> dict[str, Any]:
        """Return the tokenizer's truncation arguments, leaving room for ``spare`` more tokens."""
        return {"truncation": True, "max_length": self.max_length - spare} if self.max_length < 10**6 else {}

    def _texts(
        self, texts: Sequence[str], scored: bool = False, questions: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Tokenize texts, or the questions that they answer, and pad them to [T, S]; with labels if ``scored``."""
        limits = self._limits()
        if self.full_length:
            limits["padding"] = "max_length"
        output = self.tokenizer(list(texts if questions is None else questions), **limits)
        rows = [
            {key: torch.tensor(value[i]) for key, value in output.items() if self._is_input(key)}
            for i in range(len(texts))
        ]
        for row, text in zip(rows, texts, strict=True):
            row.setdefault("attention_mask", torch.ones_like(row["input_ids"]))
            if self.full_length:
                row["attention_mask"].fill_(1)
            if scored and self.decoder_start is not None:
                row["labels"] = self._decoder_labels(text)
        return self._padded(rows, scored)

    def _images_with_texts(self, records: Sequence[Sample]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Process each text with its image in one call, since the number of image tokens depends on the image."""
        images, rows = [], []
        for record in records:
            image = record.open()
            for at, text in enumerate(record.texts):
                prompt, token, answer = text.rpartition(self.image_token)
                if self.decoder_start is not None:  # the encoder reads the image, the decoder the text
                    text = prompt + token
                if self.adds_image:
                    text = text.replace(self.image_token, "")
                elif self.image_token not in text:
                    text = self.image_prefix + (f"{record.question} {text}" if record.question else text)
                output = self.processor(images=[image], text=[text], return_tensors="pt")
                ids = output["input_ids"]
                aligned = {k for k, v in output.items() if isinstance(v, Tensor) and v.shape == ids.shape}
                aligned |= {k for k in output if k.startswith("qformer_")}  # the text in the Q-Former's own tokens
                rows.append({key: output[key][0] for key in aligned if self._is_input(key)})
                if record.question:
                    rows[-1]["labels"] = self._answer_labels(rows[-1], record.texts[at])
                if self.decoder_start is not None:
                    rows[-1]["labels"] = self._decoder_labels(answer)
                if at == 0:
                    images.append({k: v for k, v in output.items() if k not in aligned and self._is_input(k, v)})
        return _concatenated(images, len(records)), self._padded(rows, scored=True)

    def _is_input(self, key: str, value: Any = None) -> bool:
        """Return whether a processor output is an input of the model."""
        always = key in ("input_ids", "attention_mask", "pixel_values")
        return (always or self._taken(key)) and (value is None or isinstance(value, Tensor))

    def _padded(self, rows: list[dict[str, Tensor]], scored: bool) -> dict[str, Tensor]:
        """Pad rows of different lengths to [T, S], on the right; with labels if ``scored``."""
        tokenizer = self.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        fill = {"input_ids": 0 if pad is None else pad, "labels": IGNORED}
        if scored:
            for row in rows:
                row.setdefault("labels", self._labels(row))
        return {
            key: torch.nn.utils.rnn.pad_sequence(
                [row[key] for row in rows], batch_first=True, padding_value=fill.get(key, 0)
            )
            for key in rows[0]
        }

    def _decoder_labels(self, text: str) -> Tensor:
        """Return a decoder's labels: start token, text, end tokens."""
        limits = self._limits(1 + len(self.decoder_end))
        ids = self.tokenizer(text, add_special_tokens=not self.only_answers, **limits)["input_ids"]
        return torch.tensor([self.decoder_start, *ids, *self.decoder_end])

    def _answer_labels(self, row: dict[str, Tensor], answer: str) -> Tensor:
        """Return labels for the answer at the end of the text, and for EOS if the tokenizer appends it."""
        labels = self._labels(row)
        words = len(self.tokenizer(answer, add_special_tokens=False)["input_ids"])
        ends = bool(labels[-1] == self.tokenizer.eos_token_id)
        labels[: len(labels) - words - ends] = IGNORED
        return labels

    def _labels(self, row: dict[str, Tensor]) -> Tensor:
        """Return labels for the ids after the image, EOS included; other special tokens and padding are ignored."""
        ids = row["input_ids"]
        special = torch.tensor([i for i in self.tokenizer.all_special_ids if i != self.tokenizer.eos_token_id])
        ignored = (row["attention_mask"] == 0) | torch.isin(ids, special)
        if self.image_token:
            image_id = getattr(self.processor, "image_token_id", None)
            if image_id is None:
                image_id = self.tokenizer.convert_tokens_to_ids(self.image_token)
            places = (ids == image_id).nonzero()
            if len(places):
                ignored[: int(places.max()) + 1] = True
        return ids.masked_fill(ignored, IGNORED)


def _find_processor(model: Any, fallback: Path | None) -> Any:
    """Load the processor of a model from its folder, or from ``fallback``."""
    where = fallback if fallback is not None else getattr(model, "name_or_path", None)
    if not where:
        whose = "no model or processor was given" if model is None else "the model was not loaded from a folder"
        raise ValueError(f"{whose}, so its processor cannot be found; expected processor=")
    try:
        return AutoProcessor.from_pretrained(where, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"no processor could be loaded from {where} ({reason}); expected processor=") from error


def _chunks(records: Sequence[Sample]) -> Iterable[Sequence[Sample]]:
    """Split records into chunks for the processor."""
    return (records[start : start + _CHUNK] for start in range(0, len(records), _CHUNK))


def _concatenated(outputs: list[dict[str, Tensor]], n_images: int) -> dict[str, Tensor]:
    """Concatenate processor outputs key by key; raise ValueError unless every image gives the same shape."""
    joined = {}
    for key in outputs[0]:
        values = [output[key] for output in outputs]
        if len({value.shape[1:] for value in values}) > 1:
            shapes = ", ".join(sorted({str(list(value.shape[1:])) for value in values})[:3])
            raise ValueError(f"the processor gives {key} of different shapes ({shapes}), expected one size of image")
        joined[key] = torch.cat(values)
        counts = {len(value) for value in values}
        if len(joined[key]) % n_images or (len(values) == n_images and len(counts) > 1):
            raise ValueError(f"the processor gives {key} of uneven length ({counts} rows), expected one size of image")
    return joined
