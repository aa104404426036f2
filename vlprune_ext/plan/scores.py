"""`Scores`: what was measured of each module."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .files import FORMAT, read_json, write_text


class Module(NamedTuple):
    """One removable part of a model: a head, a group of neurons, a whole layer."""

    tower: str
    kind: str  # one of anatomy.KINDS, or anatomy.MATRIX
    layer: int
    index: int = 0  # type: ignore[assignment]  # head, group or matrix; 0 for a layer. Hides the tuple's own `index`

    def __str__(self) -> str:
        layer = f"{self.tower}.{self.layer}"
        return layer if self.kind == "layer" else f"{layer}.{self.kind}{self.index}"


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
            content = read_json(path, "scores")
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
