"""The statistics of early stopping, on drops whose mean is known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlprune_ext.units.racing import Race, chances, draw, rounds, sizes

M, S = 6, 400


def skewed(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(drops [M, S], first-order estimates of them): few samples matter, as for a good model."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(S, dtype=torch.float64, generator=generator) ** 8
    control = torch.randn(M, S, dtype=torch.float64, generator=generator) * weight + 0.3 * weight
    noise = torch.randn(M, S, dtype=torch.float64, generator=generator) * 0.4 * weight
    return 1.3 * control + noise, control


def race_of(drops, control, n, seed, size):
    """A race whose modules have all been judged on the first n of a draw."""
    order, chance = draw(size, seed)[:n], chances(size, n)
    seen, probability = torch.full_like(drops, math.nan), torch.full_like(drops, math.nan)
    seen[:, order] = drops[:, order]
    probability[:, order] = chance[order]
    race = Race(seen, probability, control, ["all"] * len(drops), torch.ones(len(drops), dtype=torch.float64), 2.0)
    race.estimate()
    return race


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=60), st.integers(1, 60))
def test_chances_add_up(size, n):
    size = torch.tensor(size, dtype=torch.float64)
    n = min(n, len(size))
    chance = chances(size, n)
    assert chance.sum().item() == pytest.approx(n)
    assert chance.min() > 0
    assert chance.max() <= 1
    free = chance < 1
    if free.any():
        assert torch.allclose(chance[free] / size[free], (chance[free] / size[free])[0])
    assert (chances(size, min(n + 1, len(size))) >= chance - 1e-12).all()


def test_a_draw_keeps_its_chances():
    size = sizes(skewed()[1])
    n, trials = 40, 2000
    hits = torch.zeros(S)
    for seed in range(trials):
        hits[draw(size, seed)[:n]] += 1
    expected = chances(size, n)
    # Sequential Poisson sampling has these probabilities nearly, not exactly.
    assert (hits / trials - expected).abs().max() < 0.05
    assert (hits / trials - expected).abs().mean() < 0.005


@pytest.mark.parametrize("with_control", [True, False])
def test_means_are_unbiased_and_errors_honest(with_control):
    drops, control = skewed()
    size = sizes(control)
    known = control if with_control else None
    races = [race_of(drops, known, 60, seed, size) for seed in range(300)]
    means, noise = (torch.stack([getattr(race, name) for race in races]) for name in ("mean", "noise"))
    spread = means.std(0)
    assert ((means.mean(0) - drops.mean(1)).abs() < 5 * spread / math.sqrt(len(races))).all()
    ratio = noise.square().mean(0).sqrt() / spread
    assert ratio.min() > 0.75
    assert ratio.max() < 1.35


def test_what_importance_and_controls_are_worth():
    drops, control = skewed()
    even = torch.ones(S)

    def spread(known, size):
        return torch.stack([race_of(drops, known, 60, seed, size).mean for seed in range(100)]).std(0).mean()

    plain, drawn, both = spread(None, even), spread(None, sizes(control)), spread(control, sizes(control))
    assert drawn < 0.6 * plain
    assert both < 0.6 * drawn


def test_all_samples_leave_no_noise():
    drops, control = skewed()
    race = race_of(drops, control, S, 0, sizes(control))
    torch.testing.assert_close(race.mean, drops.mean(1))
    assert (race.noise == 0).all()
    torch.testing.assert_close(race.error(), drops.std(1) / math.sqrt(S))


def test_what_is_decided():
    race = Race(torch.zeros(4, 3), torch.ones(4, 3), None, [0] * 4, torch.ones(4, dtype=torch.float64), 2.0)
    race.mean = torch.tensor([0.0, 1.0, 1.2, 5.0], dtype=torch.float64)
    race.noise = torch.full((4,), 0.1, dtype=torch.float64)
    race.decide([([0, 1, 2, 3], 2)])
    assert race.undecided == {1, 2}  # 0.1 from the cut at 1.1, where two errors are 0.2
    race.decide([([0, 1, 2, 3], 4)])  # all go: nothing is left to decide
    assert not race.undecided


def test_rounds():
    assert rounds(1000)[0] == 63
    assert rounds(1000)[-1] == 1000
    assert rounds(10) == [10]
    assert all(a < b for a, b in zip(rounds(1000), rounds(1000)[1:], strict=False))


def test_modules_that_do_not_matter_at_all():
    assert torch.equal(sizes(torch.zeros(3, 5)), torch.ones(5))
    race = race_of(torch.zeros(2, 5, dtype=torch.float64), torch.zeros(2, 5, dtype=torch.float64), 3, 0, torch.ones(5))
    assert (race.mean == 0).all()
    assert (race.noise == 0).all()
