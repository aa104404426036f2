"""CoMP's importance metric against its equations in plain torch."""

from __future__ import annotations

import pytest
import torch

from vlprune_ext.comp import ChannelImportance, token_importance, token_weights


def attention(q, k, causal=False, key_mask=None):
    """The whole map [B, H, Tq, T] in float64, and its log-sum-exp."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = q.double() @ k.double().mT * q.shape[-1] ** -0.5
    if causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:]).triu(1).bool(), -torch.inf)
    if key_mask is not None:
        logits = logits.masked_fill(~key_mask[:, None, None], -torch.inf)
    return logits.softmax(-1), logits.logsumexp(-1).float()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_tokens(heads, causal):
    """Eqs. (6) and (7): the greatest attention of any head that is there, summed over who asks, normalised."""
    q, k = (torch.randn(2, h, 17, 8) for h in heads)
    weights, lse = attention(q, k, causal)
    mask = torch.tensor([1.0, 0.0, 0.3, 1.0])
    for head_mask, weighed in ((None, weights), (mask, weights * mask.double()[:, None, None])):
        expected = weighed.amax(1).sum(1)
        expected /= expected.sum(1, keepdim=True)
        found = token_importance(q, k, lse, head_mask=head_mask, causal=causal)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found.sum(1), torch.ones(2))


def test_a_pruned_head_does_not_vote():
    """Masked after the softmax it is as if it were not there; masked before, it would flatten the ranking."""
    q, k = torch.randn(1, 3, 9, 8), torch.randn(1, 3, 9, 8)
    _, lse = attention(q, k)
    without = token_importance(q[:, 1:], k[:, 1:], lse[:, 1:])
    masked = token_importance(q, k, lse, head_mask=torch.tensor([0.0, 1.0, 1.0]))
    torch.testing.assert_close(masked, without)


def test_padding_neither_asks_nor_counts():
    q, k = torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[1, 5:] = False
    _, lse = attention(q, k, key_mask=valid)
    found = token_importance(q, k, lse, query_mask=valid, key_weight=valid.float())
    _, alone_lse = attention(q[1:, :, :5], k[1:, :, :5])
    torch.testing.assert_close(found[1:, :5], token_importance(q[1:, :, :5], k[1:, :, :5], alone_lse))
    assert found[1, 5:].tolist() == [0.0, 0.0]


def test_a_fading_token_counts_less():
    """As a key of the attention that runs, whose shares the others then have more of."""
    q, k = torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    times = torch.rand(2, 7)
    times[1, 5:] = 0.0
    asks = times > 0
    weighed, _ = attention(q, k)
    weighed = weighed * times[:, None, None].double()
    total = weighed.sum(-1, keepdim=True)
    expected = ((weighed / total).amax(1) * asks[..., None]).sum(1)
    logits = q.double() @ k.double().mT * 8**-0.5 + times.double().log()[:, None, None]
    found = token_importance(q, k, logits.logsumexp(-1).float(), query_mask=asks, key_weight=times)
    torch.testing.assert_close(found.double(), expected / expected.sum(1, keepdim=True), rtol=1e-5, atol=1e-7)


def test_no_head_is_left():
    q, k = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    found = token_importance(q, k, attention(q, k)[1], head_mask=torch.zeros(2))
    assert found.tolist() == [[0.0] * 5]


def test_weights_of_tokens():
    """Eq. (4): 1 for the class token, the share of the rest for each other; without a class token, shares."""
    scores = torch.tensor([[0.5, 0.1, 0.3, 0.1]])
    torch.testing.assert_close(token_weights(scores, cls=1), torch.tensor([[1.0, 0.2, 0.6, 0.2]]))
    torch.testing.assert_close(token_weights(2 * scores), scores)
    assert token_weights(torch.zeros(1, 3), cls=1).tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize("weighed", [False, True])
def test_channels(weighed):
    """Eqs. (3) and (4), over batches of different sizes."""
    weight = torch.randn(6, 10)
    batches = [torch.randn(3, 5, 10), torch.randn(2, 5, 10)]
    weights = [torch.rand(3, 5), torch.rand(2, 5)] if weighed else None
    x = torch.cat(batches).double()
    w = torch.cat(weights).double() if weighed else torch.ones(5, 5).double()
    norm = ((w[..., None] * x**2).sum((0, 1)) / 5).sqrt()
    expected = torch.stack([sum(weight[j, i].double().abs() * norm[i] for j in range(6)) / 6 for i in range(10)])
    channels = ChannelImportance(weight)
    for place, batch in enumerate(batches):
        channels.add(batch, weights[place] if weighed else None)
    found = channels.value()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_channels_of_nothing():
    with pytest.raises(ValueError, match="activations: none came"):
        ChannelImportance(torch.randn(2, 3)).value()
