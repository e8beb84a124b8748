"""What a number of units pays for, screening counted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.fidelity import within
from unicuco.search.screening import ALTERNATIVES
from unicuco.testing.search_contract import ToyModel, toy_config
from unicuco.types import Ask, Evaluation


@pytest.mark.parametrize(
    ("screen_tokens", "units", "count"),
    [(0, 8.9, 2), (0, 9.0, 3), (0, 99.0, 6), (16, 9.0, 2), (16, 12.0, 3)],
)
def test_an_evaluation_costs_what_its_alternatives_did_too(
    screen_tokens: int, units: float, count: int
) -> None:
    config = replace(toy_config("default"), screen_tokens=screen_tokens)
    model = ToyModel(config.space())
    strategies = [config.space().uniform(0.1 + 0.02 * k) for k in range(6 * ALTERNATIVES)]
    whole = [
        Ask(round=k // 3, position=k % 3, strategy=strategies[k * ALTERNATIVES], derivatives=True)
        for k in range(6)
    ]
    results: list[tuple[Ask, Evaluation]] = [(ask, model.evaluate(ask)) for ask in whole]
    if config.screening is not None:
        for round_ in range(2):
            first = 3 * round_ * ALTERNATIVES
            groups = [
                strategies[first + k * ALTERNATIVES : first + (k + 1) * ALTERNATIVES]
                for k in range(3)
            ]
            cheap = config.screening.asks(round_, groups)
            results += [(ask, replace(model.evaluate(ask), cost_units=0.25)) for ask in cheap]
    evaluated = within(config, results, units)
    assert [strategy for strategy, _ in evaluated] == [ask.strategy for ask in whole[:count]]
