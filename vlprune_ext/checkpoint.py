"""Save a pruned model and load it again.

A pruned model is an ordinary folder of safetensors and ``config.json``, with two more files: ``pruning.json``, which
says what was done and how many units every block has, and a model card. Uneven layers are written into the config in
transformers' own words (``per_layer_config``); `load_pruned` goes by ``pruning.json``.
"""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import os
import platform
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from . import __version__
from .anatomy import Anatomy, Site, Tower, describe
from .semi_structured import is_converted
from .surgery import shrink

FORMAT = 1
RECORD = "pruning.json"
CARD = "README.md"
# transformers' own keys. The second lets it read a config whose layers differ, as AutoProcessor does; without it even
# the validation of a config fails.
_PER_LAYER = "per_layer_config"
_READABLE = "allow_global_per_layer_attribute_access"


# --- saving ----------------------------------------------------------------------------------------------------------


def save_pruned(
    model: PreTrainedModel,
    out_dir: str | os.PathLike,
    *,
    processor: Any = None,
    method: Any = None,
    data: Any = None,
    before: Mapping[str, float] | None = None,
    after: Mapping[str, float] | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write ``model`` to a folder: safetensors, config.json, pruning.json and a model card. Returns the folder.

    processor      saved beside it, so that the folder is complete: a processor, tokenizer or image processor
    method         how it was pruned, for the record: a method object (its fields are kept) or a dict; default: that of
                   the last plan applied
    data           the calibration data, for the record (its name and hash); default: that of the last plan applied
    before, after  measured numbers, for instance those of `evaluate`

    The folder appears whole or not at all. An earlier pruned model in its place is replaced, other files in that folder
    stay; any other non-empty folder is refused. The model and its config are not changed.

    Raises ValueError for a model that is not known, one with semi-structured weights, or a folder that must not be
    replaced, OSError if it cannot be written (disk full); then nothing has changed on disk.
    """
    out_dir = Path(out_dir).absolute()
    anatomy = describe(model)
    for name, weight in model.named_parameters():
        if is_converted(weight):
            raise ValueError(
                f"model: {name} is semi-structured, safetensors holds dense weights; save the model before"
            )
    _check_target(out_dir)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    staging = out_dir.with_name(f".{out_dir.name}.{uuid.uuid4().hex[:8]}")
    try:
        staging.mkdir()
        _save_model(model, staging, max_shard_size)
        stock = _write_config(model, anatomy, staging / "config.json")
        if processor is not None:
            processor.save_pretrained(staging)
        record = _record(model, anatomy, method, data, before, after)
        record["loads_with"] = "transformers from_pretrained" if stock else "vlprune_ext.load_pruned"
        (staging / CARD).write_text(_card(model, record), encoding="utf-8")
        record["files"] = sorted([*(path.name for path in staging.iterdir()), RECORD])
        (staging / RECORD).write_text(_pretty(record), encoding="utf-8")
        for path in (*staging.rglob("*"), staging):
            _sync(path)
        _exchange(staging, out_dir)
    except SafetensorError as error:
        raise _write_error(error, out_dir) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    _sync(out_dir.parent)
    return out_dir


def _check_target(out_dir: Path) -> None:
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f"{out_dir}: a file, expected a folder to write the model to")
    if out_dir.is_dir() and any(out_dir.iterdir()):
        try:
            _read_record(out_dir)
        except ValueError:
            raise ValueError(
                f"{out_dir}: not empty and not an earlier pruned model; choose another folder or empty it"
            ) from None


def _write_error(error: SafetensorError, out_dir: Path) -> OSError:
    """safetensors reports what the system said as text only: "... No space left on device (os error 28)"."""
    code = re.search(r"os error (\d+)", str(error))
    number = int(code.group(1)) if code else errno.EIO
    return OSError(number, os.strerror(number) if code else str(error), str(out_dir))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(staging: Path, out_dir: Path) -> None:
    """Put the finished folder in its place; what an earlier one holds besides its own files moves along."""
    if not out_dir.exists() or not any(out_dir.iterdir()):
        os.replace(staging, out_dir)
        return
    own = set(_read_record(out_dir).get("files", ()))
    earlier = staging.with_name(f"{staging.name}.earlier")
    os.rename(out_dir, earlier)
    try:
        os.rename(staging, out_dir)
    except BaseException:
        os.rename(earlier, out_dir)
        raise
    for path in earlier.iterdir():
        if path.name not in own and not (out_dir / path.name).exists():
            os.rename(path, out_dir / path.name)
    shutil.rmtree(earlier, ignore_errors=True)


def _save_model(model: PreTrainedModel, folder: Path, max_shard_size: int | str) -> None:
    live = model.config
    model.config = copy.deepcopy(live)  # save_pretrained writes into it
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    finally:
        model.config = live


# --- the config ------------------------------------------------------------------------------------------------------


def _write_config(model: PreTrainedModel, anatomy: Anatomy, path: Path) -> bool:
    """Put the units of every block into config.json; True if transformers alone builds the same model from it."""
    content = json.loads(path.read_text(encoding="utf-8"))
    dense = (getattr(model, "vlprune", None) or {"shape": {}})["shape"]
    by_config: dict[str, list[Tower]] = {}
    for tower in anatomy.towers.values():
        if tower.shape() != dense.get(tower.name):
            by_config.setdefault(tower.paths.config, []).append(tower)
    for where, towers in by_config.items():
        if all(_units(tower) == _units(towers[0]) for tower in towers):
            _describe_units(type(model), content, where, towers[0])
    path.write_text(_pretty(content), encoding="utf-8")
    return _stock_shape(type(model), content) == anatomy.shape()


def _sub_config(content: dict, where: str) -> dict:
    return content[where] if where else content


def _units(tower: Tower) -> list[dict[str, int]]:
    """The units of every block in the words of a config."""
    rows = []
    for block in tower.blocks:
        row = {}
        if "head" in block.sites:
            site = block.sites["head"]
            row["num_attention_heads"] = site.out.in_features // _head_dim(site)
            if hasattr(tower.config, "num_key_value_heads"):
                row["num_key_value_heads"] = site.units
        if "neurons" in block.sites:
            row["intermediate_size"] = block.sites["neurons"].units
        rows.append(row)
    return rows


def _head_dim(site: Site) -> int:
    owner: Any = site.block.get_submodule(site.paths.owner)
    return getattr(owner, "head_dim", None) or owner.attention_head_size


def _describe_units(model_class: Any, content: dict, where: str, tower: Tower) -> None:
    """Write one tower's units: for all blocks at once where a config can say that, else block by block."""
    config, rows = _sub_config(content, where), _units(tower)
    stated = {key: getattr(tower.config, key) for key in rows[0]}
    sites = [block.sites["head"] for block in tower.blocks if "head" in block.sites]
    for keys in (("intermediate_size",), ("num_attention_heads", "num_key_value_heads")):
        mine = [{key: row[key] for key in keys if key in row} for row in rows]
        if all(row == {key: stated[key] for key in row} for row in mine):
            continue
        neurons = keys[0] == "intermediate_size"
        if all(row == mine[0] for row in mine) and (neurons or all(site.paths.free_head_dim for site in sites)):
            general = mine[0] if neurons else {**mine[0], "head_dim": _head_dim(sites[0])}
            trial = _plain(content)
            _sub_config(trial, where).update(general)
            if _stock_config(model_class, trial) is not None:
                config.update(general)
                continue
        digits = len(str(len(rows) - 1))
        config[_READABLE] = True
        layers = config.setdefault(_PER_LAYER, {})
        for layer, row in enumerate(mine):
            different = {key: value for key, value in row.items() if value != stated[key]}
            if different:
                layers.setdefault(str(layer).zfill(digits), {}).update(different)


def _plain(content: dict) -> dict:
    """A config without what is said of single layers."""
    return {
        key: _plain(value) if isinstance(value, dict) else value
        for key, value in content.items()
        if key not in (_PER_LAYER, _READABLE)
    }


def _stock_config(model_class: Any, content: dict) -> PreTrainedConfig | None:
    """The config object, or None if transformers does not accept it."""
    try:
        return model_class.config_class.from_dict(copy.deepcopy(content))
    except Exception:  # validation raises many kinds
        return None


def _stock_shape(model_class: Any, content: dict) -> dict | None:
    """The units of the model that transformers builds from a config, or None if it builds none."""
    config = _stock_config(model_class, content) if _plain(content) == content else None
    if config is None:
        return None
    with torch.device("meta"):
        return describe(model_class(config)).shape()


# --- the record ------------------------------------------------------------------------------------------------------


def _record(model, anatomy: Anatomy, method, data, before, after) -> dict:
    done = getattr(model, "vlprune", None) or {"shape": anatomy.shape(), "plans": []}
    last = done["plans"][-1] if done["plans"] else {"plan": {}, "data": None}
    if method is None:
        method = last["plan"].get("method", {})
    elif dataclasses.is_dataclass(method) and not isinstance(method, type):
        method = {"name": type(method).__name__, **dataclasses.asdict(method)}
    origin = last["data"] if data is None else {"name": getattr(data, "name", ""), "hash": getattr(data, "hash", "")}
    if isinstance(data, Mapping):
        origin = dict(data)
    return {
        "kind": "pruned model",
        "format": FORMAT,
        "loads_with": "",
        "method": method,
        "data": origin,
        "measured": {"before": _numbers(before), "after": _numbers(after)},
        "versions": {
            "vlprune_ext": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "shape": done["shape"],
        "structure": anatomy.shape(),
        "plans": done["plans"],
    }


def _numbers(measured: Mapping[str, float] | None) -> dict | None:
    if measured is None:
        return None
    return {key: value.item() if isinstance(value, torch.Tensor) else value for key, value in measured.items()}


def _pretty(content: object) -> str:
    """Indented JSON with lists of numbers on one line."""
    text = json.dumps(content, indent=2, default=str)
    return re.sub(r"\[[\s\d,.eE+-]*\]", lambda found: re.sub(r"\s+", " ", found.group()), text) + "\n"


def _card(model: nn.Module, record: dict) -> str:
    base = str(getattr(model.config, "_name_or_path", "") or "")
    base = Path(base).name if os.path.exists(base) else base
    name = record["method"].get("name", "") if isinstance(record["method"], Mapping) else str(record["method"])
    lines = ["---", "library_name: transformers", "tags:", "- pruned", "- vlprune"]
    lines += [f"base_model: {base}"] if base.count("/") == 1 else []
    lines += ["---", "", f"# {base or type(model).__name__}, pruned", ""]
    lines += [f"A `{type(model).__name__}`" + (f" pruned with {name}" if name else "") + " by vlprune_ext.", ""]
    if record["loads_with"].startswith("transformers"):
        kind = type(model).__name__
        load = f"from transformers import {kind}\n\nmodel = {kind}.from_pretrained(path)"
    else:
        load = "import vlprune_ext as vp\n\nmodel = vp.load_pruned(path)"
    lines += ["```python", load, "```", ""]
    lines += ["| tower | blocks | " + "heads and neurons that stay, of the original |", "|---|---|---|"]
    for tower, blocks in record["structure"].items():
        original = record["shape"][tower]
        kinds = []
        for kind in original[0]:
            have, had = sum(row.get(kind, 0) for row in blocks), sum(row.get(kind, 0) for row in original)
            kinds.append(f"{kind.replace('_', ' ')} {have} / {had}")
        lines.append(f"| {tower} | {len(blocks)} / {len(original)} | {', '.join(kinds)} |")
    measured = record["measured"]
    keys = list(dict.fromkeys([*(measured["before"] or {}), *(measured["after"] or {})]))
    if keys:
        lines += ["", "| measured | before | after |", "|---|---|---|"]
        for key in keys:
            values = [_shown((measured[when] or {}).get(key, "")) for when in ("before", "after")]
            lines.append(f"| {key} | {values[0]} | {values[1]} |")
    if record["data"]:
        lines += ["", f"Calibration data: {record['data'].get('name')} (sha256 {record['data'].get('hash')})."]
    lines += ["", "Versions: " + ", ".join(f"{key} {value}" for key, value in record["versions"].items()) + "."]
    lines += ["", f"`{RECORD}` holds the plan, the method's fields and the units of every block.", ""]
    return "\n".join(lines)


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- loading ---------------------------------------------------------------------------------------------------------


def load_pruned(path: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
    """Load what `save_pruned` wrote: the model in evaluation mode, in the dtype it was saved in.

    path    a folder; or, if there is none of that name, a model id on the Hugging Face hub
    kwargs  passed on to ``from_pretrained``: dtype, device_map, attn_implementation

    ``model.vlprune`` holds the plans that were applied. No dense weights are made on the way; only safetensors are read
    and no code from the folder is run.

    Raises FileNotFoundError if there is nothing, ValueError if it is not a pruned model, or a file is damaged, or its
    tensors are not those that ``pruning.json`` promises.
    """
    folder = _local_folder(path)
    record = _read_record(folder)
    content = _read_json(folder / "config.json")
    model_class: Any = _model_class(folder, content)
    _check_weights(folder)
    try:
        config = model_class.config_class.from_dict(_plain(content))
    except Exception as error:  # validation raises many kinds
        raise ValueError(f"{folder / 'config.json'}: {_line(error)}") from error
    with _built_as(model_class, record["structure"], folder / RECORD):
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
        raise FileNotFoundError(f"{path}: no such folder, and not found on the hub ({_line(error)})") from error


def _line(error: Exception) -> str:
    text = str(error).strip()
    return " ".join(text.split()) if text else type(error).__name__


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent}: no {path.name}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return content


def _read_record(folder: Path) -> dict:
    path = folder / RECORD
    if not path.is_file():
        raise ValueError(f"{folder}: no {RECORD}, so not a pruned model; a plain one loads with from_pretrained")
    record = _read_json(path)
    if record.get("kind") != "pruned model":
        raise ValueError(f"{path}: not written by vlprune_ext")
    if record.get("format") != FORMAT:
        raise ValueError(f"{path}: format {record.get('format')}, this version reads {FORMAT}")
    structure = record.get("structure")
    well_formed = isinstance(structure, dict) and all(
        isinstance(blocks, list)
        and all(isinstance(row, dict) and all(type(count) is int for count in row.values()) for row in blocks)
        for blocks in structure.values()
    )
    if not well_formed or "shape" not in record or not isinstance(record.get("plans"), list):
        raise ValueError(f"{path}: malformed, expected 'shape', 'structure' and 'plans'")
    return record


def _model_class(folder: Path, content: dict) -> type[PreTrainedModel]:
    names = content.get("architectures") or [None]
    found = getattr(transformers, str(names[0]), None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(f"{folder / 'config.json'}: architectures {names}, expected the name of a transformers model")
    return found


def _check_weights(folder: Path) -> None:
    """Raise ValueError naming the file, and the tensor, if a weights file is absent or damaged."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
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
        raise ValueError(f"{file}: damaged ({_line(error)})") from error


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
        raise ValueError(f"{folder}: its tensors do not fit {RECORD}: {'; '.join(problems[:3])}{more}")
