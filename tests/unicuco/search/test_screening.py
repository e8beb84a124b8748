"""Alternatives on few tokens, the best of them on all: in the loop, its store and the search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.unicuco.search.test_drive import (
    Bowl,
    TellingSearch,
    ThreadPool,
    ignore,
    shuffled,
    strategy_of,
)
from unicuco.errors import SurrogateError
from unicuco.search import build_search
from unicuco.search.base import History
from unicuco.search.drive import Progress, drive, outcome_of
from unicuco.search.front import FrontSearch
from unicuco.search.screening import ALTERNATIVES, Screening, daring_points
from unicuco.store import EvaluationStore
from unicuco.testing.search_contract import ToyModel, toy_config
from unicuco.types import Ask, Evaluation, FailedEvaluation, Outcome

SCREENING = Screening(tokens=16, derivatives=True)
PLACES = 4


class ScreeningSearch(TellingSearch):
    """Two blind rounds, then alternatives, drawn from a digest of what was told."""

    def ask(self, round: int) -> list[Ask]:
        asks = super().ask(round)
        if round < 2:
            return asks
        seeds = [[f"{ask.strategy.key} {k}" for k in range(ALTERNATIVES)] for ask in asks]
        return SCREENING.asks(round, [[strategy_of(seed) for seed in group] for group in seeds])

    def tell(self, round: int, results: Sequence[tuple[Ask, Outcome]]) -> None:
        assert round == len(self.told)
        self.told.append(list(results))


def run(folder: Path, num_evaluations: int, *, workers: int = 2) -> tuple[list[Ask], ThreadPool]:
    """Drive over a store in a folder; return what is recorded and the pool."""
    pool = ThreadPool(workers, shuffled)
    with EvaluationStore.open(folder / "evaluations.db", create=True) as store:
        store.acquire_lease("test")
        drive(
            ScreeningSearch(),
            pool,
            store,
            num_evaluations=num_evaluations,
            on_progress=ignore,
            screening=SCREENING,
        )
        assert [ask for ask, _ in store.read()] == store.asks(), "each has its one record"
        return store.asks(), pool


def test_the_best_of_every_place_is_judged_on_the_whole_text(tmp_path: Path) -> None:
    asks, _ = run(tmp_path, 18)
    whole = {(ask.round, ask.position): ask for ask in asks if ask.tokens is None}
    groups: dict[tuple[int, int], list[Ask]] = {}
    for ask in asks:
        if ask.tokens is not None:
            assert (ask.tokens, ask.derivatives) == (16, False)
            groups.setdefault((ask.round, ask.position // ALTERNATIVES), []).append(ask)
    assert sorted(groups) == [divmod(n, PLACES) for n in range(2 * PLACES, 18)]
    for place, group in groups.items():
        assert len(group) == ALTERNATIVES
        outcomes = {ask: outcome_of(Bowl(), ask) for ask in group}
        good = {ask: o.kl for ask, o in outcomes.items() if isinstance(o, Evaluation)}
        best = min(good, key=lambda ask: good[ask])
        expected = replace(best, position=place[1], derivatives=True, tokens=None)
        assert whole.pop(place) == expected
    assert sorted(whole) == [divmod(n, PLACES) for n in range(2 * PLACES)], "those asked at once"


@pytest.mark.parametrize("workers", [1, 5])
def test_any_number_of_workers_asks_the_same(tmp_path: Path, workers: int) -> None:
    (tmp_path / "other").mkdir()
    assert run(tmp_path, 18, workers=workers)[0] == run(tmp_path / "other", 18, workers=2)[0]


@pytest.mark.parametrize("first", [3, 9, 12, 15])
def test_a_longer_run_asks_what_it_would_have_asked_at_once(tmp_path: Path, first: int) -> None:
    before, _ = run(tmp_path, first)
    after, pool = run(tmp_path, 18)
    (tmp_path / "whole").mkdir()
    assert after == run(tmp_path / "whole", 18)[0]
    assert not set(before) & set(pool.submitted), "nothing recorded is judged again"


@pytest.mark.parametrize("count", [0, 5, 11, 17, 24, 33, 45])
@pytest.mark.slow
def test_a_run_that_is_cut_off_anywhere_goes_on_as_it_would_have(
    tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, num_recorded = EvaluationStore.append, 0

    def breaking(self: EvaluationStore, results: Sequence[tuple[Ask, Outcome]]) -> None:
        nonlocal num_recorded
        for result in results:
            if num_recorded == count:
                raise SurrogateError("cut off")
            append(self, [result])
            num_recorded += 1

    with monkeypatch.context() as patched:
        patched.setattr(EvaluationStore, "append", breaking)
        with pytest.raises(SurrogateError):
            run(tmp_path, 16)
    with EvaluationStore.open(tmp_path / "evaluations.db", create=False) as store:
        recorded = [ask for ask, _ in store.read()]
    assert len(recorded) == count
    asks, pool = run(tmp_path, 16)
    assert not set(recorded) & set(pool.submitted)
    assert len(set(pool.submitted)) == len(pool.submitted) == len(asks) - count
    (tmp_path / "whole").mkdir()
    assert asks == run(tmp_path / "whole", 16)[0]


def test_progress_counts_places(tmp_path: Path) -> None:
    seen: list[Progress] = []
    with EvaluationStore.open(tmp_path / "evaluations.db", create=True) as store:
        drive(
            ScreeningSearch(),
            ThreadPool(2),
            store,
            num_evaluations=14,
            on_progress=seen.append,
            screening=SCREENING,
        )
    assert [step.done for step in seen] == sorted(step.done for step in seen)
    assert (seen[-1].done, seen[-1].total) == (14, 14)


# --- the choice ---------------------------------------------------------------------------------


def screened(*values: float | None) -> list[tuple[Ask, Outcome]]:
    """Return results of a second place's alternatives; none: it failed."""
    other, own = ([strategy_of(f"{place} {k}") for k in range(len(values))] for place in "ab")
    asks = [ask for ask in SCREENING.asks(5, [other, own]) if SCREENING.place(ask) == 1]
    return [
        (
            ask,
            FailedEvaluation(strategy_key=ask.strategy.key, kind="E", message="no")
            if kl is None
            else Evaluation(
                strategy_key=ask.strategy.key,
                kl=kl,
                kept_fraction=0.5,
                gradient=None,
                tokens=16,
                text_digest="t",
                cost_units=0.25,
                wall_s=0.0,
            ),
        )
        for ask, kl in zip(asks, values, strict=True)
    ]


