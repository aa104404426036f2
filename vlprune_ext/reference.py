"""Reference implementations of ``vlprune_ext.ops`` in plain torch: slow and obviously right, in their inputs' dtype.

Use them to check a result (float64 in, float64 out) or to read what an op computes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "attention_importance",
    "column_norm_sq_",
    "compact_tokens",
    "diverse_tokens",
    "leave_one_out",
    "match_tokens",
    "merge_tokens",
    "nm_mask",
    "normals",
    "perturb",
    "prune_nm_",
    "prune_smallest_",
    "retrieval_rank",
    "select_tokens",
    "share_smallest",
    "smallest_mask",
]


def leave_one_out(
    x: Tensor,  # [N, G*g]
    weight: Tensor,  # [D, G*g]
    base: Tensor,  # [N, D]
    group_size: int,
    groups: Sequence[int] | None = None,
) -> Tensor:  # [V, N, D]
    """Return ``base - x_g @ weight_g.T`` for each group g; see :func:`vlprune_ext.ops.leave_one_out`."""
    if groups is None:
        groups = range(x.shape[1] // group_size)
    out = base.new_empty((len(groups), *base.shape))
    for i, group in enumerate(groups):
        columns = slice(group * group_size, (group + 1) * group_size)
        out[i] = base - x[:, columns] @ weight[:, columns].T
    return out


def retrieval_rank(
    query: Tensor,  # [V, N, D] or [N, D]
    gallery: Tensor,  # [V or 1, M, D] or [M, D]
    positives: Tensor,  # [N] or [N, P]
) -> Tensor:  # [V, N] or [N]
    """Count gallery items of higher score than the best positive; see :func:`vlprune_ext.ops.retrieval_rank`."""
    scores = query @ gallery.transpose(-1, -2)  # [V, N, M] or [N, M]
    rows = positives if positives.dim() == 2 else positives[:, None]
    index = rows.clamp(min=0).expand(*scores.shape[:-1], rows.shape[1])
    of_positives = scores.gather(-1, index).masked_fill(rows < 0, -torch.inf)  # [.., N, P]
    best = of_positives.amax(dim=-1, keepdim=True)
    return (scores > best).sum(dim=-1).to(torch.int32)


def column_norm_sq_(
    acc: Tensor,  # [in]
    x: Tensor,  # [N, in]
    token_weight: Tensor | None = None,  # [N]
) -> Tensor:
    """Add the squared norms of columns to ``acc``; see :func:`vlprune_ext.ops.column_norm_sq_`."""
    x = x.to(acc.dtype)
    return acc.add_(x.square().sum(0) if token_weight is None else (token_weight[:, None] * x.square()).sum(0))


def _scores(weight: Tensor, column_scale: Tensor | None) -> Tensor:
    return weight.float().abs() if column_scale is None else weight.float().abs() * column_scale


def smallest_mask(
    weight: Tensor,  # [out, in]
    column_scale: Tensor | None,  # [in] fp32
    k: int,
    *,
    scope: str = "row",
) -> Tensor:  # [out, in] bool
    """Mark the first k of a stable sort of the scores; see :func:`vlprune_ext.ops.smallest_mask`."""
    scores = _scores(weight, column_scale)
    if scope == "matrix":
        scores = scores.reshape(1, -1)
    order = scores.sort(dim=1, stable=True).indices[:, :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True).view(weight.shape)


def prune_smallest_(weight: Tensor, column_scale: Tensor | None, k: int, *, scope: str = "row") -> Tensor:
    """Zero the first k of a stable sort of the scores; see :func:`vlprune_ext.ops.prune_smallest_`."""
    return weight.masked_fill_(smallest_mask(weight, column_scale, k, scope=scope), 0)


def share_smallest(weights: Sequence[Tensor], column_scales: Sequence[Tensor | None], k: int) -> list[int]:
    """Count each matrix's scores among the first k of one stable sort; see :func:`vlprune_ext.ops.share_smallest`."""
    scores = [_scores(weight, scale).flatten() for weight, scale in zip(weights, column_scales, strict=True)]
    chosen = torch.cat(scores).sort(stable=True).indices[:k]
    bounds = torch.tensor([0, *(score.numel() for score in scores)]).cumsum(0)
    return [int(((chosen >= low) & (chosen < high)).sum()) for low, high in itertools.pairwise(bounds)]


def nm_mask(weight: Tensor, column_scale: Tensor | None, n: int, m: int) -> Tensor:
    """Mark the first n of a stable sort of every m scores; see :func:`vlprune_ext.ops.nm_mask`."""
    groups = _scores(weight, column_scale).view(weight.shape[0], -1, m)
    order = groups.sort(dim=-1, stable=True).indices[..., :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True).view(weight.shape)


