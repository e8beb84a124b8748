from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from unicuco.allocate import AxisCurves
from unicuco.dimensions import Granularity, build_space
from unicuco.errors import RequestError
from unicuco.search import build_search
from unicuco.search.transfer import carried_over, make_prior
from unicuco.space import StrategySpace
from unicuco.surrogate import GaussianProcess, Observations, SurrogateOptions
from unicuco.testing.coupled import CoupledResponse
from unicuco.testing.profiles import make_profile

SITES = ((4, 6), (8, 3))


def space_of(num_blocks: int, granularity: Granularity = Granularity.LAYER) -> StrategySpace:
    return build_space(make_profile([SITES] * num_blocks), ("sparsity",), granularity)


def test_a_model_of_the_same_depth_gets_the_answers_as_they_are() -> None:
    points = torch.rand(5, 6, dtype=torch.float64)
    assert torch.allclose(carried_over(space_of(3), space_of(3), points), points)


def test_a_deeper_model_reads_answers_at_the_same_relative_place_of_the_same_kind() -> None:
    shallow = torch.tensor([[0.0, 0.5, 0.8, 0.7]], dtype=torch.float64)  # blocks x sites
    deep = carried_over(space_of(2), space_of(4), shallow)[0].reshape(4, 2)
    # Centres of four blocks lie at -1/4, 1/4, 3/4, 5/4 of two blocks' centres 0 and 1.
    assert deep[:, 0].tolist() == pytest.approx([0.0, 0.2, 0.6, 0.8])
    assert deep[:, 1].tolist() == pytest.approx([0.5, 0.55, 0.65, 0.7])
    back = carried_over(space_of(4), space_of(2), deep.reshape(1, 8))
    assert back[0].tolist() == pytest.approx([0.1, 0.525, 0.7, 0.675])


def test_blocks_are_of_one_kind() -> None:
    block = Granularity.BLOCK
    points = torch.tensor([[0.2, 0.6]], dtype=torch.float64)
    found = carried_over(space_of(2, block), space_of(3, block), points)
    assert found[0].tolist() == pytest.approx([0.2, 0.4, 0.6])


def test_a_prior_leaves_the_blind_asks_as_they_are_and_moves_the_others() -> None:
    response = CoupledResponse(1, seed=0)
    prior = make_prior(response.space, response.space, surrogate_of(response.space, 0))
    alone = build_search(response.config)
    helped = build_search(replace(response.config, prior=prior))
    for k in range(2):
        asked = alone.ask(k)
        assert helped.ask(k) == asked
        results = [(a, response.evaluate(a.strategy, derivatives=True)) for a in asked]
        alone.tell(k, results)
        helped.tell(k, results)
    assert helped.ask(2) != alone.ask(2)


def surrogate_of(space: StrategySpace, seed: int) -> GaussianProcess:
    d = space.num_axes
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(d, 1, generator=generator, dtype=torch.float64)
    curves = AxisCurves(weights * torch.linspace(0, 1, 65, dtype=torch.float64).square())
    surrogate = GaussianProcess(SurrogateOptions(), curves)
    leaf = torch.rand(6, d, generator=generator, dtype=torch.float64, requires_grad=True)
    kl = curves.values(leaf).sum(1) * (1 + leaf[:, 0] * leaf[:, -1])
    (gradient,) = torch.autograd.grad(kl.sum(), leaf)
    span = torch.ones(d, dtype=torch.float64)
    surrogate.fit(
        Observations.from_measurements(leaf.detach(), kl.detach(), gradient.tolist(), span)
    )
    return surrogate


@pytest.mark.parametrize(("source", "target"), [(2, 2), (4, 2), (2, 4), (2, 6), (5, 7)])
def test_a_surrogate_of_another_depth_hears_of_every_block(source: int, target: int) -> None:
    there, here = space_of(source), space_of(target)
    surrogate = surrogate_of(there, 0)
    prior = make_prior(there, here, surrogate)
    assert surrogate.mean_ is not None
    scales = carried_over(there, here, surrogate.mean_.scales[None])[0]
    assert torch.equal(prior.centre[: here.num_axes], scales)
    uniform = torch.full((1, here.num_axes), 0.3, dtype=torch.float64)
    assert (uniform @ prior.places).flatten().tolist() == pytest.approx([0.3] * there.num_axes)
    if source <= target:
        assert bool((prior.places.sum(1) > 0).all())
    if source == target:
        assert torch.equal(prior.places, torch.eye(here.num_axes, dtype=torch.float64))


def test_another_architecture_or_granularity_is_refused() -> None:
    layers, blocks = space_of(2), space_of(2, Granularity.BLOCK)
    narrower = build_space(make_profile([SITES[:1]]), ("sparsity",), Granularity.LAYER)
    for source, target in itertools.permutations((layers, blocks, narrower), 2):
        with pytest.raises(RequestError, match="same architecture and granularity; only one"):
            make_prior(source, target, surrogate_of(source, 0))


def test_a_surrogate_without_curves_is_no_prior() -> None:
    space = space_of(2)
    surrogate = GaussianProcess(SurrogateOptions(curves=False))
    points = torch.rand(4, 4, dtype=torch.float64)
    nothing = [None] * len(points)
    span = torch.ones(4, dtype=torch.float64)
    surrogate.fit(Observations.from_measurements(points, points.sum(1), nothing, span))
    with pytest.raises(RequestError, match="a run of preset default"):
        make_prior(space, space, surrogate)
