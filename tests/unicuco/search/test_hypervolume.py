from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unicuco.search.hypervolume import greedy_batch, hypervolume

REFERENCE = torch.tensor([10.0, 10.0])
coordinates = st.integers(0, 11)
sets = st.lists(st.tuples(coordinates, coordinates), min_size=0, max_size=7)


def cells(points: list[tuple[int, int]]) -> int:
    """Count the unit cells below the reference that a point dominates."""
    return sum(
        any(x <= cell_x and y <= cell_y for x, y in points)
        for cell_x, cell_y in itertools.product(range(10), range(10))
    )


@given(sets)
def test_the_hypervolume_is_the_number_of_dominated_cells(points: list[tuple[int, int]]) -> None:
    tensor = torch.tensor(points, dtype=torch.float64).reshape(-1, 2)
    assert hypervolume(tensor, REFERENCE) == cells(points)


@given(sets, sets)
def test_more_points_never_lower_the_hypervolume(
    one: list[tuple[int, int]], other: list[tuple[int, int]]
) -> None:
    first = torch.tensor(one, dtype=torch.float64).reshape(-1, 2)
    both = torch.tensor(one + other, dtype=torch.float64).reshape(-1, 2)
    assert hypervolume(both, REFERENCE) >= hypervolume(first, REFERENCE)


def slow_greedy(measured: Tensor, candidates: Tensor, size: int) -> float:
    """The hypervolume after adding the best candidate ``size`` times, each found by trying all."""
    reference = torch.cat([measured, candidates]).max(0).values + 1e-9
    points = measured
    for _ in range(size):
        volumes = [hypervolume(torch.cat([points, c[None]]), reference) for c in candidates]
        best = max(range(len(candidates)), key=volumes.__getitem__)
        points = torch.cat([points, candidates[best : best + 1]])
    return hypervolume(points, reference)


@pytest.mark.parametrize("seed", range(8))
def test_the_greedy_batch_gains_what_trying_all_candidates_gains(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    measured = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    candidates = torch.randn(30, 2, generator=generator, dtype=torch.float64)
    chosen = greedy_batch(measured, candidates, 5)
    assert len(set(chosen)) == 5
    reference = torch.cat([measured, candidates]).max(0).values + 1e-9
    volume = hypervolume(torch.cat([measured, candidates[chosen]]), reference)
    assert volume == pytest.approx(slow_greedy(measured, candidates, 5))


def test_a_batch_of_dominated_candidates_still_has_different_members() -> None:
    measured = torch.zeros(1, 2, dtype=torch.float64)
    candidates = torch.ones(6, 2, dtype=torch.float64)
    assert len(set(greedy_batch(measured, candidates, 4))) == 4
