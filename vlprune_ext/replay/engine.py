"""The replay engine: a model's outputs under each of many interventions, without one full forward for each.

A tower's blocks are walked from first to last. At block l only the residual stream entering l is held. One pass of
block l serves all its interventions: what they share is computed once, `ops.leave_one_out` makes every variant of the
output projection's result from it, and the variants, stacked on the batch dimension, run through the rest of the model.
Blocks before l and modules whose output cannot change are bypassed by patching their forward; everything after is the
model's own code.

For N rows, L blocks and V_l interventions on heads, neurons and weights, D_l on whole blocks, that is

    N * (L + sum_l V_l * (L - l) + sum_l D_l * (L - l - 1))

block runs (l from 0), against N * L * (1 + sum_l (V_l + D_l)) for a full forward each. A perturbed weight has no shared
pass: its block runs once for each variant, and only the block's output is stacked. An intervention by context
(`Within`) shares and stacks nothing: it runs by itself from its block on. L is the number of blocks whose output is
used: the vision tower of a LLaVA has more. Of the last one only the rows that are read (pooled or labelled) are
computed in full.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..anatomy.patch import evaluation_mode
from ..progress import Progress
from .interventions import Intervention
from .streams import first, stacked
from .suffix import Batch, Carrier, Inputs, Runner, Stopped


class Replay:
    """Run a model from each block of a tower on, under many interventions.

    Parameters
    ----------
    anatomy : Anatomy
        Of a transformers model.
    tower : str
        Name of one of its towers.
    batches : sequence of dict of Tensor
        Calibration data as model inputs; the first dimension is the row.
    run_model : callable (model, inputs) -> Tensor [B, ...]
        Output wanted of each row, for instance an embedding or a loss. It may read the pooled row of the last block or,
        where there are labels, the positions that predict them; other rows are not exact.
    stacked_rows : int, optional
        How many rows (variants times batch) run through the suffix at once; by default the fastest, as measured.
    skip_layers : sequence of int
        Blocks of the tower that were removed before.
    carrier : Carrier, optional
        Object whose ``state`` the caller's hooks keep for a batch; saved and restored with the residual stream.
    progress : Progress, optional
        Called with (block runs done, in total, block name).

    Raises
    ------
    ValueError
        No batches; a tower whose features are read at its embeddings.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        tower: str,
        batches: Sequence[Inputs],
        run_model: Callable[[nn.Module, Inputs], Tensor],
        *,
        stacked_rows: int | None = None,
        skip_layers: Sequence[int] = (),
        carrier: Carrier | None = None,
        progress: Progress | None = None,
    ) -> None:
        if not batches:
            raise ValueError("data: no calibration samples")
        self.runner = Runner(anatomy, tower, run_model, skip_layers, carrier)
        self.model, self.tower, self.depth = self.runner.model, self.runner.tower, self.runner.depth
        self.stacked_rows = stacked_rows
        self.progress = progress
        self.taps = self.tower.taps()
        if -1 in self.taps:
            raise ValueError(f"{self.tower.paths.feature_layer}: layer 0 (the embeddings) cannot be replayed")
        start = 0
        self.batches: list[Batch] = []
        for inputs in batches:
            size = len(inputs["input_ids"] if "input_ids" in inputs else next(iter(inputs.values())))
            batch = Batch(inputs, slice(start, start + size))
            batch.read = self.tower.rows_read(inputs)
            self.batches.append(batch)
            start += size
        self.n_rows = start

    # -- the walk -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def walk(
        self, interventions: Sequence[Intervention], *, finish: bool = True
    ) -> Iterator[tuple[list[int] | None, Tensor]]:
        """Yield ``(positions, outputs)`` block by block, and ``(None, dense outputs)`` at the end.

        Parameters
        ----------
        interventions : sequence of Intervention
            On any blocks of the tower, in any order.
        finish : bool
            False: no dense outputs are wanted, so that the model without interventions is not run to its end.

        Yields
        ------
        positions : list of int, or None
            Indices into ``interventions`` of those on the current block; None for the dense outputs.
        outputs : Tensor [len(positions), N, ...]
            What `run_model` returns under each; dense outputs are [N, ...].

        Raises
        ------
        ValueError
            An intervention on another tower, a block out of range or removed, or one that changes nothing.
        """
        by_layer = self._group(interventions)
        last = min(max(by_layer, default=0), self.depth - 1)
        total = sum(self._runs(layer, interventions[i]) for layer, ids in by_layer.items() for i in ids)
        done = 0
        dense: list[Tensor] = []
        with evaluation_mode(self.model):
            for layer in range(last + 1):
                ids = by_layer.get(layer, [])
                results: dict[int, list[Tensor]] = {i: [] for i in ids}
                for batch in self.batches:
                    sites = {site for i in ids if (site := interventions[i].site) is not None}
                    shared, output = self.runner.advance(layer, batch, sites, layer < last or not finish)
                    if output is not None:
                        dense.append(output)
                    at = Stopped(self.runner, layer, batch, shared)
                    for chunk, out in self._variants(at, ids, interventions):
                        for i, rows in zip(chunk, out, strict=True):
                            results[i].append(rows)
                            done += self._runs(layer, interventions[i]) * batch.size // self.n_rows
                        if self.progress:
                            self.progress(done, total, f"{self.tower.name} block {layer}")
                    batch.entering, batch.carried = shared.output, shared.leaving
                    if layer in self.taps:
                        batch.tapped[layer] = first(shared.output)
                if ids:
                    yield ids, torch.stack([torch.cat(results[i]) for i in ids])
            for batch in self.batches:
                batch.entering = None
                batch.tapped.clear()
            if not finish:
                return
            plain = torch.cat(dense)
            for layer, ids in by_layer.items():
                if layer >= self.depth:  # nothing reads the block's output
                    yield ids, plain.expand(len(ids), *plain.shape)
            yield None, plain

    @torch.no_grad()
    def run_block(self, layer: int, *, advance: bool, each: Callable[[Inputs], object] | None = None) -> None:
        """Run one block on the residual stream that enters it, for every batch, in evaluation mode.

        Call it with blocks in ascending order. To calibrate sequentially, run a block, change its weights, then run it
        again with ``advance``: later blocks see the activations of the changed one.

        Parameters
        ----------
        layer : int
            The block.
        advance : bool
            Whether the block's output becomes the input of the next one.
        each : callable (inputs) -> object, optional
            Called with each batch's inputs before it runs.
        """
        with evaluation_mode(self.model):
            for batch in self.batches:
                if each:
                    each(batch.inputs)
                shared, _ = self.runner.advance(layer, batch, set(), True)
                if advance:
                    batch.entering, batch.carried = shared.output, shared.leaving
                    if layer in self.taps:
                        batch.tapped[layer] = first(shared.output)

    def _group(self, interventions: Sequence[Intervention]) -> dict[int, list[int]]:
        """Return layer -> indices of its interventions; raise ValueError for one that does not fit the tower."""
        by_layer: dict[int, list[int]] = {}
        for i, intervention in enumerate(interventions):
            if intervention.tower != self.tower.name:
                raise ValueError(f"interventions: {intervention} is not of tower {self.tower.name!r}")
            if not 0 <= intervention.layer < len(self.tower):
                raise ValueError(f"interventions: {intervention}, expected a layer below {len(self.tower)}")
            if intervention.layer in self.runner.skip_layers:
                raise ValueError(f"interventions: {intervention}, but that layer is already removed")
            intervention.check()
            by_layer.setdefault(intervention.layer, []).append(i)
        return by_layer

    def _runs(self, layer: int, intervention: Intervention) -> int:
        """Return the number of block runs of one intervention over all rows."""
        return self.n_rows * self.runner.blocks_from(layer if intervention.runs_block else layer + 1)

    def _variants(
        self, at: Stopped, ids: list[int], interventions: Sequence[Intervention]
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Yield (indices, outputs [V, B, ...]) of the full model under one block's interventions, a chunk at a time."""
        together: dict[Hashable, list[int]] = {}
        for i in ids:
            together.setdefault(interventions[i].key, []).append(i)
        for alike in together.values():
            one = interventions[alike[0]]
            for chunk in self._chunks(at, alike) if one.stacks else ([i] for i in alike):
                out = one.outputs(at, [interventions[i] for i in chunk])
                yield chunk, out.view(len(chunk), at.batch.size, *out.shape[1:])

    @property
    def block_runs(self) -> int:
        """Number of rows run through blocks so far, one count for each block."""
        return self.runner.block_runs

    # -- chunk size ---------------------------------------------------------------------------------------------------

    def _chunks(self, at: Stopped, ids: list[int]) -> Iterator[list[int]]:
        """Split interventions into chunks whose variants are stacked."""
        if self.stacked_rows is None:
            self.stacked_rows = self._measure_rows(at, len(ids))
        step = max(1, self.stacked_rows // at.batch.size)
        for start in range(0, len(ids), step):
            yield ids[start : start + step]

    def _measure_rows(self, at: Stopped, variants: int) -> int:
        """Return the number of stacked rows with the least time per row, among powers of two times the batch."""
        runs_before, size = self.block_runs, at.batch.size
        best, best_time = size, float("inf")
        copies = 1
        while copies <= max(1, min(variants, 1024 // size)):
            try:
                elapsed = min(_seconds(at, copies) for _ in range(2)) / copies
            except torch.OutOfMemoryError:
                break
            if elapsed < best_time:
                best, best_time = copies * size, elapsed
            elif elapsed > 1.2 * best_time:
                break
            copies *= 2
        self.runner.block_runs = runs_before
        return best


def _seconds(at: Stopped, copies: int) -> float:
    """Return the seconds of one suffix run on stacked copies of the unchanged stream."""
    start = time.perf_counter()
    at.finish_after(stacked(at.stream, copies), copies)
    if at.stream.is_cuda:
        torch.cuda.synchronize(at.stream.device)
    return time.perf_counter() - start
