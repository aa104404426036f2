"""Layer-wise pruning of weights: block after block, on what the pruned blocks before make of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import _native
from ..anatomy import IGNORED, Anatomy
from ..anatomy.patch import Patches, evaluation_mode
from ..data import Data
from ..objectives import Objective
from ..progress import Progress
from ..replay import Replay
from .criteria import Inputs, Pattern, check_criterion, prune_matrix
from .matrices import Matrix, matrices


@dataclass(frozen=True)
class Selection:
    """Which weights of a matrix go.

    criterion   "wanda", "magnitude", "ria" or "sparsegpt"
    pattern     "unstructured", or "n:m" for n zeros in every m
    scope       "row": the same share of every row; "matrix": of the matrix as a whole. None: rows, but matrices in the
                vision tower of a model that generates (the published choices). SparseGPT has its own: 128 columns
    damping     SparseGPT's, as a share of the mean diagonal of X^T X
    dsnot       how many weights of each row DSnoT may exchange for pruned ones (arXiv 2310.08915; there, 50)
    batch_size  calibration rows run at once
    objective   name of the objective whose data runs through the model
    """

    criterion: str = "wanda"
    pattern: str = "unstructured"
    scope: str | None = None
    damping: float = 0.01
    dsnot: int = 0
    batch_size: int = 32
    objective: str | None = None

    def __post_init__(self) -> None:
        check_criterion(self.criterion, self.scope, self.dsnot)
        Pattern.parse(self.pattern)
        if not 0 < self.damping < 1:
            raise ValueError(f"damping: {self.damping}, expected a share in (0, 1)")
        if self.batch_size < 1:
            raise ValueError(f"batch_size: {self.batch_size}, expected at least 1")

    def scope_of(self, anatomy: Anatomy, tower: str) -> str:
        if self.scope is not None:
            return self.scope
        return "matrix" if tower == "vision" and anatomy.family.head else "row"


def check_weights(chosen: Sequence[Matrix], pattern: str = "unstructured") -> None:
    """Raises ValueError naming the first matrix that cannot be pruned."""
    wanted = Pattern.parse(pattern)
    for matrix in chosen:
        if matrix.weight.dtype not in _native.DTYPES:
            raise ValueError(
                f"{matrix.name}: its weights are {matrix.weight.dtype}, expected float32, float16 or bfloat16"
            )
        if not bool(torch.isfinite(torch.stack(matrix.weight.detach().aminmax())).all()):
            row, column = (~matrix.weight.isfinite()).nonzero()[0].tolist()
            raise ValueError(
                f"{matrix.name}[{row}, {column}] is {matrix.weight[row, column].item()}; expected finite weights"
            )
        wanted.check(matrix.name, matrix.weight)


@torch.no_grad()
def used_matrices(
    anatomy: Anatomy, objective: Objective, data: Data, towers: Sequence[str] | None = None
) -> list[Matrix]:
    """The matrices that take part when the objective is computed, which a cross attention may not.

    Raises ValueError for a tower without any, and for weights that are not in memory.
    """
    found = matrices(anatomy, objective.towers(anatomy) if towers is None else towers)
    for matrix in found:
        if matrix.weight.is_meta:
            raise ValueError(f"{matrix.name}: its weights are not in memory (meta device)")
    seen: set[str] = set()
    for tower in dict.fromkeys(matrix.tower for matrix in found):
        with Patches() as patches, evaluation_mode(anatomy.model):
            for matrix in found:
                patches.pre_hook(matrix.module, lambda _, __, _n=matrix.name: seen.add(_n))
            objective.outputs(anatomy, tower, objective.batches(anatomy, tower, data.subset(1), 1)[0])
    return [matrix for matrix in found if matrix.name in seen]


def _by_layer(chosen: Sequence[Matrix]) -> dict[int, list[Matrix]]:
    layers: dict[int, list[Matrix]] = {}
    for matrix in chosen:
        layers.setdefault(matrix.layer, []).append(matrix)
    return layers


@torch.no_grad()
def walk_inputs(
    anatomy: Anatomy,
    objective: Objective,
    data: Data,
    chosen: Sequence[Matrix],
    *,
    batch_size: int,
    gram: bool = False,
    sums: bool = False,
    progress: Progress | None = None,
) -> Iterator[tuple[list[Matrix], Callable[[Matrix], Inputs]]]:
    """Yield the matrices of each block and what entered them, tower by tower in the order in which towers run.

    The caller may change the block's weights before asking for the next: what follows sees what they make of the data.
    Padding counts nowhere; layers that read the same tensor (q, k and v; gate and up) share their statistics.
    """
    for name in [tower for tower in anatomy.towers if any(matrix.tower == tower for matrix in chosen)]:
        layers = _by_layer([matrix for matrix in chosen if matrix.tower == name])
        replay = Replay(
            anatomy,
            name,
            objective.batches(anatomy, name, data, batch_size),
            objective.runner(anatomy, name),
        )
        for layer in range(max(layers) + 1):
            if layer in layers:
                collector = _Collector(anatomy, name, layers[layer], {"gram": gram, "sums": sums})
                with Patches() as patches:
                    collector.watch(patches)
                    replay.run_block(layer, advance=False, each=collector.next_batch)
                yield layers[layer], collector.of
            if layer < max(layers):
                replay.run_block(layer, advance=True)
            if progress:
                progress(layer + 1, max(layers) + 1, f"{name} blocks")


class _Collector:
    """Statistics of the inputs of a block's matrices."""

    def __init__(self, anatomy: Anatomy, tower: str, of: Sequence[Matrix], kept: dict[str, bool]) -> None:
        self.anatomy, self.tower, self.matrices, self.kept = anatomy, tower, of, kept
        self.stats: dict[str, Inputs] = {}
        self.shared: dict[str, str] = {}  # name of a matrix -> the first that read the same tensor
        self.inputs: dict[str, Tensor] = {}
        self.current: list[tuple[str, Tensor]] = []  # who read what in this batch; holds the tensors, so that ids last
        cross = anatomy.tower(tower).blocks[of[0].layer].sites.get("cross_head")
        self.from_elsewhere = set(cross.inputs[1:]) if cross else set()  # k and v of a cross attention

    def next_batch(self, inputs: dict[str, Tensor]) -> None:
        self.inputs, self.current = inputs, []

    def of(self, matrix: Matrix) -> Inputs:
        return self.stats[self.shared[matrix.name]]

    def watch(self, patches: Patches) -> None:
        for matrix in self.matrices:
            patches.pre_hook(matrix.module, lambda module, args, _m=matrix: self._add(_m, module, args[0]))

    def _add(self, matrix: Matrix, module: nn.Linear, x: Tensor) -> None:
        first = next((name for name, seen in self.current if seen is x), matrix.name)
        if self.shared.setdefault(matrix.name, first) != matrix.name:
            return
        self.current.append((matrix.name, x))
        if matrix.name not in self.stats:
            self.stats[matrix.name] = Inputs(x.shape[-1], x.device, **self.kept)
        self.stats[matrix.name].add(x, self._token_weight(module, x))

    def _token_weight(self, module: nn.Linear, x: Tensor) -> Tensor | None:
        """1 for tokens, 0 for padding [B, T]; None where there is no padding."""
        if self.tower == "vision":
            return None
        mask = self.inputs.get("attention_mask")
        if module in self.from_elsewhere:
            mask = mask if self.tower == "decoder" else None  # of the encoder's text; images have no padding
        elif self.anatomy.family.needs_decoder_ids and self.tower == "decoder":
            mask = self.inputs["labels"] != IGNORED
        # Some layers, such as OPT's, are given all tokens in one row [B * T, in].
        return mask if mask is not None and mask.numel() == x.shape[:-1].numel() else None


