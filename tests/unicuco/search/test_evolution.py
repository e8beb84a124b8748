from __future__ import annotations

import pytest

from unicuco.search.evolution import Evolution, EvolutionOptions
from unicuco.search.request import run_request
from unicuco.testing.request_contract import RequestSearchContract, ToyJudge, toy_request
from unicuco.types import Ask, Evaluation

QUICK = EvolutionOptions(offspring=8, survivors=(3, 2), shares=(1 / 16, 1 / 4, 1.0))


class TestEvolution(RequestSearchContract):
    name = "evopress"


def start(sparsity: float = 0.6, *, seed: int = 0, units: float = 100.0) -> Evolution:
    return Evolution(toy_request(sparsity, seed=seed, units=units), QUICK)


@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.85])
def test_every_child_keeps_the_budget_to_the_weight(sparsity: float) -> None:
    evolution, judge = start(sparsity), ToyJudge()
    run_request(evolution, judge)
    space = judge.space
    wanted = space.kept_for_sparsity(sparsity)
    assert len(judge.asked) > 100
    for ask in judge.asked:
        assert space.cost.kept_params(ask.strategy.values) == wanted
        assert space.decode(space.encode([ask.strategy])) == [ask.strategy]


def test_the_best_never_rises_and_beats_uniform_in_the_end() -> None:
    evolution = start()
    run_request(evolution, ToyJudge())
    curve = evolution.record.curve
    assert [kl for _, kl in curve] == sorted((kl for _, kl in curve), reverse=True)
    assert curve[-1][1] < 0.9 * curve[0][1]


def test_a_stage_passes_its_best_on_to_more_tokens() -> None:
    evolution, judge = start(), ToyJudge(noise=0.3)
    evolution.tell(0, [(ask, judge(ask)) for ask in evolution.ask(0)])
    sizes, tokens = [], []
    for round_ in range(1, 4):
        asks = evolution.ask(round_)
        results = [(ask, judge(ask)) for ask in asks]
        evolution.tell(round_, results)
        sizes.append(len(asks))
        tokens.append({ask.tokens for ask in asks})
        if round_ < 3:
            ranked = sorted(results, key=_kl)
            kept = [ask.strategy for ask, _ in ranked[: QUICK.counts[round_]]]
            assert [ask.strategy for ask in evolution.ask(round_ + 1)] == kept
    assert sizes == [8, 3, 2]
    assert tokens == [{64}, {256}, {None}]


def test_children_move_whole_levels_and_at_most_three_switches() -> None:
    evolution, judge = start(), ToyJudge()
    (first,) = evolution.ask(0)
    evolution.tell(0, [(first, judge(first))])
    axes = evolution.config.space.axes
    for child in evolution.ask(1):
        moves = [
            round((value - before) * axis.num_steps)
            for value, before, axis in zip(
                child.strategy.values, first.strategy.values, axes, strict=True
            )
        ]
        level = min(abs(move) for move in moves if move)
        assert all(move % level == 0 for move in moves)
        assert sum(moves) == 0
        assert sum(abs(move) for move in moves) <= 6 * level


def test_no_axis_leaves_the_levels_around_its_start() -> None:
    options = EvolutionOptions(offspring=8, survivors=(2,), shares=(1 / 4, 1.0), max_level=1)
    evolution, judge = Evolution(toy_request(0.6, units=60), options), ToyJudge()
    run_request(evolution, judge)
    first = judge.asked[0].strategy
    moves = {
        round((value - before) * axis.num_steps)
        for ask in judge.asked
        for value, before, axis in zip(
            ask.strategy.values, first.values, evolution.config.space.axes, strict=True
        )
    }
    assert len(moves) == 3


def test_the_published_generation_costs_six_units_and_three_hundred_buy_49() -> None:
    evolution = Evolution(toy_request(0.6))
    assert evolution.options.counts == (64, 8, 2)
    assert evolution.options.units_per_generation(1024) == pytest.approx(6.0)
    assert evolution.generations == 49


def test_all_units_are_spent_but_for_less_than_a_generation() -> None:
    evolution = start(units=50)
    run_request(evolution, ToyJudge())
    assert 50 - QUICK.units_per_generation(1024) < evolution.record.units <= 50


def test_where_nothing_can_be_switched_the_search_ends_with_its_start() -> None:
    evolution, judge = start(0.0), ToyJudge()
    run_request(evolution, judge)
    assert [ask.strategy for ask in judge.asked] == [evolution.best]


@pytest.mark.parametrize(
    "fields",
    [{"survivors": (2, 8)}, {"shares": (0.5, 1.0)}, {"shares": (0.1, 0.2, 0.5)}],
)
def test_stages_that_do_not_narrow_are_refused(fields: dict[str, tuple[float, ...]]) -> None:
    with pytest.raises(ValueError, match="falling counts"):
        EvolutionOptions(**fields)  # type: ignore[arg-type]


def _kl(result: tuple[Ask, object]) -> float:
    assert isinstance(result[1], Evaluation)
    return result[1].kl
