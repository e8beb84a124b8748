"""What units pay for, what optimisers ask, and which of it answers."""

from __future__ import annotations

import pytest
import torch

from benchmarks.learning import non_dominated, num_evaluations
from benchmarks.optimisers import OPTIMISERS, Domain
from unicuco.testing.search_contract import ToyModel, toy_config
from unicuco.types import Ask


@pytest.mark.parametrize(
    ("method", "units", "count"),
    [
        ("default", 10, 1),
        ("default", 11, 2),
        ("default", 110, 35),
        ("paper", 10, 8),
        ("nsga2", 330, 328),
    ],
)
def test_units_pay_for_preparation_first(method: str, units: float, count: int) -> None:
    assert num_evaluations(method, units) == count


@pytest.mark.parametrize("name", ["random", "latin hypercubes"])
def test_points_fill_the_cube_and_repeat_by_seed(name: str) -> None:
    space = toy_config("paper").space()
    domain = Domain(space=space, total_params=1, site_weights=1)

    def asked(seed: int) -> torch.Tensor:
        optimiser = OPTIMISERS[name](domain, seed)
        return torch.cat([optimiser.ask(), optimiser.ask()])

    points = asked(0)
    assert points.shape == (20, space.num_axes)
    assert points.dtype == torch.float64
    assert 0 <= points.min() < 0.2 < 0.8 < points.max() <= 1
    assert torch.equal(points, asked(0))
    assert not torch.equal(points, asked(1))
    assert not torch.equal(points[:10], points[10:])


def test_only_what_nothing_beats_in_both_answers() -> None:
    space = toy_config("paper").space()
    model = ToyModel(space)
    strategies = [space.uniform(s) for s in (0.2, 0.5, 0.8)] + space.decode(
        torch.rand(20, space.num_axes, generator=torch.Generator().manual_seed(0))
    )
    asks = [
        Ask(round=0, position=k, strategy=s, derivatives=False) for k, s in enumerate(strategies)
    ]
    evaluated = [(ask.strategy, model.evaluate(ask)) for ask in asks]
    beaten = {
        strategy.key
        for strategy, one in evaluated
        for _, other in evaluated
        if other.kept_fraction <= one.kept_fraction
        and other.kl <= one.kl
        and (other.kept_fraction, other.kl) != (one.kept_fraction, one.kl)
    }
    answers = {strategy.key for strategy, _ in non_dominated(evaluated)}
    assert answers
    assert answers == {strategy.key for strategy, _ in evaluated} - beaten
