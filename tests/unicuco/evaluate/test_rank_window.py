from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unicuco.evaluate.rank_window import site_derivative
from unicuco.ranks import cut, rank_rows

ROWS, COLUMNS = 12, 200


def quadratic() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights, ranks, a curvature and a slope: KL = slope . (w~ - w) + curvature (w~ - w)^2 / 2."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    rank = rank_rows(weight.abs())
    curvature = 0.1 + torch.rand(ROWS, COLUMNS, generator=generator)
    slope = 0.2 * torch.randn(ROWS, COLUMNS, generator=generator)
    return weight, rank, curvature, slope


def loss(pruned: Tensor, weight: Tensor, curvature: Tensor, slope: Tensor) -> Tensor:
    change = pruned - weight
    return (slope * change + curvature * change.square() / 2).double().sum()


@pytest.mark.parametrize("sparsity", [0.0, 0.015, 0.06, 0.3, 0.5, 0.8, 0.94, 0.985, 1.0])
def test_the_derivative_of_a_quadratic_is_that_of_the_differences_over_the_window(
    sparsity: float,
) -> None:
    weight, rank, curvature, slope = quadratic()
    num_dropped = round(sparsity * weight.numel())
    pruned = cut(weight, rank, num_dropped)
    gradient = slope + curvature * (pruned - weight)
    effect = (curvature * weight.square() / 2).double().flatten()
    fisher = torch.zeros(COLUMNS, dtype=torch.float64)
    fisher.scatter_add_(0, rank.long().flatten(), effect)
    found = site_derivative(gradient, weight, rank, num_dropped, fisher)
    window = round(0.06 * COLUMNS) * ROWS
    ends = [max(0, num_dropped - window), min(weight.numel(), num_dropped + window)]
    low, high = (loss(cut(weight, rank, end), weight, curvature, slope) for end in ends)
    expected = float(high - low) / ((ends[1] - ends[0]) / weight.numel())
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-3)


def test_a_threshold_inside_a_rank_is_rounded_to_it() -> None:
    weight, rank, curvature, slope = quadratic()
    fisher = torch.ones(COLUMNS, dtype=torch.float64)
    at = [site_derivative(slope, weight, rank, 100 * ROWS + k, fisher) for k in (0, 5, 7, ROWS)]
    assert at[0] == at[1]
    assert at[2] == at[3]
    assert curvature.shape == rank.shape


def test_a_row_of_one_column_has_a_derivative() -> None:
    weight, rank = torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int16)
    fisher = torch.tensor([0.5], dtype=torch.float64)
    for num_dropped in range(4):
        assert site_derivative(weight, weight, rank, num_dropped, fisher) in (-2.5, -3.5)
