from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unicuco.allocate import AxisCurves
from unicuco.dimensions import build_space
from unicuco.search import RequestConfig
from unicuco.search.evop import Evop, EvopOptions, crossed, one_at_a_time, popcount, swapped
from unicuco.search.request import run_request
from unicuco.testing.cases import random_tokens
from unicuco.testing.planted import planted_case, planted_judge
from unicuco.testing.profiles import make_profile
from unicuco.testing.request_contract import ToyJudge, toy_request
from unicuco.testing.search_contract import ToyModel
from unicuco.types import Ask, Evaluation


def members(search: Evop, ask: Ask) -> frozenset[int]:
    """Return which axes are pruned harder than asked."""
    values = enumerate(ask.strategy.values)
    return frozenset(k for k, value in values if value > search.config.sparsity)


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.6, 0.8])
def test_every_pattern_has_the_same_number_of_members(sparsity: float) -> None:
    search, judge = Evop(toy_request(sparsity, units=60)), ToyJudge()
    run_request(search, judge)
    patterns = [members(search, ask) for ask in judge.asked]
    assert {len(pattern) for pattern in patterns} == {popcount(7, sparsity)}
    assert len(set(patterns)) == len(patterns) > 6


@given(st.integers(2, 30), st.floats(0, 0.98))
def test_some_axes_are_members_and_some_are_not(num_axes: int, sparsity: float) -> None:
    count = popcount(num_axes, sparsity)
    assert (count == 0) == (sparsity == 0)
    assert count < num_axes
    assert abs(count - sparsity * num_axes) <= 1


@given(st.integers(0, 10**6), st.integers(2, 12))
def test_crossing_keeps_what_both_have_and_swapping_one_member_alone(
    seed: int, num_axes: int
) -> None:
    draw = random.Random(seed)
    count = draw.randint(1, num_axes - 1)
    mother, father = (frozenset(draw.sample(range(num_axes), count)) for _ in range(2))
    child = crossed(draw, mother, father)
    assert mother & father <= child <= mother | father
    other = swapped(draw, child, num_axes)
    assert len(child) == len(other) == count
    assert len(child & other) == count - 1


def test_full_depth_removes_members_whole_and_fills_the_rest() -> None:
    config = toy_request(0.6)
    search = Evop(config, EvopOptions(depth=1.0))
    strategy = search.strategy(frozenset({1, 4, 6}))  # of 7 axes; others hold the rest
    high = max(axis.high for axis in config.space.axes)
    rest = [v for k, v in enumerate(strategy.values) if k not in {1, 4, 6}]
    assert all(strategy.values[k] == pytest.approx(high, abs=0.01) for k in (1, 4, 6))
    assert max(rest) - min(rest) < 0.01
    assert config.space.cost.kept_params(strategy.values) == config.space.kept_for_sparsity(0.6)


def test_two_of_eight_are_found_as_brute_force_finds_them() -> None:
    space = build_space(make_profile([[(40, 60), (30, 80)]] * 4))
    model = ToyModel(space)

    def value(ask: Ask) -> Evaluation:
        return model.evaluate(ask)

    def search(units: float) -> Evop:
        config = RequestConfig(
            space=space,
            curves=AxisCurves(model.curves()),
            blocks=(0, 0, 1, 1, 2, 2, 3, 3),
            sparsity=0.25,
            tokens=64,
            seed=0,
            units=units,
        )
        made = Evop(config)
        run_request(made, value)
        return made

    whole = search(28)
    every = [whole.strategy(frozenset(pair)) for pair in combinations(range(8), 2)]
    asks = [Ask(round=0, position=0, strategy=s, derivatives=False) for s in every]
    least = min(model.evaluate(ask).kl for ask in asks)
    assert whole.record.evaluations == 28
    assert whole.record.best_kl == least
    assert search(27).record.best_kl == least  # evolution alone


def test_patterns_get_better_than_the_random_ones_they_begin_with() -> None:
    options = EvopOptions(offspring=5, population=3)
    search = Evop(toy_request(0.6, seed=3, units=30), options)  # of 35 that there are
    run_request(search, ToyJudge())
    assert search.record.best_kl < search.record.curve[0][1]


@pytest.mark.slow
def test_patterns_are_no_worse_than_a_ranking_of_axes_judged_one_at_a_time() -> None:
    case, judge = planted_case(), planted_judge()
    held_out = case.evaluator_on(random_tokens(seed=3, num_windows=8, context=48))
    config = replace(toy_request(0.6, units=150), space=case.space, curves=case.curves)
    search = Evop(config)
    run_request(search, lambda ask: judge.evaluate(ask.strategy))
    ranked = search.strategy(one_at_a_time(search, lambda strategy: judge.evaluate(strategy).kl))
    assert held_out.evaluate(search.best).kl <= held_out.evaluate(ranked).kl


@pytest.mark.parametrize(
    "options", [{"population": 1}, {"offspring": 0}, {"depth": 0.0}, {"depth": 1.1}]
)
def test_options_that_make_no_search_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="two parents or more"):
        EvopOptions(**options)  # type: ignore[arg-type]
