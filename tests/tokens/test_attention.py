"""What keys receive, beside whole attention maps, on every device: each has a log-sum-exp of its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vlprune_ext.tokens.attention import _KeepLse, from_all, from_rows


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


MASKS = {
    "none": lambda: {},
    "causal": lambda: {"is_causal": True},
    "bool": lambda: {"attn_mask": torch.rand(2, 1, 9, 9) < 0.8},
    "additive": lambda: {"attn_mask": torch.rand(2, 1, 1, 9).log()},
}


@pytest.mark.parametrize("kind", MASKS)
def test_the_log_sum_exp_of_what_runs(kind):
    """The attention and its gradients are as ever, bit by bit, and its log-sum-exp comes with it."""
    given = MASKS[kind]()
    if "attn_mask" in given:
        given["attn_mask"][..., 0] = True if kind == "bool" else 0.0  # each query sees some key
    heads = [torch.randn(2, 3, 9, 8, requires_grad=True) for _ in range(3)]
    expected = F.scaled_dot_product_attention(*heads, scale=0.4, **given)
    with _KeepLse() as kept:
        found = F.scaled_dot_product_attention(*heads, scale=0.4, **given)
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(out.square().sum(), heads) for out in (found, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    scores = 0.4 * heads[0].detach().double() @ heads[1].detach().double().mT
    mask = given.get("attn_mask", torch.ones(9, 9).tril().bool() if kind == "causal" else torch.zeros(1))
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    torch.testing.assert_close(kept.lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("given", [{"dropout_p": 0.5}, {"enable_gqa": True}], ids=["dropout", "grouped"])
def test_no_log_sum_exp(given):
    """Of an attention that computes none, or not that of each query head."""
    query, key = torch.randn(2, 4, 9, 8), torch.randn(2, 2 if "enable_gqa" in given else 4, 9, 8)
    with _KeepLse() as kept:
        F.scaled_dot_product_attention(query, query, query)
        assert kept.lse is not None
        torch.manual_seed(3)
        found = F.scaled_dot_product_attention(query, key, key, **given)
    assert kept.lse is None
    torch.manual_seed(3)
    assert torch.equal(found, F.scaled_dot_product_attention(query, key, key, **given))


def test_no_log_sum_exp_under_autocast():
    """Autocast makes queries, keys and values one dtype only after they came here."""
    query, key, value = torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8).bfloat16()
    with torch.autocast("cpu"), _KeepLse() as kept:
        found = F.scaled_dot_product_attention(query, key, value)
    assert kept.lse is None
    assert found.dtype == torch.bfloat16
