"""CoMP's masks written a second time: eager models, and one softmax in float64 for all of their attentions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from models import tiny
from tokens import oracle
from torch import Tensor

from vlprune_ext.anatomy import describe

NAMES = ("clip", "blip_vqa", "llava", "paligemma")
CLS = {"clip": {"vision": 1}, "blip_vqa": {"vision": 1, "text": 1}, "llava": {"vision": 1}, "paligemma": {}}
POOLED = ("clip",)  # nothing reads the tokens of a tower's last block but the pooled one
READ = {"llava": {"vision": 3}}  # of four blocks
HARD = {"vision": {"going": 0.09, "gone": 0.09, "soft": 0.0}, "text": {"going": 0.06, "gone": 0.06, "soft": 0.0}}
KEEP = {
    "vision": {"keep": [0.9, 0.7, 0.4, 0.4]},
    "text": {"keep": [0.8, 0.6, 0.5, 0.3]},
}
GAP = 1e-6  # between an importance and a threshold, so that rounding cannot change a choice

Limits = dict[str, dict]  # tower -> {"going", "gone", "soft"}, or {"keep": [share of each block]}


def inputs(name: str, n: int = 3, seed: int = 0, *, labels: bool = True) -> dict[str, Tensor]:
    """Padded on the right."""
    values = tiny.inputs(name, oracle.model(name), n, seed)
    if not labels:
        values.pop("labels", None)
        if "token_type_ids" in values:
            values["token_type_ids"] = torch.zeros_like(values["token_type_ids"])
    return values


def schedules(name, limits):
    """`Plan.tokens` of limits that are not soft."""
    anatomy = describe(oracle.model(name))
    found = {}
    for tower, limit in limits.items():
        keep = limit.get("keep")
        found[tower] = {"threshold": limit["gone"]} if keep is None else {"keep": keep[: len(anatomy.tower(tower))]}
    return found


def run(name: str, model, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is read off a model: embeddings, or a loss and the logits of text."""
    with torch.no_grad():
        out = model(**values)
    if name == "clip":
        return {"image": out.image_embeds, "text": out.text_embeds}
    found = {} if out.get("loss") is None else {"loss": out.loss}
    if name == "blip_vqa":
        return found
    text = values["attention_mask"].bool() & (values["input_ids"] != tiny.IMAGE)
    return found | {"logits": out.logits[text]}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in found.items():
        oracle.close(value, expected[key])


def differ(found: dict[str, Tensor], expected: dict[str, Tensor], by: float = 1e-3) -> None:
    assert any(float((found[key] - expected[key]).abs().max()) > by for key in found)


