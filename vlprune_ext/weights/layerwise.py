"""Layer-wise pruning: block after block, each on the activations that the pruned blocks before it produce."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import _native
from ..anatomy import IGNORED, Anatomy
from ..anatomy.linears import check_linears
from ..anatomy.patch import Patches, evaluation_mode
from ..data import Data
from ..objectives import Objective
from ..progress import Progress
from ..replay import Replay
from .criteria import Inputs, Pattern, check_criterion, prune_matrix
from .matrices import Matrix, matrices


@dataclass(frozen=True)
class Selection:
    """Select which weights of a matrix are pruned.

    Parameters
    ----------
    criterion : {"wanda", "magnitude", "ria", "sparsegpt"}
        Importance score of a weight.
    pattern : str
        "unstructured", or "n:m" for n zeros in every m.
    scope : {"row", "matrix"}, optional
        Weights that compete: those of a row, so that every row has the same sparsity, or of the whole matrix. None:
        rows, but matrices in the vision tower of a model that generates (the published choices). SparseGPT has its own:
        blocks of 128 columns.
    damping : float
        SparseGPT's damping, as a share of the mean diagonal of X^T X, in (0, 1).
    dsnot : int
        Weights of each row that DSnoT may exchange for pruned ones (arXiv 2310.08915; there, 50).
    batch_size : int
        Calibration rows run at once.
    objective : str, optional
        Name of the objective whose data runs through the model.
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
        """Return the scope in a tower: ``scope`` if given, else the published choice.

        Parameters
        ----------
        anatomy : Anatomy
            The model.
        tower : str
            One of its towers.

        Returns
        -------
        str
            "row" or "matrix".
        """
        if self.scope is not None:
            return self.scope
        return "matrix" if tower == "vision" and anatomy.family.head else "row"


def check_weights(chosen: Sequence[Matrix], pattern: str = "unstructured") -> None:
    """Raise ValueError naming the first matrix that cannot be pruned.

    Parameters
    ----------
    chosen : sequence of Matrix
        Matrices to check.
    pattern : str
        "unstructured" or "n:m".

    Raises
    ------
    ValueError
        Weights that are not fp32, fp16 or bf16, or not finite, or a width that m does not divide.
    """
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
    """List the prunable matrices that run when the objective is computed; cross-attention may not.

    Parameters
    ----------
    anatomy : Anatomy
        The model.
    objective : Objective
        Decides what each tower is fed.
    data : Data
        Calibration data, of which one row is run.
    towers : sequence of str, optional
        Towers to look at. None: all that the objective sees.

    Returns
    -------
    list of Matrix
        In the order of `matrices`.

    Raises
    ------
    ValueError
        A tower without prunable matrices, or a matrix that `check_linears` refuses.
    """
    towers = objective.towers(anatomy) if towers is None else towers
    check_linears(anatomy, towers)
    found = matrices(anatomy, towers)
    seen: set[str] = set()
    for tower in dict.fromkeys(matrix.tower for matrix in found):
        with Patches() as patches, evaluation_mode(anatomy.model):
            for matrix in found:
                patches.pre_hook(matrix.module, lambda _, __, _n=matrix.name: seen.add(_n))
            objective.outputs(anatomy, tower, objective.batches(anatomy, tower, data.subset(1), 1)[0])
    return [matrix for matrix in found if matrix.name in seen]


