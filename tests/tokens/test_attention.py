"""What keys receive, beside whole attention maps, on every device: each has a log-sum-exp of its own."""

from __future__ import annotations

import pytest
import torch

from vlprune_ext.tokens.attention import from_all, from_rows


def attention_map(query, key, scale, visible):
    """[B, H, Tq, Tk] fp64; 0 in rows that see no key."""
    key = key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = (scale * query.double() @ key.mT).masked_fill(~visible, -torch.inf)
    return scores.softmax(-1).nan_to_num(0)


def by_key_head(attention, key, query_weight=None):
    """[B, Hkv, Tk] fp64."""
    weighed = attention if query_weight is None else attention * query_weight[:, None, :, None]
    return weighed.sum(2).unflatten(1, (key.shape[1], -1)).sum(2)


def heads(b, tokens, h, d, dtype, device):
    """[B, H, T, d], as a projection gives them."""
    return torch.randn(b, tokens, h, d, device=device).to(dtype).transpose(1, 2)


@pytest.mark.parametrize("keys", [5, 16, 37, 577])
@pytest.mark.parametrize("d", [8, 64, 80])
def test_from_rows(keys, d, dtype, device):
    """Of a padded batch, one sample of which holds nothing."""
    query, key = heads(3, 3, 4, d, dtype, device), heads(3, keys, 2, d, dtype, device)
    mask = torch.rand(3, keys, device=device) < 0.7
    mask[0], mask[2] = True, False
    weight = torch.rand(3, 3, device=device)
    for key_mask, query_weight in ((None, None), (mask, weight)):
        actual = from_rows(query, key, d**-0.5, key_mask, query_weight)
        visible = torch.ones_like(mask) if key_mask is None else key_mask
        expected = by_key_head(attention_map(query, key, d**-0.5, visible[:, None, None]), key, query_weight)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alike", [True, False])
def test_from_all(alike, dtype, device):
    """Padding on either side, prefixes of different lengths."""
    query, key = heads(3, 45, 4, 16, dtype, device), heads(3, 45, 2, 16, dtype, device)
    first, last, prefix = ([0] * 3, [45] * 3, [7] * 3) if alike else ([0, 5, 0], [45, 45, 38], [0, 9, 38])
    actual = from_all(query, key, 0.25, list(zip(first, last, strict=True)), prefix)
    for b, (start, stop) in enumerate(zip(first, last, strict=True)):
        inside = slice(start, stop)
        here = torch.arange(stop - start, device=device)
        visible = (here[:, None] >= here) | ((here[:, None] < prefix[b]) & (here < prefix[b]))
        part = key[b : b + 1, :, inside]
        expected = by_key_head(attention_map(query[b : b + 1, :, inside], part, 0.25, visible), part)
        torch.testing.assert_close(actual[b : b + 1, :, inside].double(), expected, rtol=1e-4, atol=1e-4)
        assert not actual[b, :, :start].any()
        assert not actual[b, :, stop:].any()
