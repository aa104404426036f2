"""Save a pruned model as an ordinary folder.

A pruned model is an ordinary folder of safetensors and ``config.json``, with two more files: ``pruning.json``, which
says what was done and how many units every block has, and a model card. Uneven layers are written into the config in
transformers' own words (``per_layer_config``); `load_pruned` goes by ``pruning.json``.
"""

from __future__ import annotations

import copy
import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from ..anatomy import describe
from ..plan import Scores
from ..weights.semi_structured import is_converted
from .card import CARD, model_card
from .config import write_config
from .manifest import COMPARISONS, MANIFEST, SCORES, manifest_of, pretty_json, read_manifest


def save_pruned(
    model: PreTrainedModel,
    out_dir: str | os.PathLike,
    *,
    processor: Any = None,
    method: Any = None,
    data: Any = None,
    before: Mapping[str, float] | None = None,
    after: Mapping[str, float] | None = None,
    scores: Scores | None = None,
    comparisons: Mapping[str, Mapping[str, float]] | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write ``model`` to a folder: safetensors, config.json, pruning.json and a model card.

    The folder appears whole or not at all, with all its files. An earlier pruned model in its place is replaced, with
    all that was saved with it; other files in that folder stay; any other non-empty folder is refused. The model and
    its config are not changed.

    Parameters
    ----------
    model : PreTrainedModel
        Of a family that is known.
    out_dir : str or PathLike
        New, empty, or with an earlier pruned model.
    processor : optional
        Saved beside the model, so that the folder is complete: a processor, tokenizer or image processor.
    method : method object or dict, optional
        How the model was pruned, for the record: its fields are kept. That of the last plan applied by default.
    data : Data or dict, optional
        The calibration data, for the record (its name and hash). That of the last plan applied by default.
    before, after : mapping of str to number, optional
        Measured numbers, for instance those of `evaluate`.
    scores : Scores, optional
        What the method measured, for a report that is written later.
    comparisons : mapping of str to mapping, optional
        Name -> measured numbers of other methods, likewise.
    max_shard_size : int or str
        As ``save_pretrained`` takes it.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ValueError
        A model that is not known, one with semi-structured weights, or a folder that must not be replaced.
    OSError
        It cannot be written (disk full); then nothing has changed on disk.
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
        stock = write_config(model, anatomy, staging / "config.json")
        if processor is not None:
            processor.save_pretrained(staging)
        record = manifest_of(model, anatomy, method, data, before, after)
        record["loads_with"] = "transformers from_pretrained" if stock else "vlprune_ext.load_pruned"
        (staging / CARD).write_text(model_card(model, record), encoding="utf-8")
        if scores is not None:
            scores.save(staging / SCORES)
        if comparisons:
            (staging / COMPARISONS).write_text(json.dumps(comparisons, indent=1) + "\n", encoding="utf-8")
        record["files"] = sorted([*(path.name for path in staging.iterdir()), MANIFEST])
        (staging / MANIFEST).write_text(pretty_json(record), encoding="utf-8")
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
            read_manifest(out_dir)
        except ValueError:
            raise ValueError(
                f"{out_dir}: not empty and not an earlier pruned model; choose another folder or empty it"
            ) from None


def _write_error(error: SafetensorError, out_dir: Path) -> OSError:
    """Return the system's error, of which safetensors keeps the text only: "... (os error 28)"."""
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
    own = {*read_manifest(out_dir).get("files", ()), SCORES, COMPARISONS}
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
