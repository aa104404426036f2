"""A model run up to one block, and from there on: what replay and its interventions are made of.

Blocks before the one at hand and modules that cannot change are bypassed by patching their forward; everything after is
the model's own code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from ..anatomy import Anatomy, Block, Tower
from ..anatomy.patch import Patches
from .streams import Output, Rows, blank, first, put, stacked, take, with_first

Inputs = dict[str, Tensor]


class _Stop(Exception):
    """Raised inside a forward when nothing after the current block is needed."""


class Carrier(Protocol):
    """Who knows of the batch that runs what blocks after this one need, beside their stream."""

    state: Any


def _set_stream(
    patches: Patches, block: nn.Module, stream: Tensor, carrier: Carrier | None = None, state: Any = None
) -> None:
    """Let ``stream`` enter ``block`` in place of what its caller passes."""

    def hook(_, args, kwargs):
        if carrier is not None:
            carrier.state = state
        if args:
            return (stream, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": stream}

    patches.pre_hook(block, hook, with_kwargs=True, prepend=True)  # before the caller's hooks look


@dataclass
class Shared:
    """What all variants of one block have in common, for one batch; filled in while the block runs."""

    stream: Tensor = field(init=False)  # [B, T, D] entering the block
    carried: Any = None  # the carrier's state as the block was entered
    leaving: Any = None  # and as it was left
    output: Output = field(init=False)  # [B, T, D] leaving it, perhaps with more
    x: dict[str, Tensor] = field(default_factory=dict)  # site kind -> input of its output projection
    returned: dict[str, Output] = field(default_factory=dict)  # site kind -> what its module returned
    skipped: dict[nn.Module, object] = field(default_factory=dict)  # modules that need not run again -> blank result


@dataclass
class Batch:
    """Rows of the calibration data, and what is held of them between two blocks."""

    inputs: Inputs
    rows: slice
    entering: Output | None = None  # what the block before returned
    carried: Any = None  # the carrier's state as it did
    before: dict[nn.Module, object] = field(default_factory=dict)
    beside: dict[nn.Module, object] = field(default_factory=dict)
    read: Rows | None = None  # of the last block; None: all
    tapped: dict[int, Tensor] = field(default_factory=dict)  # block -> its output, where not only the next reads it

    @property
    def size(self) -> int:
        return self.rows.stop - self.rows.start


class Runner:
    """Runs one tower's blocks, and the model from one of them on; counts block runs.

    carrier  keeps, in ``state``, what hooks of the caller know of a batch; it is kept and put back with the stream
    """

    def __init__(
        self,
        anatomy: Anatomy,
        tower: str,
        run_model: Callable[[nn.Module, Inputs], Tensor],
        skip_layers: Sequence[int] = (),
        carrier: Carrier | None = None,
    ) -> None:
        self.model = anatomy.model
        self.tower: Tower = anatomy.tower(tower)
        self.run_model = run_model
        self.skip_layers = frozenset(skip_layers)
        self.carrier = carrier
        self.depth = self.tower.depth
        self.block_runs = 0

    def blocks_from(self, layer: int) -> int:
        """Return how many blocks run from one on."""
        return sum(i not in self.skip_layers for i in range(layer, self.depth))

    def count(self, layer: int, rows: int, last: int | None = None) -> None:
        """Count the runs of ``rows`` through the blocks from ``layer`` on, up to ``last``."""
        last = self.depth if last is None else last
        self.block_runs += rows * sum(i not in self.skip_layers for i in range(layer, last))

    def bypass(self, patches: Patches, layer: int, batch: Batch, copies: int) -> None:
        """Keep the model from computing anything in front of block ``layer``, beside it, or that nothing reads."""
        for module, result in batch.before.items():
            patches.forward(module, lambda *_, _r=result, **__: blank(_r, copies))
        for module, result in batch.beside.items():
            patches.forward(module, lambda *_, _r=result, **__: stacked(_r, copies))
        self._leave_unread(patches, layer)
        entering: Any = batch.entering
        for i, block in enumerate(self.tower.blocks[:layer]):
            if i in batch.tapped:
                patches.forward(block.module, lambda *_, _r=batch.tapped[i], **__: stacked(_r, copies))
            else:
                patches.forward(
                    block.module, lambda hidden_states, *_, **__: with_first(entering, hidden_states, copies)
                )

    def _leave_unread(self, patches: Patches, layer: int) -> None:
        for block in self.tower.blocks[max(self.depth, layer + 1) :]:
            patches.forward(block.module, lambda hidden_states, *_, **__: hidden_states)

    def advance(self, layer: int, batch: Batch, sites: set[str], stop: bool) -> tuple[Shared, Tensor | None]:
        """Run block ``layer`` on the stream as it is, keeping what variants share; then stop, or finish the model.

        sites  kinds of sites of which inputs and results are kept
        """
        block = self.tower.blocks[layer]
        shared = Shared()
        with Patches() as patches:
            if self.carrier is not None:
                carrier = self.carrier
                patches.pre_hook(block.module, lambda *_: setattr(shared, "carried", carrier.state), prepend=True)
            if batch.entering is None:
                self._leave_unread(patches, layer)
                for module in self.tower.before:
                    patches.hook(module, lambda m, _, out: batch.before.__setitem__(m, blank(out)))
                for module in self.tower.beside:
                    patches.hook(module, lambda m, _, out: batch.beside.__setitem__(m, out))
            else:
                self.bypass(patches, layer, batch, 1)
                _set_stream(patches, block.module, first(batch.entering), self.carrier, batch.carried)
            _watch(patches, block, shared, sites)

            def leave(_, args, kwargs, output):
                shared.stream = args[0] if args else kwargs["hidden_states"]
                shared.output = output
                shared.leaving = None if self.carrier is None else self.carrier.state
                if stop:
                    raise _Stop

            patches.hook(block.module, leave, with_kwargs=True)
            output = None
            with contextlib.suppress(_Stop):
                output = self.run_model(self.model, batch.inputs)
        self.count(layer, batch.size, layer + 1 if stop else None)
        return shared, output


def _watch(patches: Patches, block: Block, shared: Shared, sites: set[str]) -> None:
    needed = [kind for kind in block.sites if kind in sites]
    if not needed:
        return
    for kind, site in block.sites.items():
        patches.pre_hook(site.out, lambda _, args, _k=kind: shared.x.__setitem__(_k, args[0]))
        patches.hook(site.module, lambda _, __, out, _k=kind: shared.returned.__setitem__(_k, out))
        for module in site.skip:
            patches.hook(module, lambda m, _, out: shared.skipped.__setitem__(m, blank(out)))
        if kind == needed[-1]:
            break


class Stopped:
    """A model stopped at one block with one batch: what an intervention on that block works with.

    Its ``finish_*`` methods run the model to its end on ``copies`` of the batch, stacked on the batch axis, and return
    what is wanted of each row, [copies * B, ...].

    stream  [B, T, D] entering the block
    """

    def __init__(self, runner: Runner, layer: int, batch: Batch, shared: Shared) -> None:
        self.runner, self.layer, self.batch, self.shared = runner, layer, batch, shared
        self.block = runner.tower.blocks[layer]
        self.stream = shared.stream

    @property
    def name(self) -> str:
        """The block's name, for errors: "vision.3"."""
        return f"{self.runner.tower.name}.{self.layer}"

    def at_site(self, kind: str) -> tuple[Tensor, Tensor]:
        """Return (input, output) of a site's output projection, [B, K, units * width] and [B, K, D]: the rows read.

        Raises ValueError for a site that the objective never calls.
        """
        if kind not in self.shared.x:
            raise ValueError(f"interventions: {kind} of {self.name} plays no part in this objective")
        x, base = self.shared.x[kind], first(self.shared.returned[kind])
        rows = self._rows_read()
        return (x, base) if rows is None else (take(x, rows), take(base, rows))

    def run_block(self, module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what leaves the block, [B, T, D], with another ``forward`` of one module in it."""
        outputs: list[Tensor] = []

        def leave(_, __, output):
            outputs.append(first(output))
            raise _Stop

        with Patches() as patches, contextlib.suppress(_Stop):
            self.runner.bypass(patches, self.layer, self.batch, 1)
            _set_stream(patches, self.block.module, self.stream)
            patches.forward(module, forward)
            patches.hook(self.block.module, leave)
            self.runner.run_model(self.runner.model, self.batch.inputs)
        self.runner.count(self.layer, self.batch.size, self.layer + 1)
        return outputs[0]

    def finish_within(self, context: AbstractContextManager[object]) -> Tensor:
        """Run this block and all that comes after it within a context, on the batch as it is."""
        with context, Patches() as patches:
            self.runner.bypass(patches, self.layer, self.batch, 1)
            _set_stream(patches, self.block.module, self.stream, self.runner.carrier, self.shared.carried)
            self.runner.count(self.layer, self.batch.size)
            return self.runner.run_model(self.runner.model, self.batch.inputs)

    def finish_after(self, leaving: Tensor, copies: int) -> Tensor:
        """Run what comes after this block on streams [copies * B, T, D] that leave it."""
        with Patches() as patches:
            passed_by = with_first(self.shared.output, leaving, copies)
            patches.forward(self.block.module, lambda *_, **__: passed_by)
            return self._finish(patches, self.layer + 1, copies)

    def finish_from_site(self, kind: str, variants: Tensor, copies: int) -> Tensor:
        """Run on from one of the block's sites, of which ``variants`` [copies * B, K, D] are the results."""
        only, length = self._rows_read(), self.stream.shape[1]

        def own(tensor: Tensor) -> Tensor:  # the rows that matter, stacked
            return stacked(tensor if only is None else take(tensor, only), copies)

        with Patches() as patches:
            if only is not None:
                rows = only if isinstance(only, int) else only.repeat(copies, 1)
                patches.hook(self.block.module, lambda _, __, out: put(out, rows, length))
            _set_stream(patches, self.block.module, own(self.stream))
            self._patch_sites(patches, kind, variants, copies, own)
            return self._finish(patches, self.layer, copies)

    # --- the parts of it ---------------------------------------------------------------------------------------------

    def _rows_read(self) -> Rows | None:
        """The only rows that are used of what leaves this block; None when all are."""
        return self.batch.read if self.layer == len(self.runner.tower) - 1 else None

    def _finish(self, patches: Patches, counted_from: int, copies: int) -> Tensor:
        runner, batch = self.runner, self.batch
        runner.bypass(patches, self.layer, batch, copies)
        if batch.read is not None and self.layer < len(runner.tower) - 1:
            rows = batch.read if isinstance(batch.read, int) else batch.read.repeat(copies, 1)
            self._narrow_last(patches, rows)
        # Images are read by bypassed modules alone, so that their stack needs no memory.
        inputs = {
            name: blank(value, copies) if value.is_floating_point() else stacked(value, copies)
            for name, value in batch.inputs.items()
        }
        runner.count(counted_from, copies * batch.size)
        return runner.run_model(runner.model, inputs)

    def _patch_sites(
        self, patches: Patches, kind: str, variants: Tensor, copies: int, own: Callable[[Tensor], Tensor]
    ) -> None:
        """Sites before the changed one return what they returned; the changed one returns its variants."""
        for name, site in self.block.sites.items():
            for module in site.skip:
                if module in self.shared.skipped:
                    nothing = blank(self.shared.skipped[module], copies)
                    patches.forward(module, lambda *_, _r=nothing, **__: _r)
            if name not in self.shared.returned:  # for instance a cross attention that this objective never calls
                continue
            returned = self.shared.returned[name]
            value = variants if name == kind else own(first(returned))
            result = with_first(returned, value, copies, blank)
            patches.forward(site.module, lambda *_, _r=result, **__: _r)
            if name == kind:
                return

    def _narrow_last(self, patches: Patches, rows: Rows) -> None:
        """Of the last block only some rows are read: attend to all of them, but go on with those."""
        tower, length = self.runner.tower, self.stream.shape[1]
        block = tower.blocks[-1]
        if block.norm is None or len(tower) - 1 in self.runner.skip_layers or "head" not in block.sites:
            return
        full: list[Tensor] = []

        def enter(_, args, kwargs):
            stream = args[0] if args else kwargs["hidden_states"]
            full.append(stream)
            stream = take(stream, rows)
            return ((stream, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": stream})

        norm, out = block.norm, block.sites["head"].out
        normalise, project = norm.forward, out.forward
        patches.pre_hook(block.module, enter, with_kwargs=True)
        patches.forward(norm, lambda _: normalise(full.pop()))
        patches.forward(out, lambda x: project(take(x, rows)))
        patches.hook(block.module, lambda _, __, out: put(out, rows, length))
