"""FLOPs of a block from shapes alone, two per multiply-add: what a mode would save, before anything is pruned."""

from __future__ import annotations

from collections.abc import Mapping

from ..anatomy import Block, Site


def block_flops(block: Block, tokens: int, *, memory: int = 0, kept: Mapping[str, int] | None = None) -> int:
    """FLOPs of one block for one sample: its projections and its attention; norms and activations are left out.

    block      from `Anatomy.tower(..).blocks`
    tokens     that run through it
    memory     tokens that its cross-attention reads; 0 where it has none, or is given none
    kept       kind of site -> units that are left, "head", "cross_head" or "neurons"; all by default

    Raises ValueError for more units than there are, and for a block with cross-attention units to keep but no memory.
    """
    kept = {} if kept is None else kept
    unknown = [kind for kind in kept if kind not in block.sites]
    if unknown:
        raise ValueError(f"kept has {', '.join(unknown)}; expected some of {', '.join(block.sites)}")
    total = 0
    for kind, site in block.sites.items():
        units = kept.get(kind, site.units)
        if not 0 <= units <= site.units:
            raise ValueError(f"kept is {units} of {kind}; expected 0 to {site.units}")
        if kind == "cross_head" and not memory:
            continue
        total += _site_flops(site, units, tokens, memory if kind == "cross_head" else tokens)
    return total


def _site_flops(site: Site, units: int, tokens: int, keys: int) -> int:
    """FLOPs of a site's projections and, of heads, what lies between them."""
    columns = units * site.width  # of the output projection: neurons, or query heads times their size
    multiplied = tokens * columns * site.out.out_features
    for place, projection in enumerate(site.inputs):
        rows = projection.out_features * units // site.units
        # Keys and values of cross-attention are made of what it reads.
        multiplied += (tokens if place == 0 else keys) * projection.in_features * rows
    if site.kind != "neurons":
        multiplied += 2 * tokens * keys * columns  # scores, and their sums of values
    return 2 * multiplied
