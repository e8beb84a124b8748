"""`StrategySpace`, the one translator between unit cube and strategies, and its projection.

The surrogate and StratNet see points ``u`` of the unit cube only; whatever compresses sees decoded
settings only. The space is given its axes and a `CostModel` by the dimensions and knows neither
weights nor text.

Notation: b batch, d axes, u in [0, 1]^d, s = low + u (high - low) the setting, N the grid steps of
an axis (s is a multiple of 1/N), K a budget of kept parameters, z = logit(u).

Projection moves every axis along one monotone path, z + t with one scalar t per row, until the
relaxed cost meets the budget. So no axis saturates, the result is differentiable in u (implicitly,
by one Newton step with gradient), and more size pressure moves every axis towards compression. The
exact fill then turns the relaxed settings into whole numbers of dropped weights by largest
remainder: a budget is met to the weight where an axis of the space counts weights, to one step of
the coarsest axis otherwise, and is never exceeded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Protocol

import torch
from torch import Tensor

from unicuco.errors import InfeasibleRequestError
from unicuco.types import Strategy

_LOGIT_BOUND: Final = 16.0  # sigmoid(16) is 1 - 1e-7: the edge of the cube for every purpose here
_PATH_BOUND: Final = 2 * _LOGIT_BOUND + 8.0  # carries any point of the clamped cube to a corner
_MAX_ITERATIONS: Final = 60
_TOLERANCE: Final = 1e-6  # of all parameters; the last Newton step squares it
_NEWTON_REACH: Final = 1e-4  # an excess beyond this is a budget outside the range, not an error


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One coordinate of a strategy.

    ``name`` is ``dimension/site``; settings lie in [low, high] on the grid k / num_steps, and more
    is always smaller. ``num_steps`` of a sparsity axis is its number of weights; a yes-or-no axis
    has one step.
    """

    name: str
    low: float
    high: float
    num_steps: int

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1 or self.num_steps < 1:
            raise ValueError(f"axis {self.name} needs 0 <= low < high <= 1 and a step, got {self}")

    @property
    def max_step(self) -> int:
        """The last grid step inside the range."""
        return int(self.high * self.num_steps + 1e-9)

    @property
    def is_choice(self) -> bool:
        """True for a yes-or-no axis."""
        return self.num_steps == 1


class CostModel(Protocol):
    """Parameters and bytes of strategies, made by the dimensions; falling along every axis."""

    total_params: int
    num_site_weights: int

    def kept(self, settings: Tensor) -> Tensor:
        """Return the relaxed kept parameters, ``b``, of ``b x d`` settings; differentiable."""

    def site_drops(self, values: Sequence[float]) -> dict[str, int]:
        """Return the exact number of weights each site loses: all of them where it is removed."""

    def kept_params(self, values: Sequence[float]) -> int:
        """Return how many parameters of the whole model are neither zeroed nor removed."""

    def num_bytes(self, values: Sequence[float]) -> int:
        """Return the tensor bytes of the variant as it is stored."""