@dataclass
class Eager:
    """An eager model whose keys count as masks say, and whose tokens and units leave as CoMP's equations say.

    votes  (tower, layer) -> [query heads]
    units  (tower, layer, kind) -> [units], by which slices of what enters an output projection are multiplied
    """

    name: str
    limits: Limits = field(default_factory=dict)
    votes: dict = field(default_factory=dict)
    units: dict = field(default_factory=dict)
    importance: dict[tuple[str, int], Tensor] = field(default_factory=dict, init=False)
    entered: dict[tuple[str, int], Tensor] = field(default_factory=dict, init=False)  # alive, [B, T] bool
    masks: dict[str, Tensor] = field(default_factory=dict, init=False)  # tower -> [B, T], as they are now
    doors: dict[str, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.model = oracle.model(self.name, "eager")
        self.anatomy = describe(self.model)
        self.memory = {"text": "vision", "decoder": "text"} if self.name == "blip_vqa" else {}

    def __call__(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        with self.installed(values):
            return run(self.name, self.model, values)

    @contextmanager
    def installed(self, values: dict[str, Tensor]) -> Iterator[None]:
        """Every softmax of an attention is ours."""
        self.importance, self.entered, self.masks = {}, {}, {}
        self.doors = doors(self.name, values)
        handles, running, plain = [], [], F.softmax
        for tower_name, tower in self.anatomy.towers.items():
            for layer, block in enumerate(tower.blocks):
                for kind, site in block.sites.items():
                    key = (tower_name, layer, kind)
                    if key in self.units:
                        times = self.units[key].repeat_interleave(site.width)
                        handles.append(site.out.register_forward_pre_hook(lambda _, a, t=times: (a[0] * t, *a[1:])))
                    if kind != "neurons":
                        enter = lambda *_, k=key: running.append(k)  # noqa: E731
                        handles.append(site.attention.register_forward_pre_hook(enter))

        def softmax(scores: Tensor, dim: int = -1, **kwargs) -> Tensor:
            return self.attend(*running.pop(), scores) if running else plain(scores, dim=dim, **kwargs)

        F.softmax = softmax
        try:
            yield
        finally:
            F.softmax = plain
            for handle in handles:
                handle.remove()

    def attend(self, tower: str, layer: int, kind: str, scores: Tensor) -> Tensor:
        """A of scores [B, H, Tq, Tk] which already hold what nobody may see."""
        source = self.memory[tower] if kind == "cross_head" else tower
        if kind == "head" and tower in self.doors and layer == 0:
            self.begin(tower)
        # While nothing leaves, BLIP's decoder reads the padding of questions too: transformers loses that mask.
        counts = self.masks.get(source) if kind == "head" or source in self.limits else None
        weights = (scores.double() - scores.double().amax(-1, keepdim=True)).exp()
        if counts is not None:
            copies = scores.shape[0] // counts.shape[0]
            weights = weights * counts.repeat_interleave(copies, 0)[:, None, None].double()
        if kind == "head" and tower in self.doors:
            self.judge(tower, layer, scores.detach().double())
        total = weights.sum(-1, keepdim=True)
        return torch.where(total > 0, weights / total, 0.0).to(scores.dtype)

    def begin(self, tower: str) -> None:
        valid, free, _ = self.doors[tower]
        self.masks[tower] = valid.double()
        if self.name in ("llava", "paligemma") and tower == "text" and "vision" in self.limits:
            seen = self.masks["vision"][:, CLS[self.name].get("vision", 0) :].flatten()
            self.masks[tower][free] = seen  # as many patches as placeholders, in order

    def judge(self, tower: str, layer: int, scores: Tensor) -> None:
        """Eqs. (6), (7) and (1)."""
        valid, free, asks = self.doors[tower]
        alive = valid & (self.masks[tower] > 0)
        self.entered[tower, layer] = alive
        there = alive & asks
        attention = scores.masked_fill(~there[:, None, None], -torch.inf).exp() * self.masks[tower][:, None, None]
        attention = (attention / attention.sum(-1, keepdim=True)).nan_to_num()
        votes = self.votes.get((tower, layer))
        if votes is not None:
            attention = attention * votes.double()[:, None, None]
        received = (attention.amax(1) * there[..., None]).sum(1) * there
        total = received.sum(1, keepdim=True)
        worth = torch.where(total > 0, received / total, received)
        self.importance[tower, layer] = worth
        read = READ.get(self.name, {}).get(tower, len(self.anatomy.tower(tower).blocks))
        if tower in self.limits and layer < read - (self.name in POOLED):
            for b in range(len(worth)):
                self.leave(tower, layer, b, worth[b], free[b], alive[b])

    def leave(self, tower: str, layer: int, b: int, worth: Tensor, free: Tensor, alive: Tensor) -> None:
        limit, mask = self.limits[tower], self.masks[tower][b]
        movable = [i for i in range(len(worth)) if free[i] and alive[i]]
        ranked = sorted(movable, key=lambda i: (-float(worth[i]), i))
        if "keep" in limit:
            stay = oracle.share(limit["keep"][layer], int(free.sum()))
            for i in ranked[stay:]:
                mask[i] = 0.0
            return
        for i in ranked:
            if worth[i] == worth[ranked[0]]:  # the best stays, and where nobody has a say all are that
                continue
            for cut in (limit["going"], limit["gone"]):
                assert abs(float(worth[i]) - cut) > GAP, "a choice that rounding decides"
            if worth[i] <= limit["gone"]:
                mask[i] = 0.0
            elif worth[i] <= limit["going"]:
                mask[i] *= limit["soft"]


def doors(name: str, values: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Tower -> (valid, free to leave, asks), [B, T] bool each."""
    images = len(values["pixel_values"])
    cls = CLS[name].get("vision", 0)
    patches = torch.ones(images, tiny.PATCHES + cls, dtype=torch.bool)
    not_class = patches.clone()
    not_class[:, :cls] = False
    ids, valid = values["input_ids"], values["attention_mask"].bool()
    if name == "clip":
        free, asks = valid & (ids != tiny.EOS), valid
    elif name == "blip_vqa":
        free, asks = valid.clone(), valid
        free[:, 0] = False
    else:
        free, asks = ids == tiny.IMAGE, valid.clone()
        for b, row in enumerate(oracle.asking(values)):
            asks[b, row + 1 :] = False
    return {"vision": (patches, not_class, patches), "text": (valid, free, asks)}
