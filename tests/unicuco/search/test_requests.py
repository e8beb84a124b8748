"""Searches of one request: the contract for each, what each is known for, and the adapter."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from unicuco.allocate import AllocationContext, Allocator
from unicuco.pipeline.backend import LocalBackend
from unicuco.search import REQUEST_SEARCHES, RequestConfig, SearchAllocator
from unicuco.search.descent import Descent
from unicuco.search.drive import Progress, drive, outcome_of
from unicuco.search.optspa import NUM_BINS, OptSpa, bin_of_axes, bins_strategy
from unicuco.search.progression import Progression
from unicuco.search.request import axis_blocks, run_request
from unicuco.store import EvaluationStore
from unicuco.testing.allocator import AllocatorContract
from unicuco.testing.cases import EvaluationCase, make_evaluation_case
from unicuco.testing.planted import (
    planted_case,
    planted_judge,
    reversed_strategy,
    shuffled_strategy,
)
from unicuco.testing.request_contract import RequestSearchContract, ToyJudge, toy_request
from unicuco.testing.tiny import tiny_model_folder
from unicuco.types import Ask, Evaluation, FailedEvaluation, Outcome, Strategy


class TestOptSpa(RequestSearchContract):
    name = "optspa"
    units = 24.0


class TestEvop(RequestSearchContract):
    name = "evop"


class TestProgression(RequestSearchContract):
    name = "atp"
    units = None


class TestDescent(RequestSearchContract):
    name = "descent"
    units = 24.0


class _SearchAllocatorContract(AllocatorContract):
    units: float = 6.0

    def make(self, context: AllocationContext) -> Allocator:
        cost = context.space.cost
        config = RequestConfig(
            space=context.space,
            curves=context.curves,
            blocks=axis_blocks(cost.profile, cost.granularity),  # type: ignore[attr-defined]
            sparsity=0.0,
            tokens=64,
            seed=1,
            units=self.units,
        )
        make = REQUEST_SEARCHES[self.name]
        return SearchAllocator(self.name, make, config, lambda s: run_request(s, _judge(context)))


@pytest.mark.slow
class TestEvoPressAllocates(_SearchAllocatorContract):
    name = "evopress"
    units = 9.0


class TestEvopAllocates(_SearchAllocatorContract):
    name = "evop"


class TestOptSpaAllocates(_SearchAllocatorContract):
    name = "optspa"


class TestProgressionAllocates(_SearchAllocatorContract):
    name = "atp"


class TestDescentAllocates(_SearchAllocatorContract):
    name = "descent"


def _judge(context: AllocationContext):  # type: ignore[no-untyped-def]
    """Judge by the sum of the context's curves."""

    def evaluate(ask: Ask) -> Outcome:
        unit = context.space.encode([ask.strategy])
        slopes = context.curves.slopes(unit)[0] / context.space.span
        return Evaluation(
            strategy_key=ask.strategy.key,
            kl=float(context.curves.values(unit).sum()),
            kept_fraction=0.5,
            gradient=tuple(slopes.tolist()) if ask.derivatives else None,
            tokens=ask.tokens or 64,
            text_digest="",
            cost_units=(3.0 if ask.derivatives else 1.0) * (ask.tokens or 64) / 64,
            wall_s=0.0,
        )

    return evaluate


def test_every_registered_search_has_both_contract_tests() -> None:
    searched = {kind.name for kind in RequestSearchContract.__subclasses__()} | {"evopress"}
    assert set(REQUEST_SEARCHES) == searched
    assert set(REQUEST_SEARCHES) == {k.name for k in _SearchAllocatorContract.__subclasses__()}


# --- OptSpa -------------------------------------------------------------------------------------


def test_optspa_makes_fifty_trials_of_eight_bins_within_reach_of_the_target() -> None:
    search, judge = OptSpa(toy_request(0.6)), ToyJudge()
    run_request(search, judge)
    assert len(judge.asked) == 50
    bins = bin_of_axes(judge.space.num_axes)
    for ask in judge.asked:
        values = torch.tensor(ask.strategy.values, dtype=torch.float64)
        for k in range(NUM_BINS):
            inside = values[bins == k]
            assert len(inside) == 0 or float(inside.max() - inside.min()) < 0.01
        assert float((values - 0.6).abs().max()) < 0.1 + 0.01  # 0.05, and the projection


def test_axes_make_eight_even_runs_or_one_bin_each() -> None:
    assert bin_of_axes(16).tolist() == [k for k in range(8) for _ in range(2)]
    assert bin_of_axes(3).tolist() == [0, 1, 2]
    sizes = bin_of_axes(42).bincount().tolist()
    assert len(sizes) == 8
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.slow
def test_tpe_is_no_worse_than_random_search_at_equal_trials() -> None:
    found, drawn = [], []
    for seed in range(5):
        search, judge = OptSpa(toy_request(0.6, seed=seed)), ToyJudge()
        run_request(search, judge)
        found.append(search.record.best_kl)
        drawn.append(min(_kl(judge, strategy) for strategy in _random_bins(seed, 50)))
    assert statistics.median(found) <= statistics.median(drawn)


def _random_bins(seed: int, count: int) -> list[Strategy]:
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(-2, 3, (count, NUM_BINS), generator=generator)
    return [bins_strategy(toy_request(0.6), tuple((0.025 * row).tolist())) for row in steps]


def _kl(judge: ToyJudge, strategy: Strategy) -> float:
    outcome = judge(Ask(round=0, position=0, strategy=strategy, derivatives=False))
    assert isinstance(outcome, Evaluation)
    return outcome.kl