class StrategySpace:
    """The axes of a run, with the projection onto budgets.

    Args:
        axes: in strategy order; names unique.
        cost: the cost model of the same axes.
        stride: weights from one level to the next, where sites are kept at levels: strategies that
            meet a budget then lie on whole levels, except that one axis takes what is less than a
            level. 0: every weight is a step of its own.

    Raises:
        ValueError: names repeat, or a stride is given with yes-or-no axes.
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
        self._choice = torch.tensor([axis.is_choice for axis in self.axes])
        if stride and bool(self._choice.any()):
            raise ValueError("levels are of axes that count weights; one here is yes or no")

    @property
    def num_axes(self) -> int:
        """The number of axes, d."""
        return len(self.axes)

    @property
    def span(self) -> Tensor:
        """``d`` float64: high - low of every axis, the factor from setting to unit derivatives."""
        return self._span

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
        """Return the fewest and the most parameters that a strategy of this space keeps."""
        return self._kept_range

    @cached_property
    def _kept_range(self) -> tuple[int, int]:
        corners = self.decode(torch.tensor([[1.0], [0.0]]).expand(2, self.num_axes))
        fewest, most = (self.cost.kept_params(corner.values) for corner in corners)
        return fewest, most

    def kept_for_sparsity(self, sparsity: float) -> int:
        """Return the kept parameters that a sparsity over sites means: never one weight above."""
        dropped = _ceil(sparsity * self.cost.num_site_weights)
        return self.cost.total_params - dropped

    def uniform(self, sparsity: float) -> Strategy:
        """Return the strategy nearest to equal settings on all axes at exactly this sparsity."""
        middle = torch.full((1, self.num_axes), 0.5)
        return self.decode_exact(middle, [self.kept_for_sparsity(sparsity)])[0]

    def project(self, unit: Tensor, kept: Tensor) -> Tensor:
        """Move unit points along the monotone path until their relaxed cost meets the budget.

        Args:
            unit: ``b x d`` points, any float dtype.
            kept: ``b`` budgets in kept parameters; those beyond the range end at its corner.

        Returns:
            ``b x d`` float64 points, differentiable in ``unit``.
        """
        z = torch.logit(unit.double(), eps=1e-7)
        return self.project_logits(z, kept)

    def project_logits(self, z: Tensor, kept: Tensor) -> Tensor:
        """Do what `project` does for points given as ``b x d`` logits."""
        z = z.double().clamp(-_LOGIT_BOUND, _LOGIT_BOUND)
        t = self._path_position(z.detach(), kept.double())
        _, slope = self._cost_along(z.detach(), t)
        # Implicit differentiation: t(z) solves cost(z + t) = kept, so one Newton step from the
        # solution has its derivative (and corrects what the iteration left over).
        excess = self.cost.kept(self.settings(torch.sigmoid(z + t[:, None]))) - kept
        reachable = excess.detach().abs() < _NEWTON_REACH * self.cost.total_params
        newton = t - torch.where(reachable, excess, 0.0) / slope.clamp(max=-1e-9)
        return torch.sigmoid(z + newton[:, None])

    def decode_exact(self, unit: Tensor, kept: Sequence[int]) -> list[Strategy]:
        """Return the strategies nearest to ``b x d`` unit points that keep exactly their budgets.

        Args:
            unit: ``b x d`` points.
            kept: ``b`` budgets in kept parameters.

        Raises:
            InfeasibleRequestError: a budget below what the space reaches; ``nearest`` is that
                bound.
        """
        fewest, most = self.kept_range()
        low = min(kept, default=most)
        if low < fewest:
            raise InfeasibleRequestError(
                f"no strategy keeps only {low:,} parameters; the fewest are {fewest:,}",
                nearest=float(fewest),
            )
        budget = torch.tensor([min(k, most) for k in kept], dtype=torch.float64)
        relaxed = self.project(unit.detach(), budget)
        if bool(self._choice.any()):
            return [
                self._fill_mixed(row, int(k))
                for row, k in zip(relaxed, budget.tolist(), strict=True)
            ]
        steps = self._fill(relaxed, budget)
        return self._strategies(self._on_levels(steps) if self._stride else steps)

    def _path_position(self, z: Tensor, kept: Tensor) -> Tensor:
        """Return the ``b`` scalars t at which the relaxed cost of ``z + t`` meets the budgets.

        Newton's method inside a shrinking bracket, from where equal axes would meet the budget.
        """
        fewest, most = self._kept_range
        share = ((most - kept) / max(1, most - fewest)).clamp(1e-7, 1 - 1e-7)
        t = torch.logit(share) - z.mean(1)
        low, high = torch.full_like(t, -_PATH_BOUND), torch.full_like(t, _PATH_BOUND)
        for _ in range(_MAX_ITERATIONS):
            value, slope = self._cost_along(z, t)
            excess = value - kept
            low, high = torch.where(excess > 0, t, low), torch.where(excess > 0, high, t)
            done = (excess.abs() < _TOLERANCE * self.cost.total_params) | (high - low < 1e-9)
            if bool(done.all()):
                break
            newton = t - excess / slope.clamp(max=-1e-9)
            inside = (newton > low) & (newton < high)
            t = torch.where(done, t, torch.where(inside, newton, (low + high) / 2))
        return t

    def _cost_along(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ``b`` relaxed costs at ``z + t`` and their derivatives to t."""
        with torch.enable_grad():
            shift = t.detach().clone().requires_grad_(True)
            cost = self.cost.kept(self.settings(torch.sigmoid(z + shift[:, None])))
            slope = torch.autograd.grad(cost.sum(), shift)[0]
        return cost.detach(), slope

    def _fill(self, relaxed: Tensor, kept: Tensor) -> Tensor:
        """Turn relaxed points without choices into ``b x d`` whole steps at exactly the budget."""
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

    def _fill_mixed(self, relaxed: Tensor, kept: int) -> Strategy:
        """Decide one relaxed point's choices, then fill the axes that count weights."""
        settings = self.settings(relaxed)
        steps = torch.clamp(torch.round(settings * self._steps), self._min_step, self._max_step)
        counted = (~self._choice).nonzero()[:, 0].tolist()
        order = [
            int(a) for a in settings.argsort(descending=True, stable=True) if bool(self._choice[a])
        ]
        num_on = sum(int(steps[a]) for a in order)

        def with_choices(count: int, counted_unit: float | None) -> Tensor:
            row = steps.clone()
            for position, axis in enumerate(order):
                row[axis] = float(position < count)
            for axis in counted:
                if counted_unit is not None:
                    row[axis] = self._max_step[axis] if counted_unit else self._min_step[axis]
            return row

        def kept_with(count: int, counted_unit: float) -> int:
            return self.cost.kept_params(
                self._strategies(with_choices(count, counted_unit)[None])[0].values
            )

        while num_on < len(order) and kept_with(num_on, 1.0) > kept:
            num_on += 1  # even the emptiest counted axes exceed the budget: remove one part more
        while (
            counted
            and num_on > 0
            and kept_with(num_on - 1, 1.0) <= kept
            and kept_with(num_on, 0.0) < kept
        ):
            num_on -= 1  # removed more than the budget asks for: give one part back
        if not counted:
            return self._strategies(with_choices(num_on, None)[None])[0]
        return self._fill_counted(relaxed, with_choices(num_on, 0.0), kept)

    def _fill_counted(self, relaxed: Tensor, fixed: Tensor, kept: int) -> Strategy:
        """Shift the counted axes of one point, its choices as in ``fixed``, to the budget."""
        z = torch.logit(relaxed, eps=1e-7)
        low, high = -_PATH_BOUND, _PATH_BOUND
        best: Strategy | None = None
        for _ in range(80):
            t = (low + high) / 2
            exact = self.settings(torch.sigmoid(z + t)) * self._steps
            row = torch.where(
                self._choice, fixed, torch.clamp(torch.round(exact), self._min_step, self._max_step)
            )
            strategy = self._strategies(row[None])[0]
            if self.cost.kept_params(strategy.values) <= kept:
                best, high = strategy, t
            else:
                low = t
        if best is None:
            raise InfeasibleRequestError("the budget can't be met by this space")
        return self._give_back(best, kept)

    def _give_back(self, strategy: Strategy, kept: int) -> Strategy:
        """Return weights that rounding dropped beyond the budget, one axis after the other."""
        steps = torch.round(torch.tensor(strategy.values, dtype=torch.float64) * self._steps)
        for axis in (~self._choice).nonzero()[:, 0].tolist():
            spare = kept - self.cost.kept_params(self._strategies(steps[None])[0].values)
            trial = steps.clone()
            trial[axis] = max(float(self._min_step[axis]), float(steps[axis]) - spare)
            if spare > 0 and self.cost.kept_params(self._strategies(trial[None])[0].values) <= kept:
                steps = trial
        return self._strategies(steps[None])[0]

    def _strategies(self, steps: Tensor) -> list[Strategy]:
        values = (steps / self._steps).tolist()
        return [Strategy(settings=tuple(zip(self.names, row, strict=True))) for row in values]


def _ceil(value: float) -> int:
    # 0.6 * 10 is 6.000000000000001 for some floats: what rounding may add is no weight. It is
    # a thousandth of one among 10^12.
    return -int(-(value - max(1e-9, 1e-15 * value)) // 1)
