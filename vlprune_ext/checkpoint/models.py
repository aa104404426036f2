"""`load_model`: a model by the name people have for it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoProcessor, PreTrainedModel

from .. import zoo
from ..anatomy import FAMILIES
from .load import load_pruned
from .manifest import MANIFEST, one_line

DTYPES: dict[str, torch.dtype | str] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "auto": "auto",
}


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, where it came from, and its processor if it has one."""

    model: PreTrainedModel
    source: str  # a folder or a hub id
    processor: Any


def load_model(name: str, *, device: str = "auto", dtype: str = "float32") -> Loaded:
    """Load a model folder, a folder of `save_pruned`, a zoo model ("clip-digits") or a hub id ("owner/name").

    The class is ``architectures[0]`` of the config; weights are safetensors only; remote code is never run.

    Parameters
    ----------
    name : str
        Looked for in this order.
    device : str
        "auto" (the GPU if there is one), or what torch.device takes.
    dtype : str
        A key of `DTYPES`; "auto" keeps that of the files.

    Returns
    -------
    Loaded
        The model in evaluation mode, its source, and its processor if it has one.

    Raises
    ------
    FileNotFoundError
        There is nothing of that name.
    ValueError
        A model that is not known or cannot be read, or whose processor cannot be read.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r}, expected one of {', '.join(DTYPES)}")
    place = _device(device)
    source = _find(name)
    if (Path(source) / MANIFEST).is_file():
        model = load_pruned(source, dtype=DTYPES[dtype])
    else:
        model = _load_plain(source, DTYPES[dtype])
    model.to(place)  # type: ignore[arg-type]
    return Loaded(model.eval(), source, _processor(source))


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device: {device!r}, expected auto, cpu, cuda or cuda:N") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {device!r}, but torch sees no GPU")
    return place


def _find(name: str) -> str:
    if name in zoo.names():
        return str(zoo.path(name))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{name}: no config.json in it, so not a model folder")
        return str(folder)
    if folder.exists():
        raise ValueError(f"{name}: a file, expected a model folder")
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        return name
    raise FileNotFoundError(
        f"{name}: no such model folder, and the zoo has {', '.join(zoo.names()) or 'no models'}"
        " (a model on the hub is owner/name)"
    )


def _load_plain(source: str, dtype: torch.dtype | str) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # transformers and the hub client raise many kinds
        raise ValueError(f"{source}: its config cannot be read ({one_line(error)})") from error
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if architecture not in FAMILIES:
        raise ValueError(
            f"{source}: a model of type {config.model_type!r} ({architecture or 'no architecture named'}) is not known;"
            f" known are {', '.join(sorted(FAMILIES))}"
        )
    model_class = getattr(transformers, architecture)
    try:
        model, info = model_class.from_pretrained(
            source, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # transformers and safetensors raise many kinds
        raise ValueError(f"{source}: its weights cannot be loaded ({one_line(error)})") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"{source}: its files lack {len(missing)} tensors of a {architecture}, among them {missing[0]}"
        )
    return model


_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json")


def _processor(source: str) -> Any:
    """Return the processor of a model; None for one that has none.

    Raises ValueError for one that is there and cannot be read.
    """
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).is_file() for name in _PROCESSOR_FILES):
        return None
    try:
        return AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise many kinds
        if isinstance(error, OSError) and not folder.is_dir():
            return None  # a model on the hub without one; `load_data` says so when it needs it
        raise ValueError(f"{source}: its processor cannot be read ({one_line(error)})") from error
