"""What goes from one matrix, against plain torch."""

from __future__ import annotations

import pytest
import torch

from vlprune_ext.weights.criteria import CRITERIA, Inputs, Pattern, exchange, prune_matrix, relative_importance

PATTERNS = {"unstructured": Pattern(), "2:4": Pattern(2, 4), "1:8": Pattern(1, 8), "3:5": Pattern(3, 5)}


def case(seed: int, out: int = 24, width: int = 40, rows: int = 200, correlated: bool = True):
    """(weight, x): inputs of columns of very different size that hang together."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator)
    if correlated:
        common = torch.randn(rows, width // 4, generator=generator)
        x = 0.5 * x + common @ torch.randn(width // 4, width, generator=generator) / (width // 4) ** 0.5
    x = x * (0.2 + 3 * torch.rand(width, generator=generator))
    return 0.2 * torch.randn(out, width, generator=generator), x


def inputs_of(x, weight=None, gram=True) -> Inputs:
    inputs = Inputs(x.shape[-1], x.device, gram=gram)
    for part in range(0, len(x), 64):
        inputs.add(x[part : part + 64], None if weight is None else weight[part : part + 64])
    return inputs


def run(weight, x, sparsity=0.5, pattern="unstructured", **fields):
    weight = weight.clone()
    fields = {"criterion": "wanda", "scope": "row", **fields}
    prune_matrix(weight, None if x is None else inputs_of(x), sparsity, pattern=PATTERNS[pattern], **fields)
    return weight


def least(scores, sparsity, pattern, scope):
    """[out, in] bool: the first of a stable sort."""
    if pattern != "unstructured":
        n, m = map(int, pattern.split(":"))
        groups = scores.view(len(scores), -1, m)
        order = groups.sort(dim=2, stable=True).indices[..., :n]
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, order, True).view(scores.shape)
    lines = scores if scope == "row" else scores.view(1, -1)
    order = lines.sort(dim=1, stable=True).indices[:, : round(sparsity * lines.shape[1])]
    return torch.zeros_like(lines, dtype=torch.bool).scatter_(1, order, True).view(scores.shape)


def transcribed(criterion, weight, x):
    size = weight.abs()
    norm = x.square().sum(0).sqrt()
    if criterion == "wanda":
        return size * norm
    if criterion == "ria":
        return (size / size.sum(0) + size / size.sum(1, keepdim=True)) * norm.sqrt()
    return size


@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.87, 1.0])
@pytest.mark.parametrize("criterion", ["wanda", "magnitude", "ria"])
def test_unstructured(criterion, sparsity, scope):
    weight, x = case(1)
    gone = least(transcribed(criterion, weight, x), sparsity, "unstructured", scope)
    result = run(weight, None if criterion == "magnitude" else x, sparsity, criterion=criterion, scope=scope)
    assert torch.equal(result, weight.masked_fill(gone, 0))


@pytest.mark.parametrize("pattern", ["2:4", "1:8", "3:5"])
@pytest.mark.parametrize("criterion", ["wanda", "magnitude", "ria"])
def test_patterns(criterion, pattern):
    weight, x = case(2)
    gone = least(transcribed(criterion, weight, x), 0, pattern, "row")
    for sparsity in (0.1, 0.9):  # has no say
        assert torch.equal(run(weight, x, sparsity, pattern, criterion=criterion), weight.masked_fill(gone, 0))


@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_ties_go_to_the_lower_index(scope):
    weight, x = torch.ones(6, 10), torch.ones(4, 10)
    for criterion in ("wanda", "magnitude", "ria"):
        result = run(weight, x, 0.4, criterion=criterion, scope=scope)
        assert torch.equal(result == 0, least(weight, 0.4, "unstructured", scope))


def test_relative_importance_of_nothing():
    """Rows, columns and inputs that are zero have no importance, rather than none that is a number."""
    weight, x = case(3)
    weight[2], weight[:, 5], x[:, 7] = 0, 0, 0
    scores = relative_importance(weight, inputs_of(x))
    assert scores.isfinite().all()
    assert (scores[2] == 0).all()
    assert (scores[:, [5, 7]] == 0).all()


def test_the_power_of_the_inputs():
    weight, x = case(4)
    for power in (0.0, 1.0):
        share = weight.abs() / weight.abs().sum(0) + weight.abs() / weight.abs().sum(1, keepdim=True)
        gone = least(share * x.square().sum(0).sqrt().pow(power), 0.5, "unstructured", "row")
        assert torch.equal(run(weight, x, criterion="ria", ria_power=power), weight.masked_fill(gone, 0))


# --- statistics ------------------------------------------------------------------------------------------------------


def test_rows_of_weight_zero_count_nowhere():
    _, x = case(5)
    keep = torch.rand(len(x)) < 0.6
    some, those = inputs_of(x, keep), inputs_of(x[keep])
    assert some.rows == those.rows == keep.sum()
    torch.testing.assert_close(some.norm_sq, those.norm_sq)
    torch.testing.assert_close(some.gram, those.gram, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(those.gram, x[keep].T @ x[keep], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(those.scale, x[keep].square().mean(0).sqrt())
    assert Inputs(4, x.device, gram=False).gram is None


def test_shapes_of_inputs():
    """[B, T, in] with a mask [B, T], and the same in one row of tokens."""
    _, x = case(6, rows=60)
    mask = (torch.arange(12) < torch.tensor([[3], [12], [7], [1], [5]])).long()
    flat, deep = Inputs(40, x.device, gram=True), Inputs(40, x.device, gram=True)
    flat.add(x, mask)
    deep.add(x.view(5, 12, 40), mask)
    assert flat.rows == deep.rows == 28
    assert torch.equal(flat.norm_sq, deep.norm_sq)
    assert torch.equal(flat.gram, deep.gram)


# --- SparseGPT -------------------------------------------------------------------------------------------------------


def algorithm_1(weight, x, sparsity, pattern, damping=0.01, block=128):
    """Algorithm 1 of arXiv 2301.00774, in float64, one column at a time; (kept weights, mask of what went)."""
    w, x = weight.double().clone(), x.double()
    rows, width = w.shape
    hessian = x.T @ x / len(x)
    hessian += damping * hessian.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    inverse = torch.linalg.cholesky(torch.linalg.inv(hessian)).T
    gone = torch.zeros(rows, width, dtype=torch.bool)
    n, m = (0, 0) if pattern == "unstructured" else map(int, pattern.split(":"))
    step = block if not n else block // m * m
    for i in range(0, width, step):
        end = min(i + step, width)
        error = torch.zeros(rows, end - i, dtype=torch.float64)
        for j in range(i, end):
            if not n and j == i:
                cost = w[:, i:end] ** 2 / inverse.diagonal()[i:end] ** 2
                gone[:, i:end] = least(cost, sparsity, "unstructured", "matrix")
            if n and (j - i) % m == 0:
                cost = w[:, j : j + m] ** 2 / inverse.diagonal()[j : j + m] ** 2
                gone[:, j : j + m] = least(cost, n / m, f"{n}:{m}", "row")
            error[:, j - i] = w[:, j] / inverse[j, j] * gone[:, j]
            w[:, j:end] -= error[:, j - i, None] * inverse[j, j:end]
        w[:, end:] -= error @ inverse[i:end, end:]
    return w.masked_fill(gone, 0), gone


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "3:5"])
@pytest.mark.parametrize(("width", "sparsity"), [(40, 0.3), (300, 0.6)])
def test_sparsegpt_equals_algorithm_1(width, sparsity, pattern):
    """Blocks of 128 columns, or of as many as the pattern divides; the last is smaller."""
    weight, x = case(7, out=12, width=width, rows=8 * width)
    result = run(weight, x, sparsity, pattern, criterion="sparsegpt")
    expected, gone = algorithm_1(weight, x, sparsity, pattern)
    assert torch.equal(result == 0, gone)
    torch.testing.assert_close(result.double(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    if pattern == "unstructured":
        assert gone.sum() == sum(round(sparsity * 12 * min(128, width - i)) for i in range(0, width, 128))
    else:
        n, m = map(int, pattern.split(":"))
        assert (gone.view(12, -1, m).sum(2) == n).all()


def error(weight, pruned, x) -> float:
    return (x @ (weight - pruned).T).norm().item()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sparsegpt_makes_up_for_what_goes(seed, pattern):
    weight, x = case(seed, rows=400)
    mine = error(weight, run(weight, x, 0.5, pattern, criterion="sparsegpt"), x)
    assert mine < 0.8 * error(weight, run(weight, x, 0.5, pattern), x)
    assert error(weight, run(weight, x, 0.5, pattern), x) < error(
        weight, run(weight, x, 0.5, pattern, criterion="magnitude"), x
    )


def test_sparsegpt_and_columns_that_are_never_used():
    """They go altogether; the others are pruned as if they were not there, but for the damping."""
    weight, x = case(8)
    dead = torch.tensor([0, 7, 8, 31])
    x[:, dead] = 0
    result = run(weight, x, 0.5, criterion="sparsegpt")
    assert result.isfinite().all()
    assert (result[:, dead] == 0).all()
    assert (result == 0).sum() == weight.numel() // 2
    assert error(weight, result, x) < error(weight, run(weight, x, 0.5), x)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("rows", [1, 10])
def test_sparsegpt_with_fewer_rows_than_columns(rows, pattern):
    """X^T X is singular."""
    weight, x = case(9, rows=rows)
    result = run(weight, x, 0.5, pattern, criterion="sparsegpt")
    assert result.isfinite().all()
    assert (result == 0).sum() == weight.numel() // 2
    assert error(weight, result, x) < error(weight, run(weight, x, 0.5, pattern), x)


def test_sparsegpt_where_columns_are_the_same():
    weight, x = case(10)
    x[:, 1::2] = x[:, ::2]
    for damping in (1e-8, 0.01):  # of the first rounding leaves nothing
        result = run(weight, x, 0.5, criterion="sparsegpt", damping=damping)
        assert result.isfinite().all()
        assert error(weight, result, x) < 0.7 * error(weight, run(weight, x, 0.5), x)


def test_sparsegpt_knows_no_scale():
    """Inputs a thousand times as large ask for the same weights."""
    weight, x = case(11)
    for factor in (2.0**-12, 2.0**12):
        assert torch.equal(
            run(weight, factor * x, 0.5, criterion="sparsegpt"), run(weight, x, 0.5, criterion="sparsegpt")
        )


# --- the rest --------------------------------------------------------------------------------------------------------


def test_statistics_are_asked_for():
    for criterion in CRITERIA:
        if criterion != "magnitude":
            with pytest.raises(ValueError, match=f"inputs: None, but criterion '{criterion}'"):
                run(torch.ones(4, 8), None, criterion=criterion)


@pytest.mark.parametrize(
    ("text", "expected"), [("unstructured", Pattern()), ("2:4", Pattern(2, 4)), ("1:2", Pattern(1, 2))]
)
def test_reading_patterns(text, expected):
    assert Pattern.parse(text) == expected


@pytest.mark.parametrize("text", ["", "2", "2:", "2:2", "0:4", "-1:4", "4:2", "2:4:8", "a:b"])
def test_patterns_that_are_none(text):
    with pytest.raises(ValueError, match="expected 'unstructured' or 'n:m' with 0 < n < m"):
        Pattern.parse(text)


# --- DSnoT -----------------------------------------------------------------------------------------------------------


def sums_of(x, weight=None) -> Inputs:
    inputs = Inputs(x.shape[-1], x.device, sums=True)
    for part in range(0, len(x), 64):
        inputs.add(x[part : part + 64], None if weight is None else weight[part : part + 64])
    return inputs


def one_row(dense, gone, x, cycles, group):
    """Exchanges of one row in plain Python: the mask of what is gone."""
    x, dense = x.double(), dense.double()
    share, variance = (dense * x.mean(0)).tolist(), x.var(0, correction=0).tolist()
    cost = (dense.abs() * x.square().mean(0).sqrt()).tolist()
    gone = list(gone)
    for _ in range(cycles):
        error = sum(s for s, g in zip(share, gone, strict=True) if g)
        sign = 1 if error > 0 else -1
        grow = max((j for j, g in enumerate(gone) if g and sign * share[j] > 0), default=None,
                   key=lambda j, sign=sign: sign * share[j] / variance[j])  # fmt: skip
        give = min((j for j, g in enumerate(gone) if not g and sign * share[j] < 0 and grow is not None
                    and j // group == grow // group), default=None, key=lambda j: cost[j])  # fmt: skip
        if grow is None or give is None or abs(error - share[grow] + share[give]) >= abs(error):
            break
        gone[grow], gone[give] = False, True
    return gone


def shifted(seed: int):
    weight, x = case(seed)
    return weight, x + torch.linspace(-1, 1, x.shape[1])  # inputs that have a mean


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("criterion", ["wanda", "magnitude", "ria"])
def test_exchanges_are_those_of_one_row_at_a_time(criterion, pattern):
    weight, x = shifted(31)
    parsed = PATTERNS[pattern]
    before = run(weight, x, 0.6, pattern, criterion=criterion)
    for cycles in (1, 5, 50):
        after = before.clone()
        exchange(after, weight, sums_of(x), cycles, parsed)
        expected = [
            one_row(dense, row == 0, x, cycles, parsed.m if parsed.n else len(row))
            for dense, row in zip(weight, before, strict=True)
        ]
        assert torch.equal(after, weight.masked_fill(torch.tensor(expected), 0))
        whole = weight.clone()
        prune_matrix(whole, sums_of(x), 0.6, criterion=criterion, pattern=parsed, scope="row", dsnot=cycles)
        assert torch.equal(whole, after)
        assert not torch.equal(after, before)


@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_exchanges_keep_the_count_and_bring_the_mean_output_nearer(scope):
    weight, x = shifted(32)
    before = run(weight, x, 0.6, scope=scope)
    after = before.clone()
    exchange(after, weight, sums_of(x), 50)
    assert torch.equal((after == 0).sum(1), (before == 0).sum(1))
    off = [((weight - pruned) @ x.mean(0)).abs() for pruned in (before, after)]
    assert (off[1] <= off[0] + 1e-6).all()
    assert off[1].mean() < 0.3 * off[0].mean()


def test_padding_has_no_mean():
    _, x = shifted(33)
    keep = torch.rand(len(x)) < 0.6
    some, those = sums_of(x, keep), sums_of(x[keep])
    torch.testing.assert_close(some.mean, those.mean)
    torch.testing.assert_close(some.mean, x[keep].mean(0))
    torch.testing.assert_close(some.variance, x[keep].var(0, correction=0), rtol=1e-4, atol=1e-5)


def test_no_exchange_where_nothing_is_gained():
    """Nothing pruned; everything pruned; inputs of mean zero; columns that are never used."""
    weight, x = shifted(34)
    for pruned in (weight, torch.zeros_like(weight)):
        after = pruned.clone()
        exchange(after, weight, sums_of(x), 9)
        assert torch.equal(after, pruned)
    before = run(weight, x, 0.5)
    after = before.clone()
    exchange(after, weight, sums_of(torch.zeros_like(x)), 9)
    assert torch.equal(after, before)


def test_exchanges_need_what_they_look_at():
    weight, x = shifted(35)
    fields = {"pattern": Pattern(), "scope": "row", "dsnot": 3}
    with pytest.raises(ValueError, match="inputs: None, but criterion 'magnitude' with dsnot=3"):
        prune_matrix(weight.clone(), None, 0.5, criterion="magnitude", **fields)
    with pytest.raises(ValueError, match="inputs: the sums of columns were not kept"):
        prune_matrix(weight.clone(), inputs_of(x), 0.5, criterion="wanda", **fields)
