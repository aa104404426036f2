"""CoMP's strategy against its equations, written once more."""

from __future__ import annotations

import json
import math

import pytest

from vlprune_ext.comp import ModeStrategy, cost

MODES = ("vision parameters", "language parameters", "vision tokens")


def measured(**fields) -> ModeStrategy:
    return ModeStrategy(MODES, costs=dict(zip(MODES, (0.3, 0.1, 0.2), strict=True)), **fields)


def test_cost_is_accuracy_lost_per_flop_saved():
    assert cost((0.9, 0.8), (100.0, 60.0)) == pytest.approx(0.1 / 40)
    assert cost((0.8, 0.9), (100.0, 60.0)) < 0, "a gain is the best of costs"


@pytest.mark.parametrize("accuracy", [(math.nan, 0.5), (0.5, math.inf)])
def test_cost_of_what_is_not_finite(accuracy):
    with pytest.raises(ValueError, match="expected finite numbers"):
        cost(accuracy, (2.0, 1.0))


def test_cost_of_nothing_saved():
    with pytest.raises(ValueError, match=r"flops is \(1.0, 1.0\); expected fewer after than before"):
        cost((0.5, 0.5), (1.0, 1.0))


def test_greedy_takes_the_least_cost():
    assert measured(rho=0.0).choose() == (MODES[1], False)
    assert measured(rho=0.0).choose(among=[MODES[0], MODES[2]]) == (MODES[2], False)


def test_exploration_is_a_softmax_of_the_stages_waited():
    strategy = measured(tau=2.0)
    strategy.waited = dict(zip(MODES, (1, 4, 2), strict=True))
    powers = [math.exp(waited / 2.0) for waited in (1, 4, 2)]
    assert list(strategy.exploration().values()) == pytest.approx([power / sum(powers) for power in powers])


def test_how_often_it_explores_and_where():
    """Over many stages, each drawn anew: within four standard errors."""
    counts, explored, stages = dict.fromkeys(MODES, 0), 0, 20_000
    strategy = measured(tau=3.0)
    strategy.waited = dict(zip(MODES, (1, 6, 3), strict=True))
    for strategy.stage in range(stages):
        mode, exploring = strategy.choose()
        explored += exploring
        counts[mode] += exploring
    assert abs(explored / stages - 0.2) < 4 * math.sqrt(0.2 * 0.8 / stages)
    for mode, chance in strategy.exploration().items():
        assert abs(counts[mode] / explored - chance) < 4 * math.sqrt(chance * (1 - chance) / explored)


@pytest.mark.parametrize("waited", range(1, 9))
def test_history_fades(waited):
    """R <- lambda R + (1 - lambda) r, lambda = max(l0 - l0 / I_max (I - 1), 0)."""
    strategy = measured(history=0.4, horizon=5)
    strategy.waited[MODES[0]] = waited
    strategy.update(MODES[0], 1.0)
    weight = max(0.4 - 0.4 / 5 * (waited - 1), 0.0)
    assert strategy.costs[MODES[0]] == pytest.approx(weight * 0.3 + (1 - weight) * 1.0)
    assert strategy.costs[MODES[1]] == 0.1, "the others wait"
    assert strategy.waited == {MODES[0]: 1, MODES[1]: 2, MODES[2]: 2}


@pytest.mark.parametrize(("lost", "expected"), [(0.7, 0.5), (0.3, 0.3), (0.05, 0.05)])
def test_tried_without_pruning(lost, expected):
    """A loss before training is the most that a stage can cost; waiting starts anew, and the stage goes on."""
    strategy = measured()
    strategy.waited[MODES[0]] = 4
    assert strategy.expected(MODES[0], lost) == pytest.approx(expected)
    assert strategy.costs == measured().costs
    strategy.decline(MODES[0], lost)
    assert strategy.costs == {**measured().costs, MODES[0]: pytest.approx(expected)}
    assert strategy.waited == {MODES[0]: 0, MODES[1]: 1, MODES[2]: 1}
    assert strategy.stage == 0
    strategy.update(MODES[1], 0.2)
    assert strategy.waited == {MODES[0]: 1, MODES[1]: 1, MODES[2]: 2}
    assert strategy.stage == 1


def test_the_first_measurement_counts_whole():
    strategy = ModeStrategy(MODES)
    assert strategy.unmeasured() == list(MODES)
    strategy.update(MODES[2], 0.7)
    assert strategy.costs == {MODES[2]: 0.7}
    with pytest.raises(ValueError, match="vision parameters, language parameters not measured yet"):
        strategy.choose()


def test_a_run_that_is_interrupted_goes_on_as_it_would_have():
    def go_on(strategy, stages):
        chosen = []
        for stage in range(stages):
            mode, _ = strategy.choose()
            chosen.append(mode)
            strategy.update(mode, math.sin(7.0 * strategy.stage) + stage % 2)
        return chosen

    whole = measured(rho=0.5, seed=3)
    expected = go_on(whole, 40)
    part = measured(rho=0.5, seed=3)
    first = go_on(part, 14)
    again = ModeStrategy(**json.loads(json.dumps(part.as_dict())))
    assert first + go_on(again, 26) == expected
    assert len(set(expected)) == 3
    assert again == whole


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modes": ()}, "expected names, each once"),
        ({"modes": ("a", "a")}, "expected names, each once"),
        ({"modes": MODES, "rho": 1.5}, "rho is 1.5"),
        ({"modes": MODES, "history": -0.1}, "history -0.1"),
        ({"modes": MODES, "tau": 0.0}, "tau is 0.0"),
        ({"modes": MODES, "horizon": 0}, "horizon 0"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        ModeStrategy(**fields)


def test_bad_calls():
    strategy = measured()
    with pytest.raises(ValueError, match="among is \\[\\]; expected some of"):
        strategy.choose(among=[])
    with pytest.raises(ValueError, match="mode is 'audio'; expected one of"):
        strategy.update("audio", 0.1)
    with pytest.raises(ValueError, match="measured is nan; expected a finite number"):
        strategy.update(MODES[0], math.nan)
