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
    """Count the FLOPs of one block for one sample: its projections and its attention, without norms and activations.

    Parameters
    ----------
    block : Block
        From `Anatomy.tower(..).blocks`.
    tokens : int or Tensor [S], int64
        Sequence length of one sample, or of S samples.
    memory : int or Tensor [S], int64
        Tokens that its cross-attention reads; 0 where it has none or is given none.
    kept : mapping of str to int, optional
        Kind of site ("head", "cross_head" or "neurons") -> remaining units. Kinds not named are whole.

    Returns
    -------
    int or Tensor [S], int64
        As ``tokens``.

    Raises
    ------
    ValueError
        A kind of site that the block lacks, or more units than it has.
    """
    kept = {} if kept is None else kept
    unknown = [kind for kind in kept if kind not in block.sites]
    if unknown:
        raise ValueError(f"kept has {', '.join(unknown)}; expected some of {', '.join(block.sites)}")
    reads = not (isinstance(memory, int) and memory == 0)
    of_token = of_pair = of_memory = of_reading = 0  # multiply-adds; reading: one memory token by one token
    for kind, site in block.sites.items():
        units = kept.get(kind, site.units)
        if not 0 <= units <= site.units:
            raise ValueError(f"kept is {units} of {kind}; expected 0 to {site.units}")
        if kind == "cross_head" and not reads:
            continue
        columns = units * site.width  # of the output projection: neurons, or query heads times their size
        first, *others = (p.in_features * (p.out_features * units // site.units) for p in site.inputs)
        of_token += first + columns * site.out.out_features
        if kind == "cross_head":  # keys and values are projections of the memory
            of_memory += sum(others)
            of_reading += 2 * columns  # scores, and weighted sums of values
        else:
            of_token += sum(others)
            of_pair += 0 if kind == "neurons" else 2 * columns
    total = tokens * of_token + tokens * tokens * of_pair
    if reads:
        total = total + memory * of_memory + tokens * memory * of_reading
    return 2 * total


@dataclass
class Load:
    """Token counts of some samples in a model's blocks, S samples of a tower.

    Parameters
    ----------
    entered : dict of str to list of Tensor [S]
        Tower -> for each block, the tokens that enter it.
    left : dict of str to Tensor [S]
        Tower -> the tokens that leave its last block, for towers that read them.
    """

    entered: dict[str, list[Tensor]] = field(default_factory=dict)
    left: dict[str, Tensor] = field(default_factory=dict)

    def shares(self, dense: Load) -> dict[str, list[float]]:
        """Return the mean token count of each block as a share of another load's.

        Parameters
        ----------
        dense : Load
            The load to compare with.

        Returns
        -------
        dict of str to list of float
            Tower -> share at each block.
        """
        return {
            tower: [
                float(n.float().mean() / m.float().mean()) for n, m in zip(counts, dense.entered[tower], strict=True)
            ]
            for tower, counts in self.entered.items()
        }


def blocks_flops(anatomy: Anatomy, memories: Mapping[str, str], load: Load, kept: Mapping[Unit, int]) -> float:
    """Count the FLOPs of all blocks for one sample, averaged over the samples of a load.

    Parameters
    ----------
    anatomy : Anatomy
        The model.
    memories : mapping of str to str
        Tower -> the tower that its cross-attention reads.
    load : Load
        Token counts.
    kept : mapping of (tower, layer, kind) to int
        Remaining units of a site. Sites not named are whole.

    Returns
    -------
    float
    """
    total = 0.0
    for name, entered in load.entered.items():
        for layer, (block, tokens) in enumerate(zip(anatomy.tower(name).blocks, entered, strict=True)):
            memory: Count = load.left[memories[name]] if name in memories else 0
            units = {kind: kept[name, layer, kind] for kind in block.sites if (name, layer, kind) in kept}
            total += float(block_flops(block, tokens, memory=memory, kept=units).double().mean())
    return total
