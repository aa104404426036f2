"""JSONL files of images and texts, as records."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..zoo.digit_scenes import SPLITS
from .samples import Prompts, Sample


def read_jsonl(
    path: Path, split: str, limit: int | None, seed: int, templates: Sequence[str]
) -> tuple[list[Sample], Prompts | None]:
    """Return the images of a split as records, each image once with all its texts.

    Parameters
    ----------
    path : Path
        The file; image paths are relative to it.
    split : str
        Value of "split" to read; in a file without it, one of `zoo.digit_scenes.SPLITS`, and all lines are read.
    limit : int or None
        Number of images, a random subset in the file's order; None: all.
    seed : int
        Seed of the subset.
    templates : sequence of str
        Class name -> prompt, as format strings.

    Returns
    -------
    records : list of Sample
    prompts : dict of list of str, or None
        Class name -> prompts, where the lines have labels.

    Raises
    ------
    ValueError
        An empty file, an unknown split, or a malformed line, which the message names.
    """
    lines = _checked_lines(path)
    if not lines:
        raise ValueError(f"{path} is empty, expected a line for each image")
    for key in ("label", "split"):
        missing = [where for where, entry in lines if key not in entry]
        if 0 < len(missing) < len(lines):
            raise ValueError(f"{missing[0]}: no {key!r}, which other lines have; expected it on every line or on none")
    if "split" in lines[0][1]:
        known = sorted({entry["split"] for _, entry in lines})
        lines = [(where, entry) for where, entry in lines if entry["split"] == split]
        if not lines:
            raise ValueError(f"split is {split!r}, but {path} has {', '.join(known)}")
    elif split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)} for {path}, whose lines name none")

    merged: dict[Path, Sample] = {}
    for where, entry in lines:
        image = path.parent / entry["image"]
        texts = [entry["text"]] if isinstance(entry["text"], str) else entry["text"]
        if image in merged:
            if merged[image].label != entry.get("label"):
                raise ValueError(f"{where}: {image} has another label here than on an earlier line")
            merged[image].texts.extend(texts)
        else:
            merged[image] = Sample(_opener(image, where), list(texts), entry.get("label"))
    records = list(merged.values())
    if limit is not None and limit < len(records):
        chosen = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed))[:limit]
        records = [records[i] for i in chosen.sort().values.tolist()]
    if "label" not in lines[0][1]:
        return records, None
    # Every class of the split, also those without an image under the limit: the classification task stays the same.
    names = sorted({entry["label"] for _, entry in lines})
    return records, {name: [template.format(name) for template in templates] for name in names}


def named_splits(path: Path) -> list[str]:
    """Return the names of a file's splits, sorted; none where its lines name none."""
    return sorted({entry["split"] for _, entry in _checked_lines(path) if "split" in entry})


def _checked_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return every non-blank line with its place ("file, line 3") after checking its keys and types."""
    lines = []
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}, line {number}"
            if not raw.strip():
                continue
            try:
                entry = json.loads(raw.decode("utf-8-sig"))
            except ValueError as error:  # also UnicodeDecodeError
                raise ValueError(f"{where}: not JSON ({error})") from None
            if not isinstance(entry, dict):
                raise ValueError(f"{where}: a {type(entry).__name__}, expected an object with 'image' and 'text'")
            for key in ("image", "text"):
                if key not in entry:
                    raise ValueError(f"{where}: no {key!r} in {sorted(entry)}, expected 'image' and 'text'")
            for key in ("label", "split"):
                misspelt = difflib.get_close_matches(key, set(entry) - {key}, n=1, cutoff=0.8)
                if key not in entry and misspelt:
                    raise ValueError(f"{where}: a key {misspelt[0]!r}, expected {key!r}")
            for key in ("image", "label", "split"):
                if key in entry and not (isinstance(entry[key], str) and entry[key]):
                    raise ValueError(f"{where}: {key!r} is {entry[key]!r}, expected a non-empty string")
            text = entry["text"]
            texts = [text] if isinstance(text, str) else text
            if not (isinstance(texts, list) and texts and all(isinstance(t, str) and t.strip() for t in texts)):
                raise ValueError(f"{where}: 'text' is {text!r}, expected a non-empty string or a list of them")
            lines.append((where, entry))
    return lines


def _opener(image: Path, where: str) -> Callable[[], Image.Image]:
    """Return a function that opens an image in RGB; its errors name the line."""

    def open_image() -> Image.Image:
        if not image.is_file():
            raise FileNotFoundError(f"{where}: no image {image}")
        try:
            with Image.open(image) as opened:
                return opened.convert("RGB")
        except Exception as error:  # Pillow raises many kinds, none of which names the line
            raise ValueError(f"{where}: {image} is not an image that can be read ({error})") from None

    return open_image
