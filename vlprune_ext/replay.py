"""The engine: what a model's objective becomes under each of many interventions, in few runs.

A tower's blocks are walked from first to last. At block l only the residual stream entering l is held. One pass of
block l serves all its interventions: what they share is computed once, `ops.leave_one_out` makes every variant of the
output projection from it, and the variants, stacked on the batch axis, run through the rest of the model. Blocks before
l and modules that cannot change are bypassed by patching their forward; everything after is the model's own code.

For N rows, L blocks and V_l interventions on heads, neurons and weights, D_l on whole blocks, that is

    N * (L + sum_l V_l * (L - l) + sum_l D_l * (L - l - 1))

block runs (l from 0), against N * L * (1 + sum_l (V_l + D_l)) for one whole run each. A perturbed weight has no shared
pass: its block runs once for each variant, and only what leaves it is stacked. Of a context (`Within`) nothing can be
shared or stacked: it runs by itself from its block on. L is the blocks that the model reads:
the vision tower of a LLaVA has more. Of the last one only the rows that are read are computed in full.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from .anatomy import Anatomy, Block, Site, Tower
from .interventions import DropLayer, Intervention
from .ops import leave_one_out, perturb
from .patch import Patches, evaluation_mode

Progress = Callable[[int, int, str], None]  # done, total, what
Inputs = dict[str, Tensor]
Output = Tensor | tuple[Any, ...]  # what a block or a site's module returns: a tensor, or a tuple that begins with one
T = TypeVar("T")


class _Stop(Exception):
    """Raised inside a forward when nothing after the current block is needed."""


def _stacked(value: T, copies: int) -> T:
    """Every tensor in ``value`` repeated ``copies`` times along its first dimension."""
    return pytree.tree_map_only(Tensor, lambda t: t.repeat(copies, *[1] * (t.dim() - 1)) if t.dim() else t, value)


def _blank(value: T, copies: int = 1) -> T:
    """The shape of ``_stacked(value, copies)`` without its memory: for results that nothing will read.

    Ones, since there are models that take images of zeros for padding.
    """
    return pytree.tree_map_only(
        Tensor, lambda t: t.new_ones(()).expand(copies * t.shape[0], *t.shape[1:]) if t.dim() else t, value
    )


def _first(output: Output) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _with_first(output: Output, tensor: Tensor, copies: int = 1, fill: Callable = _stacked) -> Output:
    """A module's result with its first tensor exchanged, and ``copies`` of the rest.

    Of the rest, what has a first dimension of one, such as the position bias that T5 hands from block to block, is the
    same for every row and stays as it is; it broadcasts.
    """
    if isinstance(output, Tensor):
        return tensor
    shared = pytree.tree_map_only(Tensor, lambda t: t if t.shape[:1] == (1,) else fill(t, copies), output[1:])
    return (tensor, *shared)


Rows = Tensor | int  # of each sample of [B, T, D]: some [B, K], or one


def _take(x: Tensor, rows: Rows) -> Tensor:
    """[B, T, D] -> [B, K, D]: some rows of each sample."""
    if isinstance(rows, int):
        return x.narrow(1, rows % x.shape[1], 1)
    return x[torch.arange(x.shape[0], device=x.device)[:, None], rows]


def _put(x: Tensor, rows: Rows, length: int) -> Tensor:
    """[B, K, D] -> [B, T, D] that `_take` turns back; what the other rows hold is nothing."""
    if isinstance(rows, int) or rows.shape[1] == 1:
        return x.expand(-1, length, -1)
    whole = x.new_zeros(x.shape[0], length, x.shape[2])
    whole[torch.arange(x.shape[0], device=x.device)[:, None], rows] = x
    return whole


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
class _Shared:
    """What all variants of one block have in common, for one batch; filled in while the block runs."""

    stream: Tensor = field(init=False)  # [B, T, D] entering the block
    carried: Any = None  # the carrier's state as the block was entered
    leaving: Any = None  # and as it was left
    output: Output = field(init=False)  # [B, T, D] leaving it, perhaps with more
    x: dict[str, Tensor] = field(default_factory=dict)  # site kind -> input of its output projection
    returned: dict[str, Output] = field(default_factory=dict)  # site kind -> what its module returned
    skipped: dict[nn.Module, object] = field(default_factory=dict)  # modules that need not run again -> blank result


@dataclass
class _Batch:
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


class Replay:
    """Replays the suffix of a tower for many interventions.

    model       a transformers model known to `anatomy`
    tower       name of one of its towers
    batches     the calibration rows as model inputs, each a dict of tensors with the row on the first dimension
    run_model   (model, inputs) -> [B, ...]: what is wanted of each row, for instance an embedding or a loss. It may
                look at what the model pools or, where there are labels, at what predicts them; the rest is not exact
    stacked_rows  how many rows (variants times batch) go through the suffix at once; None measures what is fastest
    carrier     keeps, in ``state``, what hooks of the caller know of a batch; it is kept and put back with the stream
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
        self.anatomy = anatomy
        self.model = anatomy.model
        self.tower: Tower = anatomy.tower(tower)
        self.run_model = run_model
        self.stacked_rows = stacked_rows
        self.carrier = carrier
        self.progress = progress
        self.block_runs = 0
        self.taps = self.tower.taps()
        if -1 in self.taps:
            raise ValueError(f"{self.tower.paths.feature_layer}: layer 0 (the embeddings) cannot be replayed")
        self.depth = self.tower.depth
        self.skip_layers = frozenset(skip_layers)
        start = 0
        self.batches: list[_Batch] = []
        for inputs in batches:
            size = len(inputs["input_ids"] if "input_ids" in inputs else next(iter(inputs.values())))
            batch = _Batch(inputs, slice(start, start + size))
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

        positions  which of ``interventions`` these are
        outputs    [len(positions), N, ...] what `run_model` gives under each; dense outputs are [N, ...]
        finish     False: no dense outputs are wanted, so that the model without interventions is not run to its end
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
                    shared, output = self._advance(
                        layer, batch, {interventions[i].kind for i in ids}, layer < last or not finish
                    )
                    if output is not None:
                        dense.append(output)
                    for chunk, out in self._variants(layer, batch, shared, ids, interventions):
                        for i, rows in zip(chunk, out, strict=True):
                            results[i].append(rows)
                            done += self._runs(layer, interventions[i]) * batch.size // self.n_rows
                        if self.progress:
                            self.progress(done, total, f"{self.tower.name} block {layer}")
                    batch.entering, batch.carried = shared.output, shared.leaving
                    if layer in self.taps:
                        batch.tapped[layer] = _first(shared.output)
                if ids:
                    yield ids, torch.stack([torch.cat(results[i]) for i in ids])
            for batch in self.batches:
                batch.entering = None
                batch.tapped.clear()
            if not finish:
                return
            plain = torch.cat(dense)
            for layer, ids in by_layer.items():
                if layer >= self.depth:  # nothing reads it
                    yield ids, plain.expand(len(ids), *plain.shape)
            yield None, plain

    @torch.no_grad()
    def run_block(self, layer: int, *, advance: bool, each: Callable[[Inputs], object] | None = None) -> None:
        """Run one block on the stream that enters it, for every batch, in evaluation mode; ``each`` is told which.

        Blocks come in ascending order. What leaves the block enters the next once ``advance`` is true: change the
        block in between, and those after it see what the changed one makes of the data.
        """
        with evaluation_mode(self.model):
            for batch in self.batches:
                if each:
                    each(batch.inputs)
                shared, _ = self._advance(layer, batch, set(), True)
                if advance:
                    batch.entering, batch.carried = shared.output, shared.leaving
                    if layer in self.taps:
                        batch.tapped[layer] = _first(shared.output)

    def _group(self, interventions: Sequence[Intervention]) -> dict[int, list[int]]:
        by_layer: dict[int, list[int]] = {}
        for i, intervention in enumerate(interventions):
            if intervention.tower != self.tower.name:
                raise ValueError(f"interventions: {intervention} is not of tower {self.tower.name!r}")
            if not 0 <= intervention.layer < len(self.tower):
                raise ValueError(f"interventions: {intervention}, expected a layer below {len(self.tower)}")
            if intervention.layer in self.skip_layers:
                raise ValueError(f"interventions: {intervention}, but that layer is already removed")
            if intervention.kind not in ("layer", "weight", "context") and not intervention.units:
                raise ValueError(f"interventions: {intervention} drops nothing")
            by_layer.setdefault(intervention.layer, []).append(i)
        return by_layer

    def _runs(self, layer: int, intervention: Intervention) -> int:
        """Block runs of one intervention over all rows."""
        first = layer + 1 if isinstance(intervention, DropLayer) else layer
        return self.n_rows * sum(i not in self.skip_layers for i in range(first, self.depth))

    def _count(self, first: int, rows: int, last: int | None = None) -> None:
        last = self.depth if last is None else last
        self.block_runs += rows * sum(i not in self.skip_layers for i in range(first, last))

    # -- one block ----------------------------------------------------------------------------------------------------

    def _bypass(self, patches: Patches, layer: int, batch: _Batch, copies: int) -> None:
        """Keep the model from computing anything in front of block ``layer``, beside it, or that nothing reads."""
        for module, result in batch.before.items():
            patches.forward(module, lambda *_, _r=result, **__: _blank(_r, copies))
        for module, result in batch.beside.items():
            patches.forward(module, lambda *_, _r=result, **__: _stacked(_r, copies))
        self._leave_unread(patches, layer)
        entering: Any = batch.entering
        for i, block in enumerate(self.tower.blocks[:layer]):
            if i in batch.tapped:
                patches.forward(block.module, lambda *_, _r=batch.tapped[i], **__: _stacked(_r, copies))
            else:
                patches.forward(
                    block.module, lambda hidden_states, *_, **__: _with_first(entering, hidden_states, copies)
                )

    def _leave_unread(self, patches: Patches, layer: int) -> None:
        for block in self.tower.blocks[max(self.depth, layer + 1) :]:
            patches.forward(block.module, lambda hidden_states, *_, **__: hidden_states)

    def _advance(self, layer: int, batch: _Batch, kinds: set[str], stop: bool) -> tuple[_Shared, Tensor | None]:
        """Run block ``layer`` on the stream as it is, keeping what variants share; then stop, or finish the model."""
        block = self.tower.blocks[layer]
        shared = _Shared()
        with Patches() as patches:
            if self.carrier is not None:
                carrier = self.carrier
                patches.pre_hook(block.module, lambda *_: setattr(shared, "carried", carrier.state), prepend=True)
            if batch.entering is None:
                self._leave_unread(patches, layer)
                for module in self.tower.before:
                    patches.hook(module, lambda m, _, out: batch.before.__setitem__(m, _blank(out)))
                for module in self.tower.beside:
                    patches.hook(module, lambda m, _, out: batch.beside.__setitem__(m, out))
            else:
                self._bypass(patches, layer, batch, 1)
                _set_stream(patches, block.module, _first(batch.entering), self.carrier, batch.carried)
            self._watch(patches, block, shared, kinds)

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
        self._count(layer, batch.size, layer + 1 if stop else None)
        return shared, output

    @staticmethod
    def _watch(patches: Patches, block: Block, shared: _Shared, kinds: set[str]) -> None:
        needed = [kind for kind in block.sites if kind in kinds]
        if not needed:
            return
        for kind, site in block.sites.items():
            patches.pre_hook(site.out, lambda _, args, _k=kind: shared.x.__setitem__(_k, args[0]))
            patches.hook(site.module, lambda _, __, out, _k=kind: shared.returned.__setitem__(_k, out))
            for module in site.skip:
                patches.hook(module, lambda m, _, out: shared.skipped.__setitem__(m, _blank(out)))
            if kind == needed[-1]:
                break

    def _variants(
        self, layer: int, batch: _Batch, shared: _Shared, ids: list[int], interventions: Sequence[Intervention]
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Outputs of the whole model under the interventions on one block, a chunk at a time."""
        for kind in ("head", "cross_head", "neurons", "layer", "weight", "context"):
            of_kind = [i for i in ids if interventions[i].kind == kind]
            if not of_kind:
                continue
            if kind == "context":
                for i in of_kind:
                    yield [i], self._within(layer, batch, shared, interventions[i])[None]
                continue
            for chunk in self._chunks(layer, batch, shared, of_kind):
                variants = None
                if kind == "weight":
                    variants = self._perturbed(layer, batch, shared, [interventions[i] for i in chunk])
                elif kind != "layer":
                    units = [interventions[i].units for i in chunk]
                    variants = self._leave_out(layer, batch, shared, kind, units)
                out = self._suffix(layer, batch, shared, kind, variants, len(chunk))
                yield chunk, out.view(len(chunk), batch.size, *out.shape[1:])

    def _leave_out(self, layer: int, batch: _Batch, shared: _Shared, kind: str, units: list[tuple[int, ...]]) -> Tensor:
        """[V * B, T, D]: the site's output projection without each set of units."""
        site = self.tower.blocks[layer].sites[kind]
        if any(not 0 <= unit < site.units for drop in units for unit in drop):
            raise ValueError(f"interventions: {kind} of {self.tower.name}.{layer}, expected units below {site.units}")
        if kind not in shared.x:
            raise ValueError(f"interventions: {kind} of {self.tower.name}.{layer} plays no part in this objective")
        x, base = shared.x[kind], _first(shared.returned[kind])
        rows = self._last_read(layer, batch)
        if rows is not None:
            x, base = _take(x, rows), _take(base, rows)
        out = leave_units_out(x.reshape(-1, x.shape[-1]), site, base.reshape(-1, base.shape[-1]), units)
        return out.view(len(units) * base.shape[0], *base.shape[1:])

    def _perturbed(self, layer: int, batch: _Batch, shared: _Shared, changes: Sequence[Any]) -> Tensor:
        """[V * B, T, D]: what leaves the block under each change of one of its weights, which is not written."""
        block = self.tower.blocks[layer].module
        outputs: list[Tensor] = []

        def leave(_, __, output):
            outputs.append(_first(output))
            raise _Stop

        pair: tuple[Any, tuple[Tensor, Tensor]] | None = None  # both signs come from one draw
        for change in changes:
            module: Any = block.get_submodule(change.matrix)
            draw = (change.matrix, change.seed, change.tensor_id, change.eps)
            if pair is None or pair[0] != draw:
                pair = (draw, perturb(module.weight, change.seed, change.tensor_id, change.eps))
            weight = pair[1][0 if change.sign > 0 else 1]
            with Patches() as patches, contextlib.suppress(_Stop):
                self._bypass(patches, layer, batch, 1)
                _set_stream(patches, block, shared.stream)
                patches.forward(module, lambda x, _w=weight, _m=module: F.linear(x, _w, _m.bias))
                patches.hook(block, leave)
                self.run_model(self.model, batch.inputs)
            self._count(layer, batch.size, layer + 1)
        return torch.cat(outputs)

    def _within(self, layer: int, batch: _Batch, shared: _Shared, change: Any) -> Tensor:
        """[B, ...]: what the model gives if, from this block on, it runs within a context."""
        with change.context(), Patches() as patches:
            self._bypass(patches, layer, batch, 1)
            block = self.tower.blocks[layer].module
            _set_stream(patches, block, shared.stream, self.carrier, shared.carried)
            self._count(layer, batch.size)
            return self.run_model(self.model, batch.inputs)

    def _last_read(self, layer: int, batch: _Batch) -> Rows | None:
        """The only rows that are used of what leaves block ``layer``; None when all are."""
        return batch.read if layer == len(self.tower) - 1 else None

    def _suffix(
        self, layer: int, batch: _Batch, shared: _Shared, kind: str, variants: Tensor | None, copies: int
    ) -> Tensor:
        """Run the model from inside block ``layer`` on ``copies`` stacked variants of the batch."""
        block = self.tower.blocks[layer]
        only = self._last_read(layer, batch)
        length = shared.stream.shape[1]

        def own(tensor: Tensor) -> Tensor:  # the rows that matter, stacked
            return _stacked(tensor if only is None else _take(tensor, only), copies)

        with Patches() as patches:
            self._bypass(patches, layer, batch, copies)
            if kind in ("layer", "weight"):
                leaving = _stacked(shared.stream, copies) if variants is None else variants
                passed_by = _with_first(shared.output, leaving, copies)
                patches.forward(block.module, lambda *_, **__: passed_by)
            elif variants is not None:
                if only is not None:
                    rows = only if isinstance(only, int) else only.repeat(copies, 1)
                    patches.hook(block.module, lambda _, __, out: _put(out, rows, length))
                _set_stream(patches, block.module, own(shared.stream))
                self._patch_sites(patches, block, shared, kind, variants, copies, own)
            if batch.read is not None and layer < len(self.tower) - 1:
                self._narrow_last(
                    patches, batch.read if isinstance(batch.read, int) else batch.read.repeat(copies, 1), length
                )
            # Images are read by bypassed modules alone, so that their stack needs no memory.
            inputs = {
                name: _blank(value, copies) if value.is_floating_point() else _stacked(value, copies)
                for name, value in batch.inputs.items()
            }
            self._count(layer + 1 if kind in ("layer", "weight") else layer, copies * batch.size)
            return self.run_model(self.model, inputs)

    @staticmethod
    def _patch_sites(patches, block: Block, shared: _Shared, kind: str, variants: Tensor, copies: int, own) -> None:
        """Sites before the changed one return what they returned; the changed one returns its variants."""
        for name, site in block.sites.items():
            for module in site.skip:
                if module in shared.skipped:
                    blank = _blank(shared.skipped[module], copies)
                    patches.forward(module, lambda *_, _r=blank, **__: _r)
            if name not in shared.returned:  # for instance a cross attention that this objective never calls
                continue
            returned = shared.returned[name]
            value = variants if name == kind else own(_first(returned))
            result = _with_first(returned, value, copies, _blank)
            patches.forward(site.module, lambda *_, _r=result, **__: _r)
            if name == kind:
                return

    def _narrow_last(self, patches: Patches, rows: Rows, length: int) -> None:
        """Of the last block only some rows are read: attend to all of them, but go on with those."""
        block = self.tower.blocks[-1]
        if block.norm is None or len(self.tower) - 1 in self.skip_layers or "head" not in block.sites:
            return
        full: list[Tensor] = []

        def enter(_, args, kwargs):
            stream = args[0] if args else kwargs["hidden_states"]
            full.append(stream)
            stream = _take(stream, rows)
            return ((stream, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": stream})

        norm, out = block.norm, block.sites["head"].out
        normalise, project = norm.forward, out.forward
        patches.pre_hook(block.module, enter, with_kwargs=True)
        patches.forward(norm, lambda _: normalise(full.pop()))
        patches.forward(out, lambda x: project(_take(x, rows)))
        patches.hook(block.module, lambda _, __, out: _put(out, rows, length))

    # -- how much at once ---------------------------------------------------------------------------------------------

    def _chunks(self, layer: int, batch: _Batch, shared: _Shared, ids: list[int]) -> Iterator[list[int]]:
        if self.stacked_rows is None:
            self.stacked_rows = self._measure_rows(layer, batch, shared, len(ids))
        step = max(1, self.stacked_rows // batch.size)
        for start in range(0, len(ids), step):
            yield ids[start : start + step]

    def _measure_rows(self, layer: int, batch: _Batch, shared: _Shared, variants: int) -> int:
        """The stack height with the shortest time per row, among powers of two times the batch."""
        runs_before = self.block_runs
        best, best_time = batch.size, float("inf")
        copies = 1
        while copies <= max(1, min(variants, 1024 // batch.size)):
            try:
                elapsed = min(self._time(layer, batch, shared, copies) for _ in range(2)) / copies
            except torch.OutOfMemoryError:
                break
            if elapsed < best_time:
                best, best_time = copies * batch.size, elapsed
            elif elapsed > 1.2 * best_time:
                break
            copies *= 2
        self.block_runs = runs_before
        return best

    def _time(self, layer: int, batch: _Batch, shared: _Shared, copies: int) -> float:
        """Seconds of one suffix run on stacked copies of the stream as it is."""
        start = time.perf_counter()
        self._suffix(layer, batch, shared, "layer", None, copies)
        if shared.stream.is_cuda:
            torch.cuda.synchronize(shared.stream.device)
        return time.perf_counter() - start


def leave_units_out(x: Tensor, site: Site, base: Tensor, drops: Sequence[tuple[int, ...]]) -> Tensor:
    """``base`` without the part that each set of units contributes.

    x      [N, units * width]  input of the site's output projection
    base   [N, D]              its output
    drops  V sets of units
    Returns [V, N, D].
    """
    weight, width = site.out.weight, site.width
    size = len(drops[0])
    # Aligned runs of units, such as single heads or consecutive groups of neurons, are read in place.
    runs = [tuple(range(drop[0], drop[0] + size)) for drop in drops]
    if list(drops) == runs and site.units % size == 0 and all(drop[0] % size == 0 for drop in drops):
        return leave_one_out(x, weight, base, size * width, groups=[drop[0] // size for drop in drops])
    longest = max(len(drop) for drop in drops)
    columns = torch.zeros(len(drops), longest, width, dtype=torch.long)
    valid = torch.zeros(len(drops), longest, width, dtype=torch.bool)
    for i, drop in enumerate(drops):
        columns[i, : len(drop)] = torch.tensor(drop)[:, None] * width + torch.arange(width)
        valid[i, : len(drop)] = True
    index = columns.flatten().to(x.device)
    gathered = x[:, index] * valid.flatten().to(x.device)
    return leave_one_out(gathered, weight[:, index], base, longest * width)
