from __future__ import annotations

from functools import partial

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unicuco.space.crossing import first_met

WIDTH = 1e-9
few = settings(max_examples=30)
seeds = st.integers(0, 10**6)


class Falling:
    """Functions that fall along sigmoids, with kinks and level stretches; some are never zero."""

    def __init__(self, seed: int, count: int = 5) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.middles = 30 * torch.rand(count, 4, generator=generator, dtype=torch.float64) - 15
        self.heights = torch.rand(count, 4, generator=generator, dtype=torch.float64)
        self.budgets = 3 * torch.rand(count, generator=generator, dtype=torch.float64) - 0.3
        self.calls = 0

    def __call__(self, t: Tensor, rows: slice = slice(None)) -> Tensor:
        self.calls += 1
        steps = torch.sigmoid(self.middles[rows] - t[:, None])
        steps[:, 0] = (self.middles[rows, 0] - t).clamp(0, 1)
        return (self.heights[rows] * steps).sum(1) - self.budgets[rows]


def ends(count: int) -> tuple[Tensor, Tensor]:
    high = torch.full((count,), 40.0, dtype=torch.float64)
    return -high, high


@few
@given(seeds)
def test_is_where_halving_ends_in_far_fewer_calls(seed: int) -> None:
    function = Falling(seed)
    low, high = ends(5)
    met = first_met(function, low, high, width=WIDTH)
    assert function.calls < 32
    for _ in range(60):
        middle = (low + high) / 2
        above = function(middle) > 0
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    met_somewhere = function(ends(5)[1]) <= 0
    assert bool((function(met) <= 0)[met_somewhere].all())
    assert bool(((met - high).abs() <= 2 * WIDTH).all())  # ends too: never above zero, always above


@few
@given(seeds)
def test_what_others_need_changes_no_answer(seed: int) -> None:
    function = Falling(seed)
    together = first_met(function, *ends(5), width=WIDTH)
    for k in range(5):
        row = slice(k, k + 1)
        alone = first_met(partial(function, rows=row), *ends(1), width=WIDTH)
        assert abs(alone.item() - together[k].item()) < 1e-4 * WIDTH
