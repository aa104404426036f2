"""`Scores` and `Plan`: what was measured, and what goes. Plain data, readable JSON."""

from __future__ import annotations

import csv
import json
import math
import os
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .anatomy import KINDS, Anatomy

FORMAT = 1


class Module(NamedTuple):
    """One removable part of a model: a head, a group of neurons, a whole layer."""

    tower: str
    kind: str  # one of anatomy.KINDS, or anatomy.MATRIX
    layer: int
    index: int = 0  # type: ignore[assignment]  # head, group or matrix; 0 for a layer. Hides the tuple's own `index`

    def __str__(self) -> str:
        layer = f"{self.tower}.{self.layer}"
        return layer if self.kind == "layer" else f"{layer}.{self.kind}{self.index}"


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a file whole or not at all: temporary file, fsync, rename."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _read_json(path: str | os.PathLike, kind: str) -> dict:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON (line {error.lineno}: {error.msg})") from None
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise ValueError(f"{path}: not a {kind} file written by vlprune_ext")
    if content.get("format") != FORMAT:
        raise ValueError(f"{path}: format {content.get('format')}, this version reads {FORMAT}")
    return content


@dataclass
class Scores:
    """How much an objective drops without each module: ``value = Z(f) - Z(f without module)``.

    Or, where `parameters` names weight matrices, how much it depends on each, in the unit of the method that measured.

    modules   list[Module]    what was scored, in order
    value     [M] float64     mean drop; higher = more important; negative = the model is better without it
    error     [M] float64     standard error of the mean, from paired per-sample differences
    count     [M] int64       samples each module was judged on
    samples   [M, S] float32  the paired differences themselves; NaN where a sample was skipped; None after loading
    cost      [M] float64     parameters that go with the module; of a matrix, its entries
    """

    modules: list[Module]
    value: Tensor
    error: Tensor
    count: Tensor
    cost: Tensor
    objective: str = ""
    dense: float = math.nan  # the objective of the model that was scored
    neurons: dict[str, dict[int, list[list[int]]]] = field(default_factory=dict)  # tower -> layer -> group -> neurons
    parameters: list[str] = field(default_factory=list)  # [M] names in the model, where matrices were scored
    samples: Tensor | None = None
    block_runs: int = 0
    data: dict = field(default_factory=dict)  # name, split, hash

    def __len__(self) -> int:
        return len(self.modules)

    def __iter__(self) -> Iterator[tuple[Module, float]]:
        return zip(self.modules, self.value.tolist(), strict=True)

    def get(self, tower: str, kind: str, layer: int, index: int = 0) -> float:
        """The drop of the objective without one module. Raises KeyError naming it if it was not scored."""
        module = Module(tower, kind, layer, index)
        try:
            return float(self.value[self.modules.index(module)])
        except ValueError:
            raise KeyError(f"{module} was not scored") from None

    def where(self, tower: str | None = None, kind: str | None = None) -> list[int]:
        """Positions of the modules of a tower and kind."""
        return [
            i
            for i, m in enumerate(self.modules)
            if (tower is None or m.tower == tower) and (kind is None or m.kind == kind)
        ]

    def ranking(self, tower: str | None = None, kind: str | None = None) -> list[int]:
        """Positions from least to most important; ties keep the order of `modules`."""
        chosen = torch.tensor(self.where(tower, kind), dtype=torch.long)
        return chosen[torch.sort(self.value[chosen], stable=True).indices].tolist()

    def indistinguishable(self, order: list[int] | None = None, z: float = 1.96) -> list[tuple[int, int]]:
        """Neighbours in a ranking whose paired difference is within ``z`` standard errors of zero.

        Raises ValueError when the per-sample differences are gone (scores read from a file).
        """
        if self.samples is None:
            raise ValueError("scores: the per-sample differences are not kept in files; score again to compare pairs")
        order = self.ranking() if order is None else order
        pairs = []
        for a, b in pairwise(order):
            difference = self.samples[b].double() - self.samples[a].double()
            difference = difference[~difference.isnan()]
            n = difference.numel()
            error = difference.std(correction=1).item() / math.sqrt(n) if n > 1 else math.inf
            if not difference.mean().abs().item() > z * error:
                pairs.append((a, b))
        return pairs

    def _rows(self) -> Iterator[dict]:
        for i, module in enumerate(self.modules):
            numbers = {name: getattr(self, name)[i].item() for name in ("value", "error", "count", "cost")}
            names = {"parameter": self.parameters[i]} if self.parameters else {}
            yield {**module._asdict(), **numbers, **names}

    def to_json(self) -> str:
        head = {
            "kind": "scores",
            "format": FORMAT,
            "objective": self.objective,
            "dense": self.dense,
            "block_runs": self.block_runs,
            "data": self.data,
            "neurons": self.neurons,
        }
        body = ",\n  ".join(json.dumps(row) for row in self._rows())
        return json.dumps(head, indent=1)[:-2] + f',\n "modules": [\n  {body}\n ]\n}}\n'

    def save(self, path: str | os.PathLike) -> None:
        """Write JSON, or CSV when the name ends in .csv."""
        if str(path).endswith(".csv"):
            lines = ["tower,kind,layer,index,value,error,count,cost" + (",parameter" if self.parameters else "")]
            lines += [",".join(map(str, row.values())) for row in self._rows()]
            write_text(path, "\n".join(lines) + "\n")
        else:
            write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike) -> Scores:
        """Read what `save` wrote, JSON or CSV."""
        if str(path).endswith(".csv"):
            with open(path, newline="", encoding="utf-8") as file:
                content: dict = {"modules": list(csv.DictReader(file))}
        else:
            content = _read_json(path, "scores")
        try:
            return cls._from_dict(content)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: malformed scores ({type(error).__name__}: {error})") from None

    @classmethod
    def _from_dict(cls, content: dict) -> Scores:
        rows = content["modules"]
        return cls(
            modules=[Module(r["tower"], r["kind"], int(r["layer"]), int(r["index"])) for r in rows],
            value=torch.tensor([float(r["value"]) for r in rows], dtype=torch.float64),
            error=torch.tensor([float(r["error"]) for r in rows], dtype=torch.float64),
            count=torch.tensor([int(r["count"]) for r in rows], dtype=torch.int64),
            cost=torch.tensor([float(r["cost"]) for r in rows], dtype=torch.float64),
            objective=content.get("objective", ""),
            dense=content.get("dense", math.nan),
            neurons={t: {int(k): v for k, v in layers.items()} for t, layers in content.get("neurons", {}).items()},
            parameters=[r["parameter"] for r in rows if r.get("parameter")],
            block_runs=content.get("block_runs", 0),
            data=content.get("data", {}),
        )


