"""What the arguments of the command line mean: the options that several commands have, and what is made of them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..data.sources import DIGITS_CLASSES, SOURCES
from ..objectives.named import OBJECTIVES
from .terminal import UsageError, usage, working

if TYPE_CHECKING:
    from ..checkpoint.models import Loaded
    from ..data import Data
    from ..methods.joint.comp import CoMP
    from ..methods.units.structured import Structured
    from ..methods.weights.ecoflap import ECoFLaP
    from ..tokens import TokenMethod

# ---- parsed and checked as they are read ----------------------------------------------------------------------------


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _objective(name: str | None) -> str | None:
    if name is not None:
        from ..objectives import objective_named

        with usage():
            objective_named(name)
    return name


def _kinds(text: str) -> tuple[str, ...]:
    from ..units.candidates import check_kinds

    with usage():
        return check_kinds(_names(text))


def _shares(option: str) -> Callable[[str], tuple[float, ...]]:
    """Return a parser of an option that takes shares."""

    def read(text: str) -> tuple[float, ...]:
        try:
            shares = tuple(float(share) for share in _names(text))
        except ValueError:
            shares = ()
        if not shares:
            raise UsageError(f"{option}: {text!r}, expected shares separated by commas, such as 0.5 or 0.5,0.25")
        return shares

    return read


def new_file(path: Path | None) -> Path | None:
    """Raise UsageError, before hours of work, if the result cannot be written."""
    if path is not None:
        if path.is_dir():
            raise UsageError(f"{path}: a folder, expected the name of a file")
        _check_writable(path, path.absolute().parent)
    return path


def new_folder(path: Path | None) -> Path | None:
    """Do as `new_file` for a folder, whose parents need not exist yet."""
    if path is not None:
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path}: a file, expected a folder")
        _check_writable(path, next(p for p in (path.absolute(), *path.absolute().parents) if p.exists()))
    return path


def _check_writable(path: Path, folder: Path) -> None:
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"{path}: {folder} is not a folder that can be written to")


# ---- options that several commands have ----------------------------------------------------------------------------

FIELDS = "Fields of the method"  # options in this panel are handed to the method under their own name

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Model folder, pruned folder, zoo model (clip-digits) or hub id.", show_default=False
    ),
]
DataSource = Annotated[str, typer.Option("--data", help=f"{', '.join(SOURCES)}; or a JSONL of image path and text.")]
Split = Annotated[str, typer.Option(help="Split of the data.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use this many images.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of every random choice.")]
Objective = Annotated[
    str | None,
    typer.Option(
        callback=_objective,
        help=f"{', '.join(OBJECTIVES)}; by default what suits the model.",
        show_default=False,
    ),
]
Metric = Annotated[
    str | None,
    typer.Option(
        callback=_objective,
        help="Objective of the numbers before and after; one of those of --objective.",
        show_default=False,
    ),
]
Modules = Annotated[Any, typer.Option(parser=_kinds, metavar="KINDS", help="Some of head, cross_head, neurons, layer.")]
Towers = Annotated[
    Any,
    typer.Option(
        parser=_names,
        metavar="NAMES",
        help="Towers, separated by commas; by default all that the objective sees.",
        show_default=False,
    ),
]
Group = Annotated[int, typer.Option("--neurons-per-group", min=1, help="Neurons that are removed together.")]
Batch = Annotated[int, typer.Option(min=1, help="Samples run at once.")]
Sparsity = Annotated[
    Any,
    typer.Option(
        parser=_shares("--sparsity"),
        metavar="SHARES",
        help="ecoflap and its like: share of weights zeroed; of several, the first is kept, the others compared.",
        show_default="0.5",
        rich_help_panel=FIELDS,
    ),
]
Keep = Annotated[
    Any,
    typer.Option(
        parser=_shares("--keep"),
        metavar="SHARES",
        help="The method's 'keep': share of the visual tokens, from the highest to the lowest.",
        show_default="0.5,0.25,0.11",
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto (that of the files).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def method_field(help: str, default: str) -> Any:
    return typer.Option(help=help, show_default=default, rich_help_panel=FIELDS)


# ---- what is made of them -------------------------------------------------------------------------------------------


def one_of(option: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise UsageError(f"{option}: {value!r}, expected one of {', '.join(known)}")


def read_model(name: str, device: str, dtype: str) -> Loaded:
    from ..checkpoint.models import DTYPES, load_model

    one_of("--dtype", dtype, DTYPES)
    with working("loading the model"):
        return load_model(name, device=device, dtype=dtype)


def read_data(
    loaded: Loaded, source: str, split: str, limit: int | None, seed: int, objective: str | None = None
) -> Data:
    from ..data import load_data

    with working("reading the data"):
        data = load_data(source, split, model=loaded.model, processor=loaded.processor, limit=limit, seed=seed)
    if objective == "zero_shot" and data.classes is None:
        raise ValueError(
            f"--objective zero_shot: {data.name} has no classes; try --data {DIGITS_CLASSES}, or a JSONL with a "
            "'label' on every line"
        )
    return data


def open_image(path: Path) -> Any:
    """Open a picture. Raises UsageError for a file that is none."""
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        raise UsageError(f"--image: {path}, no such file")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError):
        raise UsageError(f"--image: {path}, not a picture that can be read") from None


def _read_settings(settings: Sequence[str], known: set[str], whose: str) -> dict[str, Any]:
    """Parse FIELD=VALUE, the value in JSON or as it stands."""
    given: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or key not in known:
            listed = ", ".join(sorted(known))
            raise UsageError(f"--set: {setting!r}, expected FIELD=VALUE, a field of {whose}: {listed}")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        given[key] = tuple(value) if isinstance(value, list) else value
    return given


def token_methods(
    names: Sequence[str], keeps: Sequence[float], settings: Sequence[str]
) -> dict[str, list[TokenMethod]]:
    """Build the token methods of these names, each with every share that is to be kept."""
    from ..methods import TOKENS

    for name in names:
        one_of("--method", name, TOKENS)
    classes: dict[str, Any] = {name: TOKENS[name] for name in names}
    fields = {name: {f.name for f in dataclasses.fields(classes[name])} for name in names}
    given = _read_settings(settings, set().union(*fields.values()) - {"keep"}, ", ".join(names))
    with usage():
        return {
            method.__name__: [
                method(keep=keep, **{key: given[key] for key in fields[name] & given.keys()}) for keep in keeps
            ]
            for name, method in classes.items()
        }


def chosen_methods(
    context: typer.Context, names: Sequence[str], settings: Sequence[str]
) -> dict[str, Structured | ECoFLaP | CoMP]:
    """Build the methods of these names; each takes the options and settings that are its fields.

    Where several sparsities are given, one method for each.
    """
    from ..methods import METHODS

    for name in names:
        one_of("--method", name, METHODS)
    classes: dict[str, Any] = {name: METHODS[name] for name in names}
    fields = {name: {f.name for f in dataclasses.fields(classes[name]) if f.init} for name in names}
    known = set().union(*fields.values())
    whose = ", ".join(names) or "a plan"
    given = {key: value for key, value in context.params.items() if value is not None and key != "settings"}
    for option in context.command.params:
        if option.name in given and option.name not in known and getattr(option, "rich_help_panel", None) == FIELDS:
            raise UsageError(f"{option.opts[0]}: not a field of {whose}")
    given |= _read_settings(settings, known, whose)
    sparsities = given.pop("sparsity", None) or (None,)
    chosen = {}
    with usage():
        for name, method in classes.items():
            own = {k: given[k] for k in fields[name] & given.keys()}
            if "sparsity" not in fields[name] or sparsities == (None,):
                chosen[method.__name__] = method(**own)
                continue
            for sparsity in sparsities:
                label = f"{method.__name__} {sparsity:g}" if len(sparsities) > 1 else method.__name__
                chosen[label] = method(sparsity=sparsity, **own)
    return chosen
