from __future__ import annotations

import pytest
import torch

from unicuco.allocate import ALLOCATORS, AllocationContext
from unicuco.testing.coupled import CoupledResponse
from unicuco.types import Strategy

TARGETS = (0.3, 0.6)


@pytest.fixture(scope="module")
def response() -> CoupledResponse:
    return CoupledResponse(2, seed=0)


def moved(response: CoupledResponse, steps: dict[int, float]) -> Strategy:
    """The uniform strategy at a half with some settings moved."""
    names, values = response.space.names, list(response.space.uniform(0.5).values)
    for axis, step in steps.items():
        values[axis] += step
    return Strategy(settings=tuple(zip(names, values, strict=True)))


@pytest.mark.slow
def test_the_optimum_meets_its_budgets_and_is_ahead_of_what_single_sites_say(
    response: CoupledResponse,
) -> None:
    best = response.optimum(TARGETS)
    cost = response.space.cost
    for target, strategy in zip(TARGETS, best, strict=True):
        dropped = sum(cost.site_drops(strategy.values).values())
        assert dropped / cost.num_site_weights == pytest.approx(target, abs=1e-4)
    context = AllocationContext(space=response.space, curves=response.config.axis_curves())
    found = response.kl(best)
    for name in ("fisher", "uniform"):
        others = response.kl(ALLOCATORS[name](context).allocate(TARGETS))
        assert all(kl < 0.98 * other for kl, other in zip(found, others, strict=True)), name


def test_neighbours_are_not_additive_and_strangers_are(response: CoupledResponse) -> None:
    def together(one: int, other: int) -> float:
        steps = [{}, {one: 0.2}, {other: 0.2}, {one: 0.2, other: 0.2}]
        none, first, second, both = response.kl([moved(response, step) for step in steps])
        return abs(both - first - second + none)

    assert together(1, 2) > 1e-5
    assert together(0, 8) > 1e-5, "the same site of the next block"
    assert together(0, 5) < 1e-12


def test_derivatives_are_those_of_the_response_and_err_by_a_share(
    response: CoupledResponse,
) -> None:
    strategy = moved(response, {})
    gradient = response.evaluate(strategy, derivatives=True).gradient
    assert gradient is not None
    step = 1e-5
    errors = []
    for axis, slope in enumerate(gradient):
        ahead, behind = response.kl([moved(response, {axis: sign * step}) for sign in (1, -1)])
        errors.append(slope / ((ahead - behind) / (2 * step)) - 1)
    spread = torch.tensor(errors)
    assert 0.05 < float(spread.square().mean().sqrt()) < 0.3
    assert response.evaluate(strategy, derivatives=True).gradient == gradient
    assert response.evaluate(strategy).gradient is None
