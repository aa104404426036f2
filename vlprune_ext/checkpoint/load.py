"""Load a pruned model from the folder that `save_pruned` wrote."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel

from ..units.surgery import shrink
from .config import plain_config
from .manifest import MANIFEST, one_line, read_json, read_manifest


def load_pruned(path: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
    """Load what `save_pruned` wrote: the model in evaluation mode, in the dtype it was saved in.

    ``model.vlprune`` holds the plans that were applied. No dense weights are made on the way; only safetensors are read
    and no code from the folder is run.

    Parameters
    ----------
    path : str or PathLike
        A folder; or, if there is none of that name, a model id on the Hugging Face hub.
    **kwargs
        Passed on to ``from_pretrained``: dtype, device_map, attn_implementation.

    Returns
    -------
    PreTrainedModel

    Raises
    ------
    FileNotFoundError
        There is nothing of that name.
    ValueError
        It is not a pruned model, a file is damaged, or its tensors are not those that ``pruning.json`` promises.
    """
    folder = _local_folder(path)
    record = read_manifest(folder)
    content = read_json(folder / "config.json")
    model_class: Any = _model_class(folder, content)
    _check_files(folder)
    try:
        config = model_class.config_class.from_dict(plain_config(content))
    except Exception as error:  # validation raises many kinds
        raise ValueError(f"{folder / 'config.json'}: {one_line(error)}") from error
    with _built_as(model_class, record["structure"], folder / MANIFEST):
        model, info = model_class.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
            **kwargs,
        )
    _check_loaded(folder, info)
    model.vlprune = {"shape": record["shape"], "plans": record["plans"]}
    return model.eval()


def _local_folder(path: str | os.PathLike) -> Path:
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{path}: a file, expected the folder of a pruned model")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)):
        raise FileNotFoundError(f"{path}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except Exception as error:  # the client raises many kinds
        raise FileNotFoundError(f"{path}: no such folder, and not found on the hub ({one_line(error)})") from error


def _model_class(folder: Path, content: dict) -> type[PreTrainedModel]:
    names = content.get("architectures") or [None]
    found = getattr(transformers, str(names[0]), None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(f"{folder / 'config.json'}: architectures {names}, expected the name of a transformers model")
    return found


def _check_files(folder: Path) -> None:
    """Raise ValueError naming the file, and the tensor, if a weights file is absent or damaged."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
    for name in names:
        file = folder / str(name)
        if not file.is_file():
            raise ValueError(f"{file}: missing")
        _check_shard(file)


def _check_shard(file: Path) -> None:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{file}: damaged or truncated in its header ({size} bytes)")
        try:
            tensors = json.loads(stream.read(length))
            ends = {k: v["data_offsets"][1] for k, v in tensors.items() if k != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{file}: damaged header, not safetensors") from None
    for name, end in sorted(ends.items(), key=lambda item: item[1]):
        if 8 + length + end > size:
            raise ValueError(f"{file}: truncated: tensor {name} ends at byte {8 + length + end}, the file has {size}")
    try:
        with safetensors.safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged ({one_line(error)})") from error


@contextmanager
def _built_as(model_class: Any, structure: dict, source: Path) -> Iterator[None]:
    """While this lasts, new models of a class have the units of ``structure``, which was read from ``source``."""
    build = model_class.__init__

    def build_pruned(self, *args, **kwargs):
        build(self, *args, **kwargs)
        if type(self) is model_class:
            try:
                shrink(self, structure)
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from error

    model_class.__init__ = build_pruned
    try:
        yield
    finally:
        model_class.__init__ = build


def _check_loaded(folder: Path, info: dict) -> None:
    problems = [f"{name} missing" for name in sorted(info["missing_keys"])]
    problems += [f"{name} unexpected" for name in sorted(info["unexpected_keys"])]
    problems += [
        f"{name} has shape {list(saved)}, expected {list(expected)}"
        for name, saved, expected in sorted(info["mismatched_keys"])
    ]
    problems += list(info.get("error_msgs") or ())
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{folder}: its tensors do not fit {MANIFEST}: {'; '.join(problems[:3])}{more}")