def prune_nm_(weight: Tensor, column_scale: Tensor | None, n: int, m: int) -> Tensor:
    """Zero the first n of a stable sort of every m scores; see :func:`vlprune_ext.ops.prune_nm_`."""
    return weight.masked_fill_(nm_mask(weight, column_scale, n, m), 0)


def _philox(counter: Tensor, tensor_id: int, seed: int) -> list[Tensor]:
    """Return four words [n] of Philox4x32-10 (Salmon et al., SC 2011) for each counter [n], as int64 below 2**32."""
    low = 0xFFFFFFFF
    word = [
        counter & low,
        counter >> 32,
        torch.full_like(counter, tensor_id & low),
        torch.full_like(counter, tensor_id >> 32),
    ]
    key = [seed & low, seed >> 32]

    def product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:  # upper and lower 32 bits, by halves to stay below 2**63
        upper, lower = a * (b >> 16), a * (b & 0xFFFF)
        lower = lower + ((upper & 0xFFFF) << 16)
        return (upper >> 16) + (lower >> 32), lower & low

    for _ in range(10):
        high0, low0 = product(0xD2511F53, word[0])
        high1, low1 = product(0xCD9E8D57, word[2])
        word = [high1 ^ word[1] ^ key[0], low1, high0 ^ word[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return word


def normals(count: int, seed: int, tensor_id: int) -> Tensor:
    """Return the z [count] float64 of :func:`vlprune_ext.ops.perturb`, before any rounding to fp32."""
    chunks = -(-count // 64)
    word = _philox(torch.arange(chunks * 16), tensor_id, seed)
    z = []
    for first, second in (word[:2], word[2:]):
        radius = (-2 * (((first >> 1).double() + 0.5) / 2**31).log()).sqrt()
        # The top two bits are the quadrant; the rest, as a signed number, the angle from its middle.
        rest = (second << 2) & 0xFFFFFFFF
        turn = (second >> 30).double() + (rest - ((rest >> 31) << 32)).double() / 2**32
        z += [radius * (turn * math.pi / 2).cos(), radius * (turn * math.pi / 2).sin()]
    return torch.stack(z).view(4, chunks, 16).transpose(0, 1).reshape(-1)[:count]


def perturb(weight: Tensor, seed: int, tensor_id: int, eps: float) -> tuple[Tensor, Tensor]:
    """Return ``weight + eps z`` and ``weight - eps z``; see :func:`vlprune_ext.ops.perturb`."""
    change = eps * normals(weight.numel(), seed, tensor_id).view(weight.shape)
    return (weight.double() + change).to(weight.dtype), (weight.double() - change).to(weight.dtype)


def attention_importance(
    q: Tensor,  # [B, H, Tq, d]
    k: Tensor,  # [B, Hkv, Tk, d]
    lse: Tensor,  # [B, H, Tq]
    *,
    head_weight: Tensor | None = None,  # [B or 1, H]
    query_weight: Tensor | None = None,  # [B, Tq]
    reduce: str = "sum",
    causal: bool = False,
    key_mask: Tensor | None = None,  # [B, Tk] bool
    scale: float | None = None,
) -> Tensor:  # [B, Tk]
    """Reduce the full attention map over heads and queries; see :func:`vlprune_ext.ops.attention_importance`."""
    queries, keys = q.shape[2], k.shape[2]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q.shape[-1] ** -0.5 if scale is None else scale) * (q @ k.transpose(-1, -2))  # [B, H, Tq, Tk]
    visible = (lse > -torch.inf)[..., None].expand(scores.shape)
    if causal:
        visible = visible & torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    if key_mask is not None:
        visible = visible & key_mask[:, None, None]
    p = (scores - lse[..., None]).exp().masked_fill(~visible, 0)
    if head_weight is not None:
        p = head_weight[..., None, None] * p
    of_heads = p.sum(1) if reduce == "sum" else p.amax(1)  # [B, Tq, Tk]
    return (of_heads if query_weight is None else query_weight[..., None] * of_heads).sum(1)


def select_tokens(
    score: Tensor,  # [B, T]
    keep: int,
    protected: Tensor | None = None,  # [B, T] bool
) -> Tensor:  # [B, keep] int64
    """Return the first of a stable sort, as ascending positions; see :func:`vlprune_ext.ops.select_tokens`."""
    nan = score.isnan()
    plain = score.masked_fill(nan, -torch.inf) + 0  # no -0, which a sort on CUDA tells from +0
    order = plain.sort(dim=1, descending=True, stable=True).indices
    # Stable sorts from the least to the most significant key.
    for later in (nan,) if protected is None else (nan, ~protected):
        order = order.gather(1, later.gather(1, order).to(torch.uint8).sort(dim=1, stable=True).indices)
    return order[:, :keep].sort(dim=1).values


def diverse_tokens(
    x: Tensor,  # [B, T, d]
    keep: int | Tensor,  # or [B] int64
    *,
    candidate: Tensor | None = None,  # [B, T] bool
) -> Tensor:  # [B, T] bool
    """Select tokens by greedy max-min cosine distance, one at a time; see :func:`vlprune_ext.ops.diverse_tokens`."""
    samples, tokens, _ = x.shape
    kept = torch.zeros(samples, tokens, dtype=torch.bool, device=x.device)
    candidate = torch.ones_like(kept) if candidate is None else candidate
    for b, count in enumerate(torch.as_tensor(keep).expand(samples).tolist()):
        norm = x[b].norm(dim=-1, keepdim=True)
        unit = x[b] / norm.where(norm > 0, 1)
        comparable = candidate[b] & norm[:, 0].isfinite()
        similarity = unit @ unit.T
        others = comparable.repeat(tokens, 1).fill_diagonal_(False)
        for _ in range(min(count, int(candidate[b].sum()))):
            closest = similarity.masked_fill(~others, -torch.inf).amax(1)
            closest = closest.masked_fill(~comparable, torch.inf)  # ranked behind all comparable tokens
            left = (candidate[b] & ~kept[b]).nonzero()[:, 0]
            kept[b, left[closest[left].argmin()]] = True
            others = (comparable & kept[b]).repeat(tokens, 1)  # after the first, distances to kept tokens only
    return kept


def compact_tokens(
    index: Tensor,  # [B, K]
    tensors: Sequence[Tensor],  # [B or 1, .., T, ..]
    dims: Sequence[int] | None = None,
) -> list[Tensor]:  # [B, .., K, ..]
    """Gather tokens of each tensor; see :func:`vlprune_ext.ops.compact_tokens`."""
    batch, keep = index.shape
    out = []
    for tensor, dim in zip(tensors, [1] * len(tensors) if dims is None else dims, strict=True):
        place = dim % tensor.dim()
        shape = [batch, *tensor.shape[1:]]
        shape[place] = keep
        where = index.reshape(batch, *[1] * (place - 1), keep, *[1] * (tensor.dim() - place - 1)).expand(shape)
        out.append(tensor.expand(batch, *tensor.shape[1:]).gather(place, where))
    return out


def match_tokens(
    key: Tensor,  # [B, T, d]
    target: Tensor,  # [B, T] bool
    *,
    source: Tensor | None = None,  # [B, T] bool
) -> tuple[Tensor, Tensor]:  # [B, T], [B, T] int64
    """Return the maximum over the matrix of all cosines; see :func:`vlprune_ext.ops.match_tokens`."""
    source = ~target if source is None else source
    length = key.norm(dim=-1, keepdim=True)
    direction = key / length.where(length != 0, 1)
    cosine = direction @ direction.transpose(1, 2)  # [B, T, T]
    itself = torch.eye(key.shape[1], dtype=torch.bool, device=key.device)
    possible = source[:, :, None] & target[:, None, :] & ~itself & ~cosine.isnan()
    if key.shape[1] == 0:
        return cosine.sum(2), target.long()
    similarity, match = cosine.masked_fill(~possible, -torch.inf).max(dim=2)
    return similarity, match.masked_fill(similarity == -torch.inf, -1)


def merge_tokens(
    index: Tensor,  # [B, K]
    match: Tensor,  # [B, T]
    tensors: Sequence[Tensor],  # [B or 1, .., T, ..]
    *,
    size: Tensor | None = None,  # [B, T]
    dims: Sequence[int] | None = None,
) -> tuple[list[Tensor], Tensor]:  # [B, .., K, ..], [B, K]
    """Average tokens one after another, in fp32 at least; see :func:`vlprune_ext.ops.merge_tokens`."""
    size = torch.ones(match.shape, dtype=torch.float32, device=match.device) if size is None else size
    out, total = compact_tokens(index, tensors, dims), size.gather(1, index)
    dropped = torch.ones_like(match, dtype=torch.bool).scatter_(1, index, False)
    for (b, k), kept in zip(itertools.product(*map(range, index.shape)), index.flatten().tolist(), strict=True):
        merging = (dropped[b] & (match[b] == kept) & (size[b] != 0)).nonzero().flatten().tolist()
        for t in merging:
            total[b, k] += size[b, t]
        for i, tensor in enumerate(tensors if merging else ()):
            place = 1 if dims is None else dims[i] % tensor.dim()
            x = tensor[b if tensor.shape[0] > 1 else 0].movedim(place - 1, 0)  # [T, ..]
            x = x if x.dtype == torch.float64 else x.float()
            mean = size[b, kept] * x[kept] if size[b, kept] != 0 else torch.zeros_like(x[kept])
            for t in merging:
                mean = mean + size[b, t] * x[t]
            out[i].movedim(place, 1)[b, k] = (mean / total[b, k]).to(tensor.dtype)
    return out, total
