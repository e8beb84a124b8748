from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from unicuco.search.drops import DropSearch
from unicuco.search.request import RequestConfig, run_request
from unicuco.testing.search_contract import ToyModel, toy_config
from unicuco.types import Ask, Evaluation

CONFIG = toy_config("default", dimensions=("depth",))
MODEL = ToyModel(CONFIG.space())
REQUEST = RequestConfig(
    space=MODEL.space,
    curves=CONFIG.axis_curves(),
    blocks=tuple(range(MODEL.space.num_axes)),
    sparsity=0.4,
    tokens=64,
    seed=3,
    units=40.0,
)


def judge(ask: Ask) -> Evaluation:
    share = 1.0 if ask.tokens is None else ask.tokens / REQUEST.tokens
    return replace(MODEL.evaluate(ask), cost_units=share)


def test_it_finds_what_enumeration_finds_within_its_units() -> None:
    search = DropSearch(REQUEST)
    run_request(search, judge)
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * MODEL.space.num_axes)
    budget = MODEL.space.kept_for_sparsity(REQUEST.sparsity)
    within = every[(MODEL.space.cost.kept(every) <= budget) & (every.sum(1) < every.shape[1])]
    best = float(MODEL.kl(within).min())
    assert MODEL.space.cost.kept_params(search.best.values) <= budget
    assert search.record.best_kl <= best * 1.001
    assert search.record.units <= 40.0


@pytest.mark.slow
def test_the_same_seed_asks_the_same_and_nothing_above_the_budget() -> None:
    asked: list[list[Ask]] = []
    for _ in range(2):
        search, asks = DropSearch(REQUEST), []
        run_request(search, lambda ask, asks=asks: asks.append(ask) or judge(ask))
        asked.append(asks)
    assert asked[0] == asked[1]
    assert len(asked[0]) <= DropSearch(REQUEST).num_evaluations
    budget = MODEL.space.kept_for_sparsity(REQUEST.sparsity)
    assert all(MODEL.space.cost.kept_params(a.strategy.values) <= budget for a in asked[0])


def test_children_keep_the_size_of_their_parent() -> None:
    search = DropSearch(REQUEST)
    for round_ in range(2):
        search.tell(round_, [(ask, judge(ask)) for ask in search.ask(round_)])
    parent = MODEL.space.cost.kept_params(search.best.values)
    for ask in search.ask(2):
        assert MODEL.space.cost.kept_params(ask.strategy.values) == parent