@torch.no_grad()
def prune_layerwise(
    anatomy: Anatomy,
    objective: Objective,
    data: Data,
    sparsity: Mapping[str, float],
    selection: Selection,
    progress: Progress | None = None,
) -> None:
    """Zero a share of each named matrix, in place, in the order in which towers and blocks run.

    Raises ValueError, with the model untouched, for a name that is no prunable matrix, a width that the pattern does
    not divide, weights that are not finite, and calibration data on which the model is not finite (naming the row).
    """
    known = {matrix.name: matrix for matrix in used_matrices(anatomy, objective, data)}
    for name in sparsity:
        if name not in known:
            raise ValueError(f"plan: sparsity of {name}: not a prunable matrix that objective {objective.name!r} uses")
    chosen = [known[name] for name in known if name in sparsity]
    check_weights(chosen, selection.pattern)
    check_finite(anatomy, objective, data, selection.batch_size)
    pattern = Pattern.parse(selection.pattern)
    walk = walk_inputs(
        anatomy,
        objective,
        data,
        chosen,
        batch_size=selection.batch_size,
        gram=selection.criterion == "sparsegpt",
        sums=selection.dsnot > 0,
        progress=progress,
    )
    for of_block, inputs in walk:
        for matrix in of_block:
            prune_matrix(
                matrix.weight,
                inputs(matrix),
                sparsity[matrix.name],
                criterion=selection.criterion,
                pattern=pattern,
                scope=selection.scope_of(anatomy, matrix.tower),
                damping=selection.damping,
                dsnot=selection.dsnot,
            )


@torch.no_grad()
def check_finite(anatomy: Anatomy, objective: Objective, data: Data, batch_size: int) -> None:
    """Raises ValueError naming the first row on which the model is not finite."""
    with evaluation_mode(anatomy.model):
        for tower in objective.runs(anatomy):
            outputs = objective.run(anatomy, tower, data, batch_size)
            bad = (~outputs.flatten(1).isfinite().all(1) if outputs.dim() > 1 else ~outputs.isfinite()).nonzero()
            if len(bad):
                raise ValueError(
                    f"data: the model is not finite on row {int(bad[0])} of tower {tower!r} of {data.name}"
                )
