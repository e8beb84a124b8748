"""The closed-form allocation that Fisher curves imply (DESIGN.md section 8, finding 1).

Minimise the sum of the axis curves at a fixed number of dropped weights. Each curve is replaced by
its lower convex hull, whose pieces are then taken in order of cost per weight: exact for convex
curves, and one sort serves every target. Very good in direction; at high sparsity its step is too
long, since effects stop adding up.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from unicuco.allocate.base import AllocationContext
from unicuco.allocate.curves import AxisCurves
from unicuco.space import StrategySpace
from unicuco.types import Strategy


class Fisher:
    """Sum of Fisher curves minimised at the budget."""

    name = "fisher"

    def __init__(self, context: AllocationContext) -> None:
        self._space = context.space
        self._pieces = _sorted_pieces(context.space, context.curves)

    def allocate(self, sparsities: Sequence[float]) -> list[Strategy]:
        """Return one strategy per sparsity."""
        budgets = [self._space.kept_for_sparsity(sparsity) for sparsity in sparsities]
        return self._space.decode_exact(self.units(sparsities), budgets)

    def units(self, sparsities: Sequence[float]) -> Tensor:
        """Return the ``b x d`` relaxed unit points before the exact fill."""
        axis, weight, num_knots = self._pieces
        wanted = torch.tensor(sparsities, dtype=torch.float64)[:, None] * self._space.cost.site_size
        taken = ((wanted - (weight.cumsum(0) - weight)) / weight).clamp(0, 1)  # (b, pieces)
        units = torch.zeros(len(sparsities), self._space.num_axes, dtype=torch.float64)
        return units.index_add_(1, axis, taken / (num_knots - 1)).clamp(1e-4, 1 - 1e-4)


def _sorted_pieces(space: StrategySpace, curves: AxisCurves) -> tuple[Tensor, Tensor, int]:
    """Return axis and dropped weights of every hull piece, cheapest per weight first."""
    d, m = curves.table.shape
    per_axis = space.axis_params
    slopes = torch.stack([_hull_slopes(row) for row in curves.table]) / per_axis[:, None]
    order = slopes.flatten().argsort(stable=True)
    axis = torch.arange(d).repeat_interleave(m - 1)[order]
    return axis, per_axis[axis] / (m - 1), m


def _hull_slopes(curve: Tensor) -> Tensor:
    """Return the lower convex hull's slope over the ``m - 1`` pieces of a curve of ``m`` knots."""
    heights = curve.tolist()
    hull: list[int] = []
    for k, height in enumerate(heights):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (heights[b] - heights[a]) * (k - a) <= (height - heights[a]) * (b - a):
                break
            hull.pop()
        hull.append(k)
    slopes = torch.empty(len(heights) - 1, dtype=torch.float64)
    for a, b in pairwise(hull):
        slopes[a:b] = (heights[b] - heights[a]) / (b - a)
    return slopes
