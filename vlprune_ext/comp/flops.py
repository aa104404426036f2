"""FLOPs from shapes alone, two per multiply-add: what a mode saves, before anything is pruned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..anatomy import Anatomy, Block

Unit = tuple[str, int, str]  # tower, layer, kind of site
Count = Any  # int, or Tensor [S] int64 of as many samples


def block_flops(block: Block, tokens: Count, *, memory: Count = 0, kept: Mapping[str, int] | None = None) -> Count:
    """FLOPs of one block for one sample: its projections and its attention; norms and activations are left out.

    block      from `Anatomy.tower(..).blocks`
    tokens     that run through it: of one sample, or [S] of several, for whose FLOPs [S] it then answers
    memory     tokens that its cross-attention reads, likewise; 0 where it has none, or is given none
    kept       kind of site -> units that are left, "head", "cross_head" or "neurons"; all by default

    Raises ValueError for more units than there are.
    """
    kept = {} if kept is None else kept
    unknown = [kind for kind in kept if kind not in block.sites]
    if unknown:
        raise ValueError(f"kept has {', '.join(unknown)}; expected some of {', '.join(block.sites)}")
    reads = not (isinstance(memory, int) and memory == 0)
    of_token = of_pair = of_memory = of_reading = 0  # multiply-adds; a pair: of tokens; a reading: of memory by a token
    for kind, site in block.sites.items():
        units = kept.get(kind, site.units)
        if not 0 <= units <= site.units:
            raise ValueError(f"kept is {units} of {kind}; expected 0 to {site.units}")
        if kind == "cross_head" and not reads:
            continue
        columns = units * site.width  # of the output projection: neurons, or query heads times their size
        first, *others = (p.in_features * (p.out_features * units // site.units) for p in site.inputs)
        of_token += first + columns * site.out.out_features
        if kind == "cross_head":  # keys and values are made of what it reads
            of_memory += sum(others)
            of_reading += 2 * columns  # scores, and their sums of values
        else:
            of_token += sum(others)
            of_pair += 0 if kind == "neurons" else 2 * columns
    total = tokens * of_token + tokens * tokens * of_pair
    if reads:
        total = total + memory * of_memory + tokens * memory * of_reading
    return 2 * total


@dataclass
class Load:
    """What runs through a model's blocks for some samples, S of a tower.

    entered  tower -> for each block, the tokens [S] that enter it
    left     tower -> the tokens [S] that leave its last block, for towers that read them
    """

    entered: dict[str, list[Tensor]] = field(default_factory=dict)
    left: dict[str, Tensor] = field(default_factory=dict)

    def shares(self, dense: Load) -> dict[str, list[float]]:
        """Tower -> for each block, the mean number of tokens that enter it, as a share of those of another load."""
        return {
            tower: [
                float(n.float().mean() / m.float().mean()) for n, m in zip(counts, dense.entered[tower], strict=True)
            ]
            for tower, counts in self.entered.items()
        }


def blocks_flops(anatomy: Anatomy, memories: Mapping[str, str], load: Load, kept: Mapping[Unit, int]) -> float:
    """FLOPs of all blocks for one sample, the mean over those of a load.

    memories  tower -> the tower that its cross-attention reads
    kept      units of a site that are left; all of those that are not named
    """
    total = 0.0
    for name, entered in load.entered.items():
        for layer, (block, tokens) in enumerate(zip(anatomy.tower(name).blocks, entered, strict=True)):
            memory: Count = load.left[memories[name]] if name in memories else 0
            units = {kind: kept[name, layer, kind] for kind in block.sites if (name, layer, kind) in kept}
            total += float(block_flops(block, tokens, memory=memory, kept=units).double().mean())
    return total