@pytest.mark.parametrize(
    ("values", "best"),
    [((3.0, 1.0, 2.0), 1), ((1.0, 1.0, 2.0), 0), ((None, 2.0, 3.0), 1), ((None, None), None)],
)
def test_the_least_kl_is_chosen_the_first_of_equals_and_nothing_that_failed(
    values: tuple[float | None, ...], best: int | None
) -> None:
    results = screened(*values)
    for order in (results, results[::-1]):
        chosen = SCREENING.choose(order)
        if best is None:
            assert chosen is None
        else:
            assert chosen == Ask(
                round=5, position=1, strategy=results[best][0].strategy, derivatives=True
            )


def test_equal_alternatives_are_judged_once() -> None:
    one, other = strategy_of("one"), strategy_of("other")
    asks = SCREENING.asks(0, [[one, one, other, one], [one]])
    assert [(ask.position, ask.strategy) for ask in asks] == [(0, one), (1, other), (4, one)]


# --- the search ---------------------------------------------------------------------------------


def told_search(**changes: object) -> tuple[FrontSearch, ToyModel, History]:
    """Return a search that was told two blind rounds, and what a surrogate may see of them."""
    config = replace(toy_config("default"), **changes)  # type: ignore[arg-type]
    search, model, history = build_search(config), ToyModel(config.space()), History()
    assert isinstance(search, FrontSearch)
    for round_ in range(2):
        results: list[tuple[Ask, Outcome]] = [(a, model.evaluate(a)) for a in search.ask(round_)]
        assert all(ask.tokens is None for ask, _ in results), "nothing is known to choose by"
        search.tell(round_, results)
        history.tell(round_, results)
    return search, model, history


def test_alternatives_of_a_place_have_one_size_and_the_first_is_the_network_s() -> None:
    plain, model, _ = told_search()
    search, _, _ = told_search(screen_tokens=32)
    asks = search.ask(2)
    assert search.ask(2) == asks
    assert {(ask.tokens, ask.derivatives) for ask in asks} == {(32, False)}
    cost = model.space.cost
    for place, own in enumerate(plain.ask(2)):
        group = [ask.strategy for ask in asks if ask.position // ALTERNATIVES == place]
        assert group[0] == own.strategy
        assert 2 <= len(group) <= ALTERNATIVES
        assert {cost.size_of(strategy.values) for strategy in group} == {
            cost.size_of(own.strategy.values)
        }


def test_a_surrogate_never_sees_values_of_part_of_the_text() -> None:
    search, model, history = told_search(screen_tokens=32)
    asks = search.ask(2)
    cheap: list[tuple[Ask, Outcome]] = [(a, replace(model.evaluate(a), kl=9.0)) for a in asks]
    best = SCREENING.choose(cheap[:1])
    assert best is not None
    history.tell(2, [*cheap, (best, model.evaluate(best))])
    seen = history.visible(4)
    assert [strategy for strategy, _ in seen][-1] == best.strategy
    assert len(seen) == 2 * search.round_size + 1
    assert max(evaluation.kl for _, evaluation in seen) < 9.0


def test_daring_points_meet_their_budgets_and_lower_what_they_minimise() -> None:
    space = toy_config("default").space()
    model = ToyModel(space)
    kept = space.relaxed_budgets(torch.tensor([0.4, 0.7], dtype=torch.float64))
    start = torch.zeros(2, space.num_axes, dtype=torch.float64)
    ways = daring_points(lambda x: (model.kl(x).log(), torch.ones(len(x))), space, start, kept)
    before = model.kl(space.project_logits(start, kept))
    assert len(ways) == ALTERNATIVES - 1
    for points in ways:
        assert torch.allclose(space.project(points, kept), points, atol=1e-3)
        assert (model.kl(points) < before).all()