def test_optspa_works_on_the_language_tower_of_a_multimodal_model(tmp_path: Path) -> None:
    case = make_evaluation_case(tiny_model_folder(tmp_path / "llava", "llava"))
    evaluator = case.evaluator()
    assert all("vision" not in site.path for site in case.loaded.profile.sites)
    search = OptSpa(request_to(case, 0.6, units=12))
    run_request(search, lambda ask: evaluator.evaluate(ask.strategy))
    assert search.record.evaluations == 12
    kept = case.space.cost.kept_params(search.best.values)
    assert kept == case.space.kept_for_sparsity(0.6)


# --- ATP ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_a_progression_rises_by_equal_steps_at_exactly_the_target(sparsity: float) -> None:
    search = Progression(toy_request(sparsity))
    space, blocks = search.config.space, search.config.blocks
    for share in (0.0, 0.4, 0.9):
        strategy = search.progression(share)
        assert space.cost.kept_params(strategy.values) == space.kept_for_sparsity(sparsity)
        means = [
            statistics.fmean(v for v, b in zip(strategy.values, blocks, strict=True) if b == block)
            for block in range(max(blocks) + 1)
        ]
        steps = [after - before for before, after in pairwise(means)]
        assert max(steps) - min(steps) < 2e-3
        assert min(steps) >= -1e-3
        assert (share == 0) == (max(steps) < 1e-3)


def test_a_progression_takes_a_handful_of_trials_and_refines_around_the_best() -> None:
    search, judge = Progression(toy_request(0.6)), ToyJudge()
    run_request(search, judge)
    assert 5 <= len(judge.asked) <= 9
    assert [len({ask.round for ask in judge.asked})] == [3]


# --- descent ------------------------------------------------------------------------------------


def test_descent_walks_down_with_derivatives_alone() -> None:
    search, judge = Descent(toy_request(0.6)), ToyJudge()
    run_request(search, judge)
    assert all(ask.derivatives for ask in judge.asked)
    assert len(judge.asked) == 12
    assert search.record.units == 36.0
    assert search.record.best_kl < 0.97 * search.record.curve[0][1]


def test_a_dozen_steps_of_descent_beat_as_many_units_of_evolution() -> None:
    descent, evolution = (
        REQUEST_SEARCHES[name](toy_request(0.6, units=36)) for name in ("descent", "evopress")
    )
    run_request(descent, ToyJudge())
    run_request(evolution, ToyJudge())
    assert descent.record.best_kl < evolution.record.best_kl


# --- over a pool, with a store --------------------------------------------------------------------


def request_to(case: EvaluationCase, sparsity: float, *, units: float | None) -> RequestConfig:
    return RequestConfig(
        space=case.space,
        curves=case.curves,
        blocks=axis_blocks(case.loaded.profile, case.config.granularity),
        sparsity=sparsity,
        tokens=case.tokens.num_tokens,
        seed=0,
        units=units,
    )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EvaluationStore]:
    with EvaluationStore.open(tmp_path / "search.db", create=True) as store:
        yield store


class _StopError(Exception):
    pass


@pytest.mark.parametrize("name", REQUEST_SEARCHES)
@pytest.mark.slow
def test_a_search_that_was_stopped_goes_on_and_evaluates_nothing_twice(
    name: str, case: EvaluationCase, store: EvaluationStore, tmp_path: Path
) -> None:
    config = request_to(case, 0.6, units=13)
    whole = REQUEST_SEARCHES[name](config)
    with EvaluationStore.open(tmp_path / "whole.db", create=True) as other:
        _drive(name, whole, case, other)
        expected = [(ask, _value(outcome)) for ask, outcome in other.read()]

    def stop(step: Progress) -> None:
        if step.done > len(expected) // 2:
            raise _StopError

    stopped = REQUEST_SEARCHES[name](config)
    with pytest.raises(_StopError):
        _drive(name, stopped, case, store, stop)
    resumed = REQUEST_SEARCHES[name](config)
    _drive(name, resumed, case, store)
    assert [(ask, _value(outcome)) for ask, outcome in store.read()] == expected
    assert resumed.best == whole.best
    assert resumed.record.curve == whole.record.curve
    again = REQUEST_SEARCHES[name](config)
    _drive(name, again, case, store, lambda step: None)
    assert again.record.evaluations == len(expected)


def _drive(name, search, case, store, progress=lambda step: None) -> None:  # type: ignore[no-untyped-def]
    pool = LocalBackend().start_pool(case.config, case.arrays)
    drive(
        search,
        pool,
        store,
        num_evaluations=search.num_evaluations,
        on_progress=progress,
        lag=search.lag,
    )


def _value(outcome: Outcome) -> tuple[str, float]:
    assert not isinstance(outcome, FailedEvaluation)
    return replace(outcome, wall_s=0.0).strategy_key, outcome.kl


@pytest.mark.slow
@pytest.mark.parametrize("name", REQUEST_SEARCHES)
def test_on_planted_sensitivity_a_search_beats_uniform_and_its_own_answer_misplaced(
    name: str,
) -> None:
    case, judge = planted_case(), planted_judge()
    search = REQUEST_SEARCHES[name](request_to(case, 0.6, units=50))
    run_request(search, lambda ask: outcome_of(judge, ask))
    found = judge.evaluate(search.best).kl
    others = [case.space.uniform(0.6), reversed_strategy(case.space, search.best)]
    others += [shuffled_strategy(case.space, search.best, seed=seed) for seed in range(2)]
    assert all(found < judge.evaluate(other).kl for other in others)
