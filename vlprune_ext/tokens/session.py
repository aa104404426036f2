"""`prune_tokens`: the context manager that installs a token method's hooks on a model and removes them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from ..anatomy import Anatomy, describe
from ..anatomy.patch import Patches
from .cross import CrossStream
from .decoder import DecoderStream
from .features import FeatureTap, before, check_projector
from .merging import MergingTower
from .method import POSITIONS, DropTokens, EvictTokens, MergeTokens, PruneTowers, SummariseTokens, TokenMethod, View
from .planned import PlannedTokens
from .pruning import Pruning

_active: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_lock = threading.Lock()


@contextmanager
def prune_tokens(model: nn.Module, method: TokenMethod | None = None) -> Iterator[Pruning]:
    """Prune tokens in every forward and ``generate`` of ``model`` within the ``with`` block.

    Works on batches padded on either side, with several images a sample, with SDPA, eager or flash attention, with or
    without a KV cache; a sample's result does not depend on its batch. Logits and losses keep their shapes. All hooks
    are removed on exit, also after an exception.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A model with images, of a family in `anatomy.FAMILIES`.
    method : TokenMethod, optional
        By default the model's own plan (`Plan.tokens`, as `CoMP` makes it), which prunes nothing if it has none.
        `FastV`, `PyramidDrop`, `VisionZip`, `DivPrune` and `RandomTokens` drop tokens from some block on, `PLPHP` and
        `LookM` evict KV-cache entries after the prefill, `ToMe` merges tokens in the vision tower.

    Yields
    ------
    Pruning
        Which tokens of the latest prompt were kept.

    Raises
    ------
    TypeError
        ``method`` is not a `TokenMethod`.
    ValueError
        A model without visual tokens, a layer out of range, a method that needs a class token or a KV cache of visual
        tokens where there is none, a model whose tokens are being pruned already. Later, within the block: a batch
        without an image, without input_ids, a cache that is not dynamic, gradient checkpointing.
    """
    if method is None:
        method = PlannedTokens.of(model)
    if not isinstance(method, TokenMethod):
        what = f"the class {method.__name__}" if isinstance(method, type) else f"a {type(method).__name__}"
        raise TypeError(f"method is {what}; expected a TokenMethod such as FastV()")
    anatomy = describe(model)
    pruning = Pruning()
    modules = list(model.modules())
    with _lock:
        if not _active.isdisjoint(modules):
            raise ValueError(f"{method.name}: tokens of this model are pruned already; leave the outer `with` first")
        _active.update(modules)
    try:
        with Patches() as patches:
            _install(patches, anatomy, method, pruning)
            yield pruning
    finally:
        with _lock:
            _active.difference_update(modules)


def tokens_are_pruned(model: nn.Module) -> bool:
    """Return whether a model is within ``with prune_tokens(...)``."""
    return any(module in _active for module in model.modules())


def _install(patches: Patches, anatomy: Anatomy, method: TokenMethod, pruning: Pruning) -> None:
    """Register the hooks of a method, by its kind."""
    visual = anatomy.family.visual
    if isinstance(method, PruneTowers):
        method.install(patches, anatomy, pruning)
        return
    if isinstance(method, MergeTokens):
        _merge(patches, anatomy, method, pruning)
        return
    if visual is None:
        raise ValueError(
            f"{method.name}: {type(anatomy.model).__name__} has no language model that reads visual tokens"
        )
    if isinstance(method, EvictTokens):
        if visual.reader:
            raise ValueError(
                f"{method.name}: {type(anatomy.model).__name__} keeps no visual tokens in a key-value cache"
            )
        DecoderStream(anatomy, method, pruning).install(patches)
        return
    assert isinstance(method, DropTokens)
    if method.positions not in POSITIONS:
        raise ValueError(f"positions is {method.positions!r}; expected one of {', '.join(POSITIONS)}")
    if isinstance(method, SummariseTokens):
        check_projector(anatomy, method)
    if visual.reader:
        CrossStream(anatomy, method, pruning).install(patches)
        return
    stream = DecoderStream(anatomy, method, pruning)
    if method.positions == "renumber" and "mrope_section" in (
        getattr(stream.tower.config, "rope_parameters", None) or {}
    ):
        raise ValueError('positions is "renumber"; expected "keep" for positions of time, height and width')
    if isinstance(method, SummariseTokens):
        tap = FeatureTap(anatomy, method)
        tap.install(patches)

        def summarise(states: Tensor) -> Tensor:
            states = tap.summarise(states)
            stream.summary = tap.kept
            return states

        before(patches, anatomy, summarise)
    stream.install(patches)


@dataclass(frozen=True)
class _Representatives(DropTokens):
    """Drop, before the language model, the visual tokens that a vision tower merged into others."""

    of: str = ""  # name of the merging method

    @property
    def name(self) -> str:
        return self.of

    def stages(self, blocks: int) -> dict[int, float]:
        return {0: 1.0}

    def score(self, view: View) -> Tensor:
        assert view.summary is not None
        return view.summary


def _merge(patches: Patches, anatomy: Anatomy, method: MergeTokens, pruning: Pruning) -> None:
    """Register the hooks that merge a vision tower's tokens and drop the merged ones before the language model."""
    if "vision" not in anatomy.towers:
        raise ValueError(f"{method.name}: {type(anatomy.model).__name__} has no vision tower")
    visual = anatomy.family.visual
    tower = MergingTower(anatomy, method, pruning)
    tower.install(patches)
    if visual is None or visual.reader:
        return
    check_projector(anatomy, method)
    stream = DecoderStream(anatomy, _Representatives(method.name), Pruning())

    def spread(states: Tensor) -> Tensor:
        stream.summary = tower.kept()
        return tower.spread(states)

    before(patches, anatomy, spread)
    stream.install(patches)
