"""Prefix and suffix of a model at one block: run up to it, then from it on with a changed block.

Blocks before it and modules whose output cannot change are bypassed by patching their forward; everything after is the
model's own code.
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
    """Holder of a ``state`` that the caller's hooks keep for the running batch, beside the residual stream."""

    state: Any


def _set_stream(
    patches: Patches, block: nn.Module, stream: Tensor, carrier: Carrier | None = None, state: Any = None
) -> None:
    """Replace the hidden states that ``block`` is called with by ``stream``, and restore the carrier's state."""

    def hook(_, args, kwargs):
        if carrier is not None:
            carrier.state = state
        if args:
            return (stream, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": stream}

    patches.pre_hook(block, hook, with_kwargs=True, prepend=True)  # before the caller's hooks look


@dataclass
class Shared:
    """Activations of one block that all its variants share, for one batch; filled in while the block runs.

    Attributes
    ----------
    stream : Tensor [B, T, D]
        Residual stream that enters the block.
    carried, leaving : object
        The carrier's state on entry and on exit.
    output : Tensor [B, T, D], or a tuple that begins with it
        The block's output.
    x : dict of Tensor
        Site kind -> input of its output projection.
    returned : dict of Tensor or tuple
        Site kind -> output of its module.
    skipped : dict
        Modules that need not run again -> placeholder of their output.
    """

    stream: Tensor = field(init=False)
    carried: Any = None
    leaving: Any = None
    output: Output = field(init=False)
    x: dict[str, Tensor] = field(default_factory=dict)
    returned: dict[str, Output] = field(default_factory=dict)
    skipped: dict[nn.Module, object] = field(default_factory=dict)


@dataclass
class Batch:
    """One batch of calibration data with the activations held between two blocks.

    Parameters
    ----------
    inputs : dict of Tensor
        Model inputs.
    rows : slice
        Its rows among all N.
    entering : Tensor [B, T, D], or a tuple that begins with it, optional
        Output of the block before.
    carried : object
        The carrier's state after that block.
    before, beside : dict
        Outputs of the modules in `Tower.before` (placeholders) and `Tower.beside`.
    read : Rows, optional
        Rows of the last block's output that are read; None: all.
    tapped : dict of Tensor [B, T, D]
        Block -> its output, for blocks that not only the next one reads.
    """

    inputs: Inputs
    rows: slice
    entering: Output | None = None
    carried: Any = None
    before: dict[nn.Module, object] = field(default_factory=dict)
    beside: dict[nn.Module, object] = field(default_factory=dict)
    read: Rows | None = None
    tapped: dict[int, Tensor] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of rows B."""
        return self.rows.stop - self.rows.start


class Runner:
    """Run one tower's blocks, and the model from one of them on; count block runs.

    Parameters
    ----------
    anatomy : Anatomy
        The model.
    tower : str
        Name of the tower.
    run_model : callable (model, inputs) -> Tensor [B, ...]
        Full forward.
    skip_layers : sequence of int
        Blocks that were removed before.
    carrier : Carrier, optional
        Its ``state`` is saved and restored with the residual stream.
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
        """Return how many blocks run from ``layer`` on."""
        return sum(i not in self.skip_layers for i in range(layer, self.depth))

    def count(self, layer: int, rows: int, last: int | None = None) -> None:
        """Count the runs of ``rows`` through blocks ``layer`` to ``last``, exclusive (None: the tower's end)."""
        last = self.depth if last is None else last
        self.block_runs += rows * sum(i not in self.skip_layers for i in range(layer, last))

    def bypass(self, patches: Patches, layer: int, batch: Batch, copies: int) -> None:
        """Bypass the modules before and beside the tower, the blocks before ``layer``, and those that nothing reads.

        Parameters
        ----------
        patches : Patches
            Owns the patched forwards.
        layer : int
            First block that runs.
        batch : Batch
            Its recorded outputs take the modules' place.
        copies : int
            How often they are repeated on the batch dimension.
        """
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
        """Bypass the blocks behind the last one whose output is read."""
        for block in self.tower.blocks[max(self.depth, layer + 1) :]:
            patches.forward(block.module, lambda hidden_states, *_, **__: hidden_states)

    def advance(self, layer: int, batch: Batch, sites: set[str], stop: bool) -> tuple[Shared, Tensor | None]:
        """Run block ``layer`` on its unchanged input and record what its variants share.

        Parameters
        ----------
        layer : int
            The block.
        batch : Batch
            Its entering stream; not advanced.
        sites : set of str
            Kinds of sites to record inputs and results of.
        stop : bool
            Whether to stop behind the block; else the model runs to its end.

        Returns
        -------
        shared : Shared
        output : Tensor [B, ...], or None
            The model's output, None if stopped.
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
    """Register hooks that record the sites of a block, up to the last of the needed kinds."""
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
    """A model stopped at one block with one batch: the interface by which an intervention runs the suffix.

    Its ``finish_*`` methods run the model to its end on ``copies`` of the batch, stacked on the batch dimension, and
    return `Runner.run_model`'s output [copies * B, ...].

    Parameters
    ----------
    runner : Runner
        Runs the model.
    layer : int
        The block.
    batch : Batch
        The batch.
    shared : Shared
        Activations of the unchanged block.

    Attributes
    ----------
    stream : Tensor [B, T, D]
        Residual stream that enters the block.
    """

    def __init__(self, runner: Runner, layer: int, batch: Batch, shared: Shared) -> None:
        self.runner, self.layer, self.batch, self.shared = runner, layer, batch, shared
        self.block = runner.tower.blocks[layer]
        self.stream = shared.stream

    @property
    def name(self) -> str:
        """The block's name for messages, such as "vision.3"."""
        return f"{self.runner.tower.name}.{self.layer}"

    def at_site(self, kind: str) -> tuple[Tensor, Tensor]:
        """Return input and result of a site's output projection, for the rows that are read.

        Parameters
        ----------
        kind : str
            Kind of the site.

        Returns
        -------
        x : Tensor [B, K, units * width]
        base : Tensor [B, K, D]
            Result of the site's module.

        Raises
        ------
        ValueError
            A site that the objective never calls.
        """
        if kind not in self.shared.x:
            raise ValueError(f"interventions: {kind} of {self.name} plays no part in this objective")
        x, base = self.shared.x[kind], first(self.shared.returned[kind])
        rows = self._rows_read()
        return (x, base) if rows is None else (take(x, rows), take(base, rows))

    def run_block(self, module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the block's output [B, T, D] with the forward of one of its modules replaced.

        Parameters
        ----------
        module : nn.Module
            In the block.
        forward : callable Tensor -> Tensor
            Replaces its forward.
        """
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
        """Run this block and all later ones within ``context``, on the batch itself, unstacked."""
        with context, Patches() as patches:
            self.runner.bypass(patches, self.layer, self.batch, 1)
            _set_stream(patches, self.block.module, self.stream, self.runner.carrier, self.shared.carried)
            self.runner.count(self.layer, self.batch.size)
            return self.runner.run_model(self.runner.model, self.batch.inputs)

    def finish_after(self, leaving: Tensor, copies: int) -> Tensor:
        """Run the model behind this block.

        Parameters
        ----------
        leaving : Tensor [copies * B, T, D]
            Takes the place of the block's output.
        copies : int
            Stacked variants.
        """
        with Patches() as patches:
            passed_by = with_first(self.shared.output, leaving, copies)
            patches.forward(self.block.module, lambda *_, **__: passed_by)
            return self._finish(patches, self.layer + 1, copies)

    def finish_from_site(self, kind: str, variants: Tensor, copies: int) -> Tensor:
        """Run the model behind one of the block's sites.

        Parameters
        ----------
        kind : str
            Kind of the site.
        variants : Tensor [copies * B, K, D]
            Take the place of the site's result.
        copies : int
            Stacked variants.
        """
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

    # --- helpers -----------------------------------------------------------------------------------------------------

    def _rows_read(self) -> Rows | None:
        """Return the rows of this block's output that are read; None for all."""
        return self.batch.read if self.layer == len(self.runner.tower) - 1 else None

    def _finish(self, patches: Patches, counted_from: int, copies: int) -> Tensor:
        """Bypass the prefix and run the model on stacked inputs."""
        runner, batch = self.runner, self.batch
        runner.bypass(patches, self.layer, batch, copies)
        if batch.read is not None and self.layer < len(runner.tower) - 1:
            rows = batch.read if isinstance(batch.read, int) else batch.read.repeat(copies, 1)
            self._narrow_last(patches, rows)
        # Only bypassed modules read images, so that placeholders do, which need no memory.
        inputs = {
            name: blank(value, copies) if value.is_floating_point() else stacked(value, copies)
            for name, value in batch.inputs.items()
        }
        runner.count(counted_from, copies * batch.size)
        return runner.run_model(runner.model, inputs)

    def _patch_sites(
        self, patches: Patches, kind: str, variants: Tensor, copies: int, own: Callable[[Tensor], Tensor]
    ) -> None:
        """Replace the result of site ``kind`` by its variants, and results of earlier sites by the recorded ones."""
        for name, site in self.block.sites.items():
            for module in site.skip:
                if module in self.shared.skipped:
                    nothing = blank(self.shared.skipped[module], copies)
                    patches.forward(module, lambda *_, _r=nothing, **__: _r)
            if name not in self.shared.returned:  # for instance a cross-attention that this objective never calls
                continue
            returned = self.shared.returned[name]
            value = variants if name == kind else own(first(returned))
            result = with_first(returned, value, copies, blank)
            patches.forward(site.module, lambda *_, _r=result, **__: _r)
            if name == kind:
                return

    def _narrow_last(self, patches: Patches, rows: Rows) -> None:
        """Restrict the last block's queries to the rows that are read; keys and values are those of all rows."""
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