Removed = dict[str, dict[int, list[int]]]  # tower -> layer -> units


@dataclass
class Plan:
    """What goes. Indices are those of the model the plan was made for.

    heads        tower -> layer -> heads (key/value heads, with their query heads, under grouped queries)
    cross_heads  the same for cross attention
    neurons      tower -> layer -> neurons of the MLP's hidden layer
    layers       tower -> blocks
    sparsity     parameter name -> share of its entries that become zero
    selection    which entries: fields of `layerwise.Selection`
    tokens       tower -> which of its tokens leave behind each block: {"threshold": importance}, sample by sample, or
                 {"keep": [share of each block]}. `prune_tokens` carries that out
    shape        the units of every block of that model (`Anatomy.shape`): a plan for another model is refused
    method       the method's name and fields, for the record
    """

    shape: dict[str, list[dict[str, int]]]
    heads: Removed = field(default_factory=dict)
    cross_heads: Removed = field(default_factory=dict)
    neurons: Removed = field(default_factory=dict)
    layers: dict[str, list[int]] = field(default_factory=dict)
    sparsity: dict[str, float] = field(default_factory=dict)
    selection: dict = field(default_factory=dict)
    tokens: dict[str, dict] = field(default_factory=dict)
    method: dict = field(default_factory=dict)

    def units(self, kind: str) -> Removed:
        """The removed units of a site kind: "head", "cross_head" or "neurons"."""
        return {"head": self.heads, "cross_head": self.cross_heads, "neurons": self.neurons}[kind]

    def removed(self, tower: str, kind: str, layer: int) -> list[int]:
        """The units of one site that go, ascending; [] if none."""
        return self.units(kind).get(tower, {}).get(layer, [])

    def add(self, tower: str, kind: str, layer: int, units: list[int]) -> None:
        """Remove more units of one site, or (kind "layer") a block."""
        if kind == "layer":
            self.layers[tower] = sorted({*self.layers.get(tower, []), layer})
        else:
            of_tower = self.units(kind).setdefault(tower, {})
            of_tower[layer] = sorted({*of_tower.get(layer, []), *units})

    def check(self, anatomy: Anatomy) -> None:
        """Raise ValueError unless the plan was made for a model of this shape and is within its bounds."""
        actual = anatomy.shape()
        if actual != self.shape:
            raise ValueError(f"plan: made for another model: {_first_difference(self.shape, actual)}")
        for kind in KINDS[:-1]:
            for tower, layers in self.units(kind).items():
                for layer, units in layers.items():
                    self._check_units(actual, tower, kind, layer, units)
        for tower, gone in self.layers.items():
            blocks = len(actual.get(tower, []))
            if tower not in actual or any(not 0 <= layer < blocks for layer in gone):
                raise ValueError(f"plan: layers of tower {tower!r}: {gone}, expected indices below {blocks}")
            if len(set(gone)) == blocks:
                raise ValueError(f"plan: removes all {blocks} layers of tower {tower!r}; at least one must stay")
        for name, share in self.sparsity.items():
            if not 0 <= share <= 1:
                raise ValueError(f"plan: sparsity of {name}: {share}, expected 0 <= sparsity <= 1")
        for tower, schedule in self.tokens.items():
            self._check_tokens(actual, tower, schedule)

    @staticmethod
    def _check_tokens(actual: dict, tower: str, schedule: dict) -> None:
        if tower not in actual:
            raise ValueError(f"plan: tokens of tower {tower!r}; the model's towers are {', '.join(actual)}")
        blocks = len(actual[tower])
        threshold, keep = schedule.get("threshold"), schedule.get("keep")
        fine = isinstance(threshold, float) and 0 <= threshold <= 1
        fine = fine or (
            isinstance(keep, list)
            and len(keep) == blocks
            and all(isinstance(share, int | float) and 0 <= share <= 1 for share in keep)
        )
        if len(schedule) != 1 or not fine:
            raise ValueError(
                f"plan: tokens of {tower}: {schedule}, expected {{'threshold': from 0 to 1}} or {{'keep': shares of"
                f" {blocks} blocks}}"
            )

    @staticmethod
    def _check_units(actual: dict, tower: str, kind: str, layer: int, units: list[int]) -> None:
        blocks = actual.get(tower)
        if blocks is None or not 0 <= layer < len(blocks) or kind not in blocks[layer]:
            raise ValueError(f"plan: {kind} of {tower}.{layer}: the model has no such site")
        count = blocks[layer][kind]
        if any(not 0 <= unit < count for unit in units) or len(set(units)) != len(units):
            raise ValueError(f"plan: {kind} of {tower}.{layer}: {units}, expected distinct indices below {count}")

    def to_json(self) -> str:
        content = {"kind": "plan", "format": FORMAT, **asdict(self)}
        # One line per block keeps a plan of thousands of neurons readable and its diffs short.
        lines = []
        for key, value in content.items():
            if key == "sparsity" and value:
                shares = ",\n".join(f"  {json.dumps(name)}: {share}" for name, share in value.items())
                lines.append(f' "sparsity": {{\n{shares}\n }}')
            elif key in ("heads", "cross_heads", "neurons", "shape", "layers") and value:
                towers = []
                for tower, of_tower in value.items():
                    if key == "layers":
                        towers.append(f"  {json.dumps(tower)}: {json.dumps(of_tower)}")
                        continue
                    items = (
                        [json.dumps(row) for row in of_tower]
                        if key == "shape"
                        else [
                            f"{json.dumps(str(layer))}: {json.dumps(units)}"
                            for layer, units in sorted(of_tower.items())
                        ]
                    )
                    left, right = "[]" if key == "shape" else "{}"
                    towers.append(f"  {json.dumps(tower)}: {left}\n   " + ",\n   ".join(items) + f"\n  {right}")
                lines.append(f" {json.dumps(key)}: {{\n" + ",\n".join(towers) + "\n }")
            else:
                lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def save(self, path: str | os.PathLike) -> None:
        """Write JSON."""
        write_text(path, self.to_json())

    @classmethod
    def from_dict(cls, content: dict) -> Plan:
        """Rebuild a plan from its JSON content. Raises ValueError naming what is wrong."""
        try:
            removed = {
                name: {
                    tower: {int(layer): [int(u) for u in units] for layer, units in layers.items()}
                    for tower, layers in content[name].items()
                }
                for name in ("heads", "cross_heads", "neurons")
            }
            return cls(
                shape={tower: [dict(row) for row in rows] for tower, rows in content["shape"].items()},
                layers={tower: [int(layer) for layer in layers] for tower, layers in content["layers"].items()},
                sparsity={name: float(share) for name, share in content.get("sparsity", {}).items()},
                selection=dict(content.get("selection", {})),
                tokens={tower: dict(schedule) for tower, schedule in content.get("tokens", {}).items()},
                method=content.get("method", {}),
                **removed,
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"plan: malformed content ({type(error).__name__}: {error})") from None

    @classmethod
    def load(cls, path: str | os.PathLike) -> Plan:
        """Read what `save` wrote."""
        return cls.from_dict(_read_json(path, "plan"))


def _first_difference(planned: dict, actual: dict) -> str:
    if planned.keys() != actual.keys():
        return f"its towers are {', '.join(planned)}, the model's are {', '.join(actual)}"
    for tower in planned:
        if len(planned[tower]) != len(actual[tower]):
            return f"its tower {tower!r} has {len(planned[tower])} blocks, the model's has {len(actual[tower])}"
        for layer, (a, b) in enumerate(zip(planned[tower], actual[tower], strict=True)):
            if a != b:
                return f"its block {tower}.{layer} has {a}, the model's has {b}"
    return "the same shape"
