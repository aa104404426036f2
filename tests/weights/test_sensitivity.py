from __future__ import annotations

import functools

import pytest
import torch
from models.tiny import digest, setting

from vlprune_ext import ops
from vlprune_ext.objectives import objective_named
from vlprune_ext.weights.matrices import matrices
from vlprune_ext.weights.sensitivity import EPS, first_order, perturbation, zeroth_order

DRAWS = 2
SAMPLES = 5
STEP = 0.05  # the rounding of two losses, 1e-7, is divided by it: at 1e-3 no fp32 result is good to 1e-5


@functools.cache
@torch.no_grad()
def naive(name) -> torch.Tensor:
    """Perturb a copy of each matrix, run the whole model: [matrices, draws, samples], differences over 2 eps."""
    _, anatomy, objective, data = setting(name, SAMPLES)
    return torch.stack([slopes(anatomy, objective, data, matrix) for matrix in some(anatomy, objective)])


def some(anatomy, objective):
    """All matrices, or of many every third."""
    found = matrices(anatomy, objective.towers(anatomy))
    return found if len(found) < 60 else found[::3]


def slopes(anatomy, objective, data, matrix) -> torch.Tensor:
    found = []
    for draw in range(DRAWS):
        values = []
        for sign in (1, -1):
            change = perturbation(matrix, draw, sign, draws=DRAWS, eps=STEP)
            pair = ops.perturb(matrix.weight, change.seed, change.tensor_id, change.eps)
            kept, matrix.module.weight.data = matrix.module.weight.data, pair[0 if sign > 0 else 1]
            outputs = objective.run(anatomy, matrix.tower, data, len(data))
            other = objective.other(anatomy, matrix.tower, data, len(data))
            values.append(objective.values(anatomy, matrix.tower, outputs, other, data).double())
            matrix.module.weight.data = kept
        found.append((values[0] - values[1]) / (2 * change.eps))
    return torch.stack(found)


@pytest.mark.parametrize(
    ("name", "together"), [("clip", 1), ("clip", 3), ("clip", None), ("llava", 1), ("blip2_t5", None)]
)
def test_replay_equals_perturbing_a_copy(name, together):
    model, anatomy, objective, data = setting(name, SAMPLES)
    before = digest(model)
    chosen = some(anatomy, objective)
    found = zeroth_order(
        anatomy,
        objective,
        data,
        chosen,
        draws=DRAWS,
        eps=STEP,
        realised=False,
        samples_per_loss=together,
        batch_size=4,
        stacked_rows=16,
    )
    assert digest(model) == before
    parts = naive(name).split(together or SAMPLES, dim=-1)
    expected = torch.stack([part.mean(-1) for part in parts], -1).abs().mean((1, 2))
    torch.testing.assert_close(found.slope, expected, rtol=1e-5, atol=1e-5 * expected.max().item())
    runs = 0
    for tower in dict.fromkeys(matrix.tower for matrix in chosen):
        rows = sum(len(next(iter(b.values()))) for b in objective.batches(anatomy, tower, data, 4))
        depth = len(anatomy.tower(tower)) - (name == "llava" and tower == "vision")  # its last one is never read
        mine = [matrix for matrix in chosen if matrix.tower == tower]
        runs += rows * (depth + sum(2 * DRAWS * max(0, depth - matrix.layer) for matrix in mine))
    assert found.block_runs == runs


@pytest.mark.parametrize("name", ["clip", "llava", "t5"])
def test_both_orders_agree(name):
    """On average over directions |<g, z>| is sqrt(2 / pi) |g|."""
    model, anatomy, objective, data = setting(name, 3)
    before = digest(model)
    chosen = [matrix for matrix in matrices(anatomy, objective.towers(anatomy)) if matrix.layer == 1][:4]
    zeroth = zeroth_order(anatomy, objective, data, chosen, draws=60, eps=1e-4, samples_per_loss=None, stacked_rows=48)
    first = first_order(anatomy, objective, data, chosen, batch_size=len(data))
    assert digest(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())
    for matrix, slope, mean in zip(chosen, zeroth.slope.tolist(), first.slope.tolist(), strict=True):
        gradient = whole_gradient(anatomy, objective, data, matrix)
        assert mean == pytest.approx(gradient.abs().mean().item(), rel=1e-3)
        assert slope == pytest.approx((2 / torch.pi) ** 0.5 * gradient.norm().item(), rel=0.3)


def whole_gradient(anatomy, objective, data, matrix):
    other = objective.other(anatomy, matrix.tower, data, 32)
    other = None if other is None else other.detach()
    outputs = objective.run(anatomy, matrix.tower, data, 32)
    value = objective.values(anatomy, matrix.tower, outputs, other, data).mean()
    (gradient,) = torch.autograd.grad(value, [matrix.weight])
    return gradient.float()


def test_the_rounded_step_is_measured():
    """In bf16 the weights lie apart by something else than 2 eps; dividing by what it is undoes that."""
    model, anatomy, objective, data = setting("llama", 3)
    chosen = matrices(anatomy)[:6]
    exact = zeroth_order(anatomy, objective, data, chosen, draws=1, eps=0.004, realised=True)
    torch.testing.assert_close(
        exact.slope,
        zeroth_order(anatomy, objective, data, chosen, draws=1, eps=0.004, realised=False).slope,
        rtol=1e-3,
        atol=0,
    )
    model.to(torch.bfloat16)
    with_step = zeroth_order(anatomy, objective, data, chosen, draws=1, eps=1e-4, realised=True)
    without = zeroth_order(anatomy, objective, data, chosen, draws=1, eps=1e-4, realised=False)
    assert bool(((with_step.slope / without.slope - 1).abs() > 0.02).any())
    assert set(EPS) == {torch.float32, torch.float16, torch.bfloat16}


def test_streams_belong_to_matrices():
    """A matrix gets the same numbers whichever others are looked at."""
    _, anatomy, objective, data = setting("clip")
    chosen = matrices(anatomy)
    of_all = zeroth_order(anatomy, objective, data, chosen, draws=1)
    of_some = zeroth_order(anatomy, objective, data, chosen[5:9], draws=1)
    torch.testing.assert_close(of_all.slope[5:9], of_some.slope, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("order", [zeroth_order, first_order])
def test_a_loss_that_is_not_finite_names_the_sample(order):
    _, anatomy, objective, data = setting("llava", 5)
    data.images["pixel_values"][3] = torch.inf
    with pytest.raises(ValueError, match="not finite for sample 3"):
        order(anatomy, objective, data, matrices(anatomy, ["text"])[:2])


def test_first_order_needs_a_gradient():
    _, anatomy, _, data = setting("clip")
    with pytest.raises(ValueError, match="'recall@1' has no gradient"):
        first_order(anatomy, objective_named("recall@1"), data, matrices(anatomy))
