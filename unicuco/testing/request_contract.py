"""The contract of searches of one request: subclass `RequestSearchContract`, and its tests run."""

# ruff: noqa: D102 - a test's name is its sentence of behaviour

from __future__ import annotations

import hashlib
import pickle
from dataclasses import replace
from functools import cache
from typing import ClassVar, Final

import pytest

from unicuco.allocate import AxisCurves
from unicuco.dimensions import Granularity, build_space
from unicuco.search import REQUEST_SEARCHES, RequestConfig, RequestSearch
from unicuco.search.request import axis_blocks, run_request
from unicuco.space import StrategySpace
from unicuco.testing.profiles import make_profile
from unicuco.testing.search_contract import ToyModel
from unicuco.types import Ask, Evaluation, FailedEvaluation, Outcome

_PROFILE: Final = make_profile(
    [[(40, 60), (80, 30)], [(50, 50), (20, 90)], [(60, 60), (30, 30)], [(40, 40)]]
)
_TOKENS: Final = 1024


@cache
def toy_space() -> StrategySpace:
    """Return the space of the toy model."""
    return build_space(_PROFILE)


def toy_request(sparsity: float, *, seed: int = 0, units: float | None = None) -> RequestConfig:
    """Return a request to the toy model."""
    space = toy_space()
    return RequestConfig(
        space=space,
        curves=AxisCurves(ToyModel(space).curves()),
        blocks=axis_blocks(_PROFILE, Granularity.LAYER),
        sparsity=sparsity,
        tokens=_TOKENS,
        seed=seed,
        units=units,
    )


class ToyJudge:
    """Judges asks by the toy model and remembers them.

    ``noise`` is the relative error of a judgement on few tokens, drawn from strategy and tokens;
    asks at ``fail`` (round, position) fail.
    """

    def __init__(self, *, noise: float = 0.0, fail: frozenset[tuple[int, int]] = frozenset()):
        self.space = toy_space()
        self._model = ToyModel(self.space)
        self._noise = noise
        self._fail = fail
        self.asked: list[Ask] = []

    def __call__(self, ask: Ask) -> Outcome:
        """Return the outcome of an ask."""
        self.asked.append(ask)
        if (ask.round, ask.position) in self._fail:
            return FailedEvaluation(strategy_key=ask.strategy.key, kind="E", message="no")
        whole = self._model.evaluate(ask)
        if ask.tokens is None:
            return replace(whole, tokens=_TOKENS)
        digest = hashlib.sha256(f"{ask.strategy.key} {ask.tokens}".encode()).digest()
        error = self._noise * (int.from_bytes(digest[:4]) / 2**31 - 1)
        share = ask.tokens / _TOKENS
        return replace(
            whole,
            kl=whole.kl * (1 + error),
            tokens=ask.tokens,
            cost_units=share * whole.cost_units,
        )


class RequestSearchContract:
    """What every entry of `REQUEST_SEARCHES` satisfies; subclasses set ``name``."""

    name: ClassVar[str]
    units: ClassVar[float | None] = 60.0

    def make(self, sparsity: float = 0.6, *, seed: int = 0) -> RequestSearch:
        """Return a fresh search."""
        return REQUEST_SEARCHES[self.name](toy_request(sparsity, seed=seed, units=self.units))

    def asked(self, *, seed: int = 0) -> tuple[RequestSearch, list[Ask]]:
        """Run a search and return it with all that it asked."""
        search, judge = self.make(seed=seed), ToyJudge(noise=0.1)
        run_request(search, judge)
        return search, judge.asked

    def test_numbers_its_asks(self) -> None:
        _, asks = self.asked()
        places = [(ask.round, ask.position) for ask in asks]
        assert places == sorted(set(places))

    def test_meets_its_budget_to_the_weight_with_every_ask(self) -> None:
        space = toy_space()
        for ask in self.asked()[1]:
            kept = space.cost.kept_params(ask.strategy.values)
            assert kept == space.kept_for_sparsity(0.6)
            assert space.decode(space.encode([ask.strategy])) == [ask.strategy]

    def test_asks_no_strategy_twice_at_one_fidelity(self) -> None:
        asks = self.asked()[1]
        assert len({(ask.strategy.key, ask.tokens) for ask in asks}) == len(asks)

    def test_makes_no_more_asks_and_spends_no_more_units_than_it_says(self) -> None:
        search, asks = self.asked()
        assert len(asks) <= search.num_evaluations
        assert search.record.evaluations == len(asks)
        if self.units is not None:
            assert search.record.units <= self.units + 1e-6

    def test_the_same_seed_asks_the_same(self) -> None:
        assert self.asked(seed=5)[1] == self.asked(seed=5)[1]

    def test_the_answer_is_the_best_on_the_whole_text_and_better_than_uniform(self) -> None:
        search, asks = self.asked()
        judge = ToyJudge()
        whole = {ask.strategy: judge(ask) for ask in asks if ask.tokens is None}
        values = {s: o.kl for s, o in whole.items() if isinstance(o, Evaluation)}
        assert values[search.best] == min(values.values()) == search.record.best_kl
        uniform = judge(
            Ask(round=0, position=0, strategy=judge.space.uniform(0.6), derivatives=False)
        )
        assert isinstance(uniform, Evaluation)
        assert search.record.best_kl < uniform.kl

    def test_the_best_so_far_never_rises(self) -> None:
        curve = self.asked()[0].record.curve
        assert curve
        assert [kl for _, kl in curve] == sorted((kl for _, kl in curve), reverse=True)
        assert [units for units, _ in curve] == sorted(units for units, _ in curve)

    def test_a_search_that_is_told_anew_goes_on_as_before(self) -> None:
        _, asks = self.asked()
        judge, rounds = ToyJudge(noise=0.1), 1 + asks[-1].round
        for cut in {1, rounds // 2, rounds - 1}:
            again = self.make()
            for round_ in range(cut):
                told = [ask for ask in asks if ask.round == round_]
                again.tell(round_, [(ask, judge(ask)) for ask in told])
            assert again.ask(cut) == [ask for ask in asks if ask.round == cut]
            assert again.ask(cut) == again.ask(cut)

    def test_failures_are_no_end(self) -> None:
        failed = frozenset({(0, 0), (1, 0), (2, 1), (3, 0)})
        search, judge = self.make(), ToyJudge(fail=failed)
        run_request(search, judge)
        assert judge.asked
        assert (
            search.best.key
            not in {ask.strategy.key for ask in judge.asked if (ask.round, ask.position) in failed}
            or not search.record.curve
        )

    def test_a_configuration_travels_by_pickle(self) -> None:
        config = toy_request(0.6, units=self.units)
        copy = pickle.loads(pickle.dumps(config))
        make = REQUEST_SEARCHES[self.name]
        assert make(copy).ask(0) == make(config).ask(0)

    @pytest.mark.parametrize("sparsity", [0.0, 0.9])
    def test_the_ends_of_the_range_have_an_answer(self, sparsity: float) -> None:
        search = self.make(sparsity)
        run_request(search, ToyJudge())
        space = toy_space()
        assert space.cost.kept_params(search.best.values) == space.kept_for_sparsity(sparsity)
