"""`StrategySpace`, the one translator between unit cube and strategies, and its projection.

The surrogate and StratNet see points ``u`` of the unit cube only; whatever compresses sees decoded
settings only. The space is given its axes and a `CostModel` by the dimensions and knows neither
weights nor text.

Notation: b batch, d axes, u in [0, 1]^d, s = low + u (high - low) the setting, N the grid steps of
an axis (s is a multiple of 1/N), K a budget: kept parameters, or bytes where dimensions change
bits, z = logit(u).

Projection moves every axis along one monotone path, z + t with one scalar t per row, until the
relaxed cost meets the budget. So no axis saturates, the result is differentiable in u (implicitly,
by one Newton step with gradient), and more size pressure moves every axis towards compression. The
exact fill then turns the relaxed settings into whole numbers of dropped weights by largest
remainder: a budget is met to the weight where an axis of the space counts weights, to one step of
the coarsest axis otherwise, and is never exceeded.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Final

import torch
from torch import Tensor

from unicuco.errors import InfeasibleRequestError
from unicuco.space.axis import Axis, CostModel
from unicuco.space.crossing import first_met
from unicuco.space.shapes import ShapeFill
from unicuco.types import Strategy

_LOGIT_BOUND: Final = 16.0  # sigmoid(16) is 1 - 1e-7: the edge of the cube for every purpose here
_PATH_BOUND: Final = 2 * _LOGIT_BOUND + 8.0  # carries any point of the clamped cube to a corner
_MAX_ITERATIONS: Final = 60
_TOLERANCE: Final = 1e-6  # of all parameters; the last Newton step squares it
_PATH_WIDTH: Final = 1e-6  # of t where costs have kinks; likewise
_NEWTON_REACH: Final = 1e-4  # an excess beyond this is a budget outside the range, not an error


class StrategySpace:
    """The axes of a run, with the projection onto budgets.

    Args:
        axes: in strategy order; names unique.
        cost: the cost model of the same axes.
        stride: weights from one level to the next, where sites are kept at levels: strategies that
            meet a budget then lie on whole levels, except that one axis takes what is less than a
            level. 0: every weight is a step of its own.

    Raises:
        ValueError: names repeat, or a stride is given with shape axes.
    """

    def __init__(self, axes: Sequence[Axis], cost: CostModel, *, stride: int = 0) -> None:
        self.axes = tuple(axes)
        self.cost = cost
        self._stride = stride
        self.names = tuple(axis.name for axis in self.axes)
        if len(set(self.names)) != len(self.names):
            raise ValueError("axis names must be unique")
        self._low = torch.tensor([axis.low for axis in self.axes], dtype=torch.float64)
        self._span = torch.tensor([axis.high - axis.low for axis in self.axes], dtype=torch.float64)
        self._steps = torch.tensor([axis.num_steps for axis in self.axes], dtype=torch.float64)
        self._max_step = torch.tensor([axis.max_step for axis in self.axes], dtype=torch.float64)
        self._min_step = torch.ceil(self._low * self._steps - 1e-9)
        has_shapes = any(axis.is_shape for axis in self.axes)
        self._shapes = ShapeFill(self.axes, cost) if has_shapes else None
        if stride and has_shapes:
            raise ValueError("levels are of axes that count weights; one here is a shape")

    @property
    def num_axes(self) -> int:
        """The number of axes, d."""
        return len(self.axes)

    @property
    def span(self) -> Tensor:
        """``d`` float64: high - low of every axis, the factor from setting to unit derivatives."""
        return self._span

    @property
    def has_shapes(self) -> bool:
        """Whether some axes, or all, are shapes."""
        return self._shapes is not None

    @cached_property
    def axis_params(self) -> Tensor:
        """``d`` float64: what each axis alone takes off the size from low to high."""
        if self._shapes is None:
            return self._steps * self._span
        rows = self._low + torch.diag(self._span)
        return self.cost.size(self._low[None]) - self.cost.size(rows)

    def settings(self, unit: Tensor) -> Tensor:
        """Map ``b x d`` unit points to relaxed settings."""
        return self._low + unit.double() * self._span

    def decode(self, unit: Tensor) -> list[Strategy]:
        """Round ``b x d`` unit points to the nearest strategies on the grid."""
        steps = torch.round(self.settings(unit) * self._steps)
        return self._strategies(torch.clamp(steps, self._min_step, self._max_step))

    def encode(self, strategies: Sequence[Strategy]) -> Tensor:
        """Return the ``b x d`` float64 unit points of strategies; ``decode`` gives them back.

        Raises:
            ValueError: a strategy belongs to another space.
        """
        for strategy in strategies:
            if tuple(name for name, _ in strategy.settings) != self.names:
                raise ValueError(f"strategy {strategy.key[:12]} belongs to another space")
        values = torch.tensor([strategy.values for strategy in strategies], dtype=torch.float64)
        return (values.reshape(-1, self.num_axes) - self._low) / self._span

    def kept_range(self) -> tuple[int, int]:
        """Return the smallest and the largest size of a strategy of this space."""
        return self._kept_range

    @cached_property
    def _corners(self) -> list[Strategy]:
        """The smallest and the largest strategy."""
        smallest = self._max_step if self._shapes is None else self._shapes.smallest
        return self._strategies(torch.stack([smallest, self._min_step]))

    @cached_property
    def _kept_range(self) -> tuple[int, int]:
        fewest, most = (self.cost.size_of(corner.values) for corner in self._corners)
        return fewest, most

    @property
    def highest_sparsity(self) -> float:
        """The sparsity over sites of the smallest strategy; in bytes: the share that goes."""
        if self.cost.counts_bytes:
            return (self.cost.total_size - self.kept_range()[0]) / self.cost.site_size
        drops = self.cost.site_drops(self._corners[0].values)
        return sum(drops.values()) / self.cost.num_site_weights

    def kept_for_sparsity(self, sparsity: float) -> int:
        """Return the budget that a sparsity over sites means: never one weight above.

        Where budgets are bytes, it is the share of the sites' bytes that goes.
        """
        dropped = _ceil(sparsity * self.cost.site_size)
        return self.cost.total_size - dropped

    def relaxed_budgets(self, sparsity: Tensor) -> Tensor:
        """Return the ``b`` float64 budgets of `kept_for_sparsity`, differentiable."""
        return self.cost.total_size - sparsity.double() * self.cost.site_size

    def uniform(self, sparsity: float) -> Strategy:
        """Return the strategy nearest to equal settings on all axes at exactly this sparsity."""
        return self.uniforms([sparsity])[0]

    def uniforms(self, sparsities: Sequence[float]) -> list[Strategy]:
        """Return what `uniform` does for each of many sparsities at once."""
        middle = torch.full((len(sparsities), self.num_axes), 0.5)
        return self.decode_exact(middle, [self.kept_for_sparsity(one) for one in sparsities])

    def project(self, unit: Tensor, kept: Tensor) -> Tensor:
        """Move unit points along the monotone path until their relaxed cost meets the budget.

        Args:
            unit: ``b x d`` points, any float dtype.
            kept: ``b`` budgets in size; those beyond the range end at its corner.

        Returns:
            ``b x d`` float64 points, differentiable in ``unit``.
        """
        z = torch.logit(unit.double(), eps=1e-7)
        return self.project_logits(z, kept)

    def project_logits(self, z: Tensor, kept: Tensor) -> Tensor:
        """Do what `project` does for points given as ``b x d`` logits."""
        z = z.double().clamp(-_LOGIT_BOUND, _LOGIT_BOUND)
        t = self._path_position(z.detach(), kept.double())
        slope = self._slope_along(z.detach(), t)
        # Implicit differentiation: t(z) solves cost(z + t) = kept, so one Newton step from the
        # solution has its derivative (and corrects what the iteration left over).
        excess = self.cost.size(self.settings(torch.sigmoid(z + t[:, None]))) - kept
        reachable = excess.detach().abs() < _NEWTON_REACH * self.cost.total_size
        newton = t - torch.where(reachable, excess, 0.0) / slope
        return torch.sigmoid(z + newton[:, None])

    def decode_exact(self, unit: Tensor, kept: Sequence[int]) -> list[Strategy]:
        """Return the strategies nearest to ``b x d`` unit points that keep exactly their budgets.

        Args:
            unit: ``b x d`` points.
            kept: ``b`` budgets in size.

        Raises:
            InfeasibleRequestError: a budget below what the space reaches; ``nearest`` is that
                bound.
        """
        if not kept:
            return []
        fewest, most = self.kept_range()
        low = min(kept)
        if low < fewest:
            counted = "bytes" if self.cost.counts_bytes else "parameters"
            raise InfeasibleRequestError(
                f"no strategy keeps only {low:,} {counted}; the fewest are {fewest:,}",
                nearest=float(fewest),
            )
        budget = torch.tensor([min(k, most) for k in kept], dtype=torch.float64)
        relaxed = self.project(unit.detach(), budget)
        if self._shapes is not None:
            return self._strategies(self._shapes.fill(relaxed, budget))
        steps = self._fill(relaxed, budget)
        return self._strategies(self._on_levels(steps) if self._stride else steps)

    def share(self, unit: Tensor, rest: Tensor, kept: int) -> Tensor:
        """Return ``b x d`` points whose counted axes share what their shape axes leave to them.

        Args:
            unit: ``b x d`` points of which the shape axes count.
            rest: ``d`` point of which the counted axes count: it says how they share.
            kept: the budget.
        """
        assert self._shapes is not None, "of spaces with shapes only"
        budgets = torch.full((len(unit),), float(kept), dtype=torch.float64)
        settings = self._shapes.share(self.settings(unit), torch.logit(rest, eps=1e-7), budgets)
        return (settings - self._low) / self._span

    def exactly(self, unit: Tensor, kept: int) -> list[Strategy]:
        """Return the strategies of ``b x d`` points near the budget, none above it.

        Their shapes are taken as they are.

        Raises:
            InfeasibleRequestError: a point's shapes don't allow it.
        """
        assert self._shapes is not None, "of spaces with shapes only"
        budgets = torch.full((len(unit),), float(kept), dtype=torch.float64)
        return self._strategies(self._shapes.exact(self.settings(unit), budgets))

    def _path_position(self, z: Tensor, kept: Tensor) -> Tensor:
        """Return the ``b`` scalars t at which the relaxed cost of ``z + t`` meets the budgets."""
        if self._shapes is not None:  # costs with kinks and products
            ends = torch.full_like(kept, _PATH_BOUND)
            return first_met(
                lambda t: self._cost_along(z, t) - kept, -ends, ends, width=_PATH_WIDTH
            )
        # Newton's method inside a shrinking bracket, from where equal axes would meet the budget.
        fewest, most = self._kept_range
        share = ((most - kept) / max(1, most - fewest)).clamp(1e-7, 1 - 1e-7)
        t = torch.logit(share) - z.mean(1)
        low, high = torch.full_like(t, -_PATH_BOUND), torch.full_like(t, _PATH_BOUND)
        for _ in range(_MAX_ITERATIONS):
            excess = self._cost_along(z, t) - kept
            low, high = torch.where(excess > 0, t, low), torch.where(excess > 0, high, t)
            done = (excess.abs() < _TOLERANCE * self.cost.total_size) | (high - low < 1e-9)
            if bool(done.all()):
                break
            newton = t - excess / self._slope_along(z, t)
            inside = (newton > low) & (newton < high)
            t = torch.where(done, t, torch.where(inside, newton, (low + high) / 2))
        return t

    def _cost_along(self, z: Tensor, t: Tensor) -> Tensor:
        """Return the ``b`` relaxed costs at ``z + t``."""
        settings = self.settings(torch.sigmoid(z + t[:, None]))
        if self._shapes is None:  # every step is a weight
            return self.cost.total_size - (settings * self._steps).sum(1)
        return self.cost.size(settings)

    def _slope_along(self, z: Tensor, t: Tensor) -> Tensor:
        """Return the ``b`` derivatives of the relaxed costs to t, below zero."""
        if self._shapes is None:
            unit = torch.sigmoid(z + t[:, None])
            slope = -(self.axis_params * unit * (1 - unit)).sum(1)
        else:
            with torch.enable_grad():
                shift = t.detach().clone().requires_grad_(True)
                slope = torch.autograd.grad(self._cost_along(z, shift).sum(), shift)[0]
        return slope.clamp(max=-1e-9)

    def _fill(self, relaxed: Tensor, kept: Tensor) -> Tensor:
        """Turn points that only count weights into ``b x d`` whole steps at exactly the budget."""
        wanted = self.cost.total_params - kept
        exact = self.settings(relaxed) * self._steps
        steps = torch.clamp(torch.floor(exact), self._min_step, self._max_step)
        for _ in range(64):
            missing = torch.round(wanted - steps.sum(1))
            if not bool(missing.any()):
                return steps
            up = missing[:, None] > 0
            room = torch.where(up, steps < self._max_step, steps > self._min_step)
            # Largest remainder first when dropping more, smallest remainder first when giving
            # weights back.
            order = torch.where(up, exact - steps, steps - exact).masked_fill(~room, -torch.inf)
            rank = order.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            share = torch.floor(missing.abs() / room.sum(1).clamp(min=1))[:, None]
            change = torch.where(
                room, share + (rank < (missing.abs() - share[:, 0] * room.sum(1))[:, None]), 0.0
            )
            steps = torch.clamp(
                steps + torch.where(up, change, -change), self._min_step, self._max_step
            )
        raise InfeasibleRequestError("the budget can't be met to the weight by this space")

    def _on_levels(self, steps: Tensor) -> Tensor:
        """Move ``b x d`` steps to whole levels, every row's total staying as it is.

        Largest remainder first, as in `_fill`; the first axis that has room takes the rest.
        """
        top = torch.floor(self._max_step / self._stride)
        levels = torch.minimum(torch.floor(steps / self._stride), top)
        missing = torch.floor(steps.sum(1) / self._stride) - levels.sum(1)
        while bool((missing > 0).any()):
            room = levels < top
            order = (steps - levels * self._stride).masked_fill(~room, -torch.inf)
            rank = order.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            up = room & (rank < missing[:, None])
            if not bool(up.any()):
                break  # all at the top: what is left lies above the last levels
            levels = levels + up
            missing = missing - up.sum(1)
        whole = levels * self._stride
        rest = (steps - whole).sum(1)
        space = self._max_step - whole
        order = torch.where(space >= rest[:, None], steps - whole, space - 2 * self._max_step.max())
        for axis in order.argsort(dim=1, descending=True, stable=True).unbind(1):
            taken = torch.minimum(rest, space.gather(1, axis[:, None])[:, 0])
            whole.scatter_add_(1, axis[:, None], taken[:, None])
            rest = rest - taken
        return whole

    def _strategies(self, steps: Tensor) -> list[Strategy]:
        values = (steps / self._steps).tolist()
        return [Strategy(settings=tuple(zip(self.names, row, strict=True))) for row in values]


def _ceil(value: float) -> int:
    # 0.6 * 10 is 6.000000000000001 for some floats: what rounding may add is no weight. It is
    # a thousandth of one among 10^12.
    return -int(-(value - max(1e-9, 1e-15 * value)) // 1)
