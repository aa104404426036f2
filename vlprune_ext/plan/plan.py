"""`Plan`: heads, neurons and blocks to remove, sparsity of weight matrices, token thresholds. Readable JSON."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field

from ..anatomy import KINDS, Anatomy
from .files import FORMAT, read_json, write_text

Removed = dict[str, dict[int, list[int]]]  # tower -> layer -> units


@dataclass
class Plan:
    """Pruning decisions for one model; indices are those of the model that the plan was made for.

    Parameters
    ----------
    shape : dict
        Units of every block of that model (`Anatomy.shape`); a model of another shape is refused.
    heads : dict
        Tower -> layer -> heads to remove (under grouped-query attention, key/value heads with their query heads).
    cross_heads : dict
        The same for cross-attention.
    neurons : dict
        Tower -> layer -> neurons of the MLP's hidden dimension to remove. Of all three, units are in the order in which
        they were removed, the least important first.
    layers : dict
        Tower -> blocks to remove.
    sparsity : dict
        Parameter name -> ratio of its entries to zero.
    selection : dict
        Fields of `weights.Selection`: which entries.
    tokens : dict
        Tower -> its token pruning behind each block: {"threshold": importance}, sample by sample, or {"keep": [keep
        ratio of each block]}. `prune_tokens` applies it.
    method : dict
        The method's name and fields, for the record.
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
        """Return tower -> layer -> removed units of a site kind: "head", "cross_head" or "neurons"."""
        return {"head": self.heads, "cross_head": self.cross_heads, "neurons": self.neurons}[kind]

    def removed(self, tower: str, kind: str, layer: int) -> list[int]:
        """Return the removed units of one site, ascending; [] if none."""
        return sorted(self.units(kind).get(tower, {}).get(layer, []))

    def add(self, tower: str, kind: str, layer: int, units: list[int]) -> None:
        """Add units of one site to those removed, or (kind "layer") a block.

        Parameters
        ----------
        tower : str
            The tower.
        kind : {"head", "cross_head", "neurons", "layer"}
            Kind of site, or the block itself.
        layer : int
            The block.
        units : list of int
            Units, the least important first; ignored for "layer".
        """
        if kind == "layer":
            self.layers[tower] = sorted({*self.layers.get(tower, []), layer})
        else:
            of_tower = self.units(kind).setdefault(tower, {})
            of_tower[layer] = list(dict.fromkeys([*of_tower.get(layer, []), *units]))

    def check(self, anatomy: Anatomy) -> None:
        """Raise ValueError unless the plan was made for a model of this shape and its values are in range."""
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
        """Raise ValueError unless a tower's token schedule is well-formed."""
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
        """Raise ValueError unless the removed units of a site exist and are distinct."""
        blocks = actual.get(tower)
        if blocks is None or not 0 <= layer < len(blocks) or kind not in blocks[layer]:
            raise ValueError(f"plan: {kind} of {tower}.{layer}: the model has no such site")
        count = blocks[layer][kind]
        if any(not 0 <= unit < count for unit in units) or len(set(units)) != len(units):
            raise ValueError(f"plan: {kind} of {tower}.{layer}: {units}, expected distinct indices below {count}")

    def to_json(self) -> str:
        """Return the plan as JSON text, one line per block."""
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
        """Write the plan as JSON, atomically."""
        write_text(path, self.to_json())

    @classmethod
    def from_dict(cls, content: dict) -> Plan:
        """Return the plan of JSON content; raise ValueError naming what is malformed."""
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
        """Read a plan that `save` wrote."""
        return cls.from_dict(read_json(path, "plan"))


def _first_difference(planned: dict, actual: dict) -> str:
    """Describe the first difference between two shapes."""
    if planned.keys() != actual.keys():
        return f"its towers are {', '.join(planned)}, the model's are {', '.join(actual)}"
    for tower in planned:
        if len(planned[tower]) != len(actual[tower]):
            return f"its tower {tower!r} has {len(planned[tower])} blocks, the model's has {len(actual[tower])}"
        for layer, (a, b) in enumerate(zip(planned[tower], actual[tower], strict=True)):
            if a != b:
                return f"its block {tower}.{layer} has {a}, the model's has {b}"
    return "the same shape"
