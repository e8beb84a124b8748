"""Acceptance of the searches of one request: on planted sensitivity, and on a known toy."""

from __future__ import annotations

import statistics
from dataclasses import replace
from itertools import pairwise
from typing import Final

import torch

from benchmarks.common import Finding
from unicuco.search import REQUEST_SEARCHES, RequestConfig, RequestSearch
from unicuco.search.drive import outcome_of
from unicuco.search.evop import Evop, EvopOptions, one_at_a_time
from unicuco.search.optspa import NUM_BINS, bins_strategy
from unicuco.search.progression import Progression
from unicuco.search.request import axis_blocks, run_request
from unicuco.testing.cases import EvaluationCase, random_tokens
from unicuco.testing.planted import (
    planted_case,
    planted_judge,
    reversed_strategy,
    shuffled_strategy,
)
from unicuco.testing.request_contract import ToyJudge, toy_request
from unicuco.types import Ask, Evaluation, Outcome, Strategy

_SPARSITY: Final = 0.6
_UNITS: Final = 50.0
_EVOP_UNITS: Final = 150.0
_SEEDS: Final = 5


def findings() -> list[Finding]:
    """Measure everything."""
    return [
        *(finding for name in REQUEST_SEARCHES for finding in _planted(name)),
        *_optspa(),
        *_progression(),
        *_descent(),
        *_evop(),
    ]


def _planted(name: str) -> list[Finding]:
    case, judge = planted_case(), planted_judge()
    space, config = case.space, _request_to(case, units=_UNITS)
    search, asked = REQUEST_SEARCHES[name](config), list[Ask]()

    def evaluate(ask: Ask) -> Evaluation:
        asked.append(ask)
        outcome = outcome_of(judge, ask)
        assert isinstance(outcome, Evaluation), outcome
        return outcome

    run_request(search, evaluate)
    again = REQUEST_SEARCHES[name](config)
    run_request(again, lambda ask: outcome_of(judge, ask))
    best = search.best
    kl = judge.evaluate(best).kl
    shuffled = [shuffled_strategy(space, best, seed=seed) for seed in range(_SEEDS)]
    wanted = space.kept_for_sparsity(_SPARSITY)
    off = max(abs(space.cost.kept_params(ask.strategy.values) - wanted) for ask in asked)
    rises = [after - before for (_, before), (_, after) in pairwise(search.record.curve)]
    test = f"planted sensitivity, {_UNITS:.0f} units, KL at {_SPARSITY} relative to"
    return [
        Finding(name, f"{test} uniform's", kl / _kl(space.uniform(_SPARSITY)), "< 1"),
        Finding(name, f"{test} its own reversed", kl / _kl(reversed_strategy(space, best)), "< 1"),
        Finding(
            name, f"{test} its own shuffled, worst of five", kl / min(map(_kl, shuffled)), "< 1"
        ),
        Finding(name, "weights off the budget, worst of all that was asked", off, "<= 0"),
        Finding(name, "largest rise of the best so far", max(rises, default=0.0), "<= 0"),
        Finding(name, "the same seed finds the same", float(again.best == best), ">= 1"),
    ]


def _request_to(case: EvaluationCase, *, units: float) -> RequestConfig:
    return RequestConfig(
        space=case.space,
        curves=case.curves,
        blocks=axis_blocks(case.loaded.profile, case.config.granularity),
        sparsity=_SPARSITY,
        tokens=case.tokens.num_tokens,
        seed=0,
        units=units,
    )


def _kl(strategy: Strategy) -> float:
    return planted_judge().evaluate(strategy).kl


def _evop() -> list[Finding]:
    """Measure EvoP's patterns: as this project uses them, and as published (whole members)."""
    case, judge = planted_case(), planted_judge()
    unseen = random_tokens(seed=3, num_windows=8, context=48)
    evaluator, found = case.evaluator_on(unseen), list[Finding]()
    axes = case.space.num_axes
    for name, options in (("", EvopOptions()), (" at full depth", EvopOptions(depth=1.0))):
        search = Evop(_request_to(case, units=_EVOP_UNITS), options)
        asked: list[Strategy] = []

        def evaluate(ask: Ask, asked: list[Strategy] = asked) -> Outcome:
            asked.append(ask.strategy)
            return outcome_of(judge, ask)

        run_request(search, evaluate)
        ranked = search.strategy(one_at_a_time(search, _kl))
        held_out = evaluator.evaluate(search.best).kl
        counts = {sum(value > _SPARSITY for value in strategy.values) for strategy in asked}
        test = f"{_EVOP_UNITS:.0f} units{name}, KL on text that it did not see, relative to"
        found += [
            Finding("evop", f"different numbers of members of {axes}{name}", len(counts), "== 1"),
            Finding(
                "evop",
                f"{test} removing what costs least alone",
                held_out / evaluator.evaluate(ranked).kl,
                "<= 1" if not name else "",
            ),
            Finding(
                "evop",
                f"{test} uniform's",
                held_out / evaluator.evaluate(case.space.uniform(_SPARSITY)).kl,
                "< 1" if not name else "",
            ),
        ]
    return found


def _toy(search: RequestSearch) -> float:
    run_request(search, ToyJudge())
    return search.record.best_kl


def _toy_kl(strategy: Strategy) -> float:
    outcome = ToyJudge()(Ask(round=0, position=0, strategy=strategy, derivatives=False))
    assert isinstance(outcome, Evaluation)
    return outcome.kl


def _optspa() -> list[Finding]:
    found, drawn = [], []
    for seed in range(_SEEDS):
        config = toy_request(_SPARSITY, seed=seed)
        found.append(_toy(REQUEST_SEARCHES["optspa"](config)))
        generator = torch.Generator().manual_seed(seed)
        offsets = 0.025 * torch.randint(-2, 3, (50, NUM_BINS), generator=generator)
        drawn.append(min(_toy_kl(bins_strategy(config, tuple(row))) for row in offsets.tolist()))
    ratio = statistics.median(found) / statistics.median(drawn)
    return [Finding("optspa", "TPE relative to random search, 50 trials, medians", ratio, "<= 1")]


def _progression() -> list[Finding]:
    search = Progression(toy_request(_SPARSITY))
    values = search.progression(0.5).values
    blocks = search.config.blocks
    means = [
        statistics.fmean(v for v, b in zip(values, blocks, strict=True) if b == block)
        for block in range(max(blocks) + 1)
    ]
    steps = [after - before for before, after in pairwise(means)]
    return [
        Finding("atp", "spread of the steps between blocks", max(steps) - min(steps), "< 0.002"),
        Finding("atp", "smallest step between blocks", min(steps), "> 0"),
    ]


def _descent() -> list[Finding]:
    config = replace(toy_request(_SPARSITY), units=36.0)
    ratio = _toy(REQUEST_SEARCHES["descent"](config)) / _toy(REQUEST_SEARCHES["evopress"](config))
    return [Finding("descent", "KL relative to evolution's at 36 units, toy", ratio, "< 1")]
