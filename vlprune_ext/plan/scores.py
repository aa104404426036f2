"""`Scores`: the measured importance of each module."""

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
    """One prunable part of a model: a head, a group of neurons, a weight matrix or a whole block.

    Parameters
    ----------
    tower : str
        The tower.
    kind : str
        One of `anatomy.KINDS`, or `anatomy.MATRIX`.
    layer : int
        The block.
    index : int
        Head, neuron group or matrix; 0 for a block. Hides the tuple's own ``index`` method.
    """

    tower: str
    kind: str
    layer: int
    index: int = 0  # type: ignore[assignment]

    def __str__(self) -> str:
        layer = f"{self.tower}.{self.layer}"
        return layer if self.kind == "layer" else f"{layer}.{self.kind}{self.index}"


@dataclass
class Scores:
    """Importance of each module: the drop of the objective without it, ``value = Z(f) - Z(f without module)``.

    Where ``parameters`` names weight matrices, the dependence of the objective on each, in the unit of the method that
    scored. M is the number of modules, S that of samples.

    Attributes
    ----------
    modules : list of Module
        The scored modules.
    value : Tensor [M], float64
        Mean drop; higher = more important; negative = the model is better without it.
    error : Tensor [M], float64
        Standard error of the mean, from paired per-sample differences.
    count : Tensor [M], int64
        Samples that each module was scored on.
    cost : Tensor [M], float64
        Parameters removed with the module; of a matrix, its entries.
    objective : str
        Name of the objective.
    dense : float
        The objective of the unpruned model.
    neurons : dict
        Tower -> layer -> group -> its neurons.
    parameters : list of M str
        Parameter names, where matrices were scored.
    samples : Tensor [M, S], float32, optional
        The paired differences; NaN where a sample was skipped; None after loading.
    block_runs : int
        Cost of scoring: rows run through blocks.
    data : dict
        Name, split and hash of the calibration data.
    """

    modules: list[Module]
    value: Tensor
    error: Tensor
    count: Tensor
    cost: Tensor
    objective: str = ""
    dense: float = math.nan
    neurons: dict[str, dict[int, list[list[int]]]] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)
    samples: Tensor | None = None
    block_runs: int = 0
    data: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.modules)

    def __iter__(self) -> Iterator[tuple[Module, float]]:
        return zip(self.modules, self.value.tolist(), strict=True)

    def get(self, tower: str, kind: str, layer: int, index: int = 0) -> float:
        """Return the value of one module.

        Parameters
        ----------
        tower, kind, layer, index
            The fields of `Module`.

        Raises
        ------
        KeyError
            A module that was not scored.
        """
        module = Module(tower, kind, layer, index)
        try:
            return float(self.value[self.modules.index(module)])
        except ValueError:
            raise KeyError(f"{module} was not scored") from None

    def where(self, tower: str | None = None, kind: str | None = None) -> list[int]:
        """Return the positions of the modules of a tower and kind; None matches all."""
        return [
            i
            for i, m in enumerate(self.modules)
            if (tower is None or m.tower == tower) and (kind is None or m.kind == kind)
        ]

    def ranking(self, tower: str | None = None, kind: str | None = None) -> list[int]:
        """Return positions from least to most important; ties keep the order of `modules`."""
        chosen = torch.tensor(self.where(tower, kind), dtype=torch.long)
        return chosen[torch.sort(self.value[chosen], stable=True).indices].tolist()

    def indistinguishable(self, order: list[int] | None = None, z: float = 1.96) -> list[tuple[int, int]]:
        """Return neighbours in a ranking whose paired difference is within ``z`` standard errors of zero.

        Parameters
        ----------
        order : list of int, optional
            Positions; by default `ranking` of all.
        z : float
            Number of standard errors; 1.96 is a 95% confidence interval.

        Returns
        -------
        list of (int, int)
            Pairs of positions.

        Raises
        ------
        ValueError
            No per-sample differences (scores read from a file).
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
        """Yield one flat dict per module, as written to files."""
        for i, module in enumerate(self.modules):
            numbers = {name: getattr(self, name)[i].item() for name in ("value", "error", "count", "cost")}
            names = {"parameter": self.parameters[i]} if self.parameters else {}
            yield {**module._asdict(), **numbers, **names}

    def to_json(self) -> str:
        """Return the scores as JSON text, one line per module; without per-sample differences."""
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
        """Write JSON, or CSV when the name ends in .csv; atomically."""
        if str(path).endswith(".csv"):
            lines = ["tower,kind,layer,index,value,error,count,cost" + (",parameter" if self.parameters else "")]
            lines += [",".join(map(str, row.values())) for row in self._rows()]
            write_text(path, "\n".join(lines) + "\n")
        else:
            write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike) -> Scores:
        """Read scores that `save` wrote, JSON or CSV."""
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
        """Return the scores of JSON content."""
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