def _by_layer(chosen: Sequence[Matrix]) -> dict[int, list[Matrix]]:
    """Group matrices by layer."""
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
    """Yield the matrices of each block and their input statistics, tower by tower in the order in which towers run.

    The caller may change a block's weights before it asks for the next: later blocks see the activations that result.
    Padding is excluded; layers that read the same tensor (q, k and v; gate and up) share their statistics.

    Parameters
    ----------
    anatomy : Anatomy
        The model.
    objective : Objective
        Decides what each tower is fed.
    data : Data
        Calibration data.
    chosen : sequence of Matrix
        Matrices to yield.
    batch_size : int
        Rows run at once.
    gram, sums : bool
        Also accumulate X^T X, and the column sums (`Inputs`).
    progress : Progress, optional
        Called after each block.

    Yields
    ------
    tuple of (list of Matrix, callable)
        One block's matrices, and a function from each of them to its `Inputs`.
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
    """Collect the input statistics of a block's matrices with pre-hooks."""

    def __init__(self, anatomy: Anatomy, tower: str, of: Sequence[Matrix], kept: dict[str, bool]) -> None:
        self.anatomy, self.tower, self.matrices, self.kept = anatomy, tower, of, kept
        self.stats: dict[str, Inputs] = {}
        self.shared: dict[str, str] = {}  # matrix -> the first matrix that read the same tensor
        self.inputs: dict[str, Tensor] = {}
        self.current: list[
            tuple[str, Tensor]
        ] = []  # (matrix, its input) of this batch; holds the tensors, so that identity is safe
        cross = anatomy.tower(tower).blocks[of[0].layer].sites.get("cross_head")
        self.from_elsewhere = set(cross.inputs[1:]) if cross else set()  # k and v of a cross attention

    def next_batch(self, inputs: dict[str, Tensor]) -> None:
        """Start the batch with these model inputs."""
        self.inputs, self.current = inputs, []

    def of(self, matrix: Matrix) -> Inputs:
        """Return the statistics of a matrix."""
        return self.stats[self.shared[matrix.name]]

    def watch(self, patches: Patches) -> None:
        """Register the pre-hooks."""
        for matrix in self.matrices:
            patches.pre_hook(matrix.module, lambda module, args, _m=matrix: self._add(_m, module, args[0]))

    def _add(self, matrix: Matrix, module: nn.Linear, x: Tensor) -> None:
        """Add a batch of one matrix' inputs, unless another matrix read the same tensor."""
        first = next((name for name, seen in self.current if seen is x), matrix.name)
        if self.shared.setdefault(matrix.name, first) != matrix.name:
            return
        self.current.append((matrix.name, x))
        if matrix.name not in self.stats:
            self.stats[matrix.name] = Inputs(x.shape[-1], x.device, **self.kept)
        self.stats[matrix.name].add(x, self._token_weight(module, x))

    def _token_weight(self, module: nn.Linear, x: Tensor) -> Tensor | None:
        """Return the token weights [B, T], 1 for tokens and 0 for padding; None without padding."""
        if self.tower == "vision":
            return None
        mask = self.inputs.get("attention_mask")
        if module in self.from_elsewhere:
            mask = mask if self.tower == "decoder" else None  # encoder text is masked; image features have no padding
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
    """Prune each named matrix to its sparsity, in place, in the order in which towers and blocks run.

    Parameters
    ----------
    anatomy : Anatomy
        The model.
    objective : Objective
        Decides what each tower is fed.
    data : Data
        Calibration data.
    sparsity : mapping of str to float
        Parameter name -> share of its entries that become zero.
    selection : Selection
        The criterion and its settings.
    progress : Progress, optional
        Called after each block.

    Raises
    ------
    ValueError
        A name that is no prunable matrix, a width that the pattern does not divide, weights that are not finite, or
        calibration data on which the model is not finite (naming the row); the model is then unchanged.
    """
    named = [
        name
        for name in objective.towers(anatomy)
        if any(parameter.startswith(f"{anatomy.tower(name).prefix}.") for parameter in sparsity)
    ]
    known = {matrix.name: matrix for matrix in used_matrices(anatomy, objective, data, named)}
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
    """Raise ValueError naming the first row of data on which the model's outputs are not finite.

    Parameters
    ----------
    anatomy : Anatomy
        The model.
    objective : Objective
        Decides what each tower is fed.
    data : Data
        Calibration data.
    batch_size : int
        Rows run at once.
    """
    with evaluation_mode(anatomy.model):
        for tower in objective.runs(anatomy):
            outputs = objective.run(anatomy, tower, data, batch_size)
            bad = (~outputs.flatten(1).isfinite().all(1) if outputs.dim() > 1 else ~outputs.isfinite()).nonzero()
            if len(bad):
                raise ValueError(
                    f"data: the model is not finite on row {int(bad[0])} of tower {tower!r} of {data.name}"
                )
