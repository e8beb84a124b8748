"""`ShapeFill`: relaxed points of spaces with shape axes -> whole steps within a budget.

Every step of a shape axis has its place along the projection's path: the t at which the axis, moved
to z + t, is half way into the step. So a point orders all shape steps of all axes, and a budget
takes the first of them, as many as it needs; then the last ones that need not go are given back. A
smaller budget therefore never keeps more. Axes that count weights fill up what is left, exactly.

At least one part of the model always stays: a model without blocks is none.

Notation: d axes, z = logit(u), a step (a, k) takes axis a from k to k + 1.
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

_EXACT: Final = 0.5  # parameters or bytes: below the rounding of whole numbers in float64
_WIDTH: Final = 1e-10  # in logits: less than a weight of any axis
_REACH: Final = 40.0  # in logits: from one corner of the clamped cube to the other


class ShapeFill:
    """Fills spaces in which some axes, or all, are shapes.

    Args:
        axes: of the space.
        cost: its cost model.
    """

    def __init__(self, axes: Sequence[Axis], cost: CostModel) -> None:
        self._axes = axes
        self._cost = cost
        self._num_steps = torch.tensor([axis.num_steps for axis in axes], dtype=torch.float64)
        self._top = torch.tensor([axis.max_step for axis in axes], dtype=torch.float64)
        self._low = torch.tensor([axis.low for axis in axes], dtype=torch.float64)
        self._span = torch.tensor([axis.high - axis.low for axis in axes], dtype=torch.float64)
        self._bottom = torch.ceil(self._low * self._num_steps - 1e-9)
        self._counted = torch.tensor([not axis.is_shape for axis in axes])
        self._choices = [a for a, axis in enumerate(axes) if axis.is_shape and axis.is_choice]
        places = [
            (a, k)
            for a, axis in enumerate(axes)
            if axis.is_shape
            for k in range(int(self._bottom[a]), axis.max_step)
        ]
        self._step_axis = torch.tensor([a for a, _ in places], dtype=torch.long)
        middles = torch.tensor([k + 0.5 for _, k in places], dtype=torch.float64)
        settings = middles / self._num_steps[self._step_axis] - self._low[self._step_axis]
        self._middle = torch.logit(settings / self._span[self._step_axis], eps=1e-7)

    def fill(self, relaxed: Tensor, kept: Tensor) -> Tensor:
        """Return ``b x d`` whole steps of relaxed points, none above its budget.

        Args:
            relaxed: ``b x d`` unit points, projected onto the budgets.
            kept: ``b`` budgets in the cost model's size, none below `smallest`.
        """
        z = torch.logit(relaxed, eps=1e-7)
        shapes = torch.stack(
            [self._shapes(row, float(k)) for row, k in zip(z, kept.tolist(), strict=True)]
        )
        if not bool(self._counted.any()):
            return shapes
        return self.exact(self.share(shapes / self._num_steps, z, kept), kept)

    @cached_property
    def smallest(self) -> Tensor:
        """``d`` steps of the smallest strategy."""
        if not self._choices:
            return self._top.clone()
        rows = self._top.repeat(len(self._choices), 1)
        rows[torch.arange(len(rows)), self._choices] = 0  # one part stays, the cheapest to keep
        return self._without_idle(rows[int(self._kept(rows).argmin())])

    def _shapes(self, z: Tensor, budget: float) -> Tensor:
        """Return the ``d`` steps of a point's shape axes; its counted axes stay at their bottom."""
        place = self._middle - z[self._step_axis]
        order = self._without_last_part(place.argsort(stable=True))
        taken = torch.zeros(len(order) + 1, len(self._axes), dtype=torch.float64)
        taken[torch.arange(1, len(taken)), self._step_axis[order]] = 1.0
        prefixes = taken.cumsum(0) + self._bottom  # (steps taken, d)
        least = self._kept(torch.where(self._counted, self._top, prefixes))
        fits = least <= budget + _EXACT - self._margin
        if not bool(fits[-1]):
            return torch.where(self._counted, self._bottom, self.smallest)
        need = int(fits.float().argmax())
        taken_axes = self._step_axis[order]
        if not bool(self._counted.any()):
            return self._give_back(prefixes[need], taken_axes[:need].tolist(), budget)
        if self._cost.counts_bytes:
            # The first that, with the counted axes moved on to where the path passes the next step,
            # are enough. Zeros that nobody asked for would save next to nothing, for where they are
            # takes bits: the path passes steps before it makes many of them.
            ends = torch.cat([place[order], torch.full((1,), _REACH, dtype=torch.float64)])
            moved = self._low + torch.sigmoid(z + ends[:, None]) * self._span
            rows = torch.where(self._counted, moved * self._num_steps, prefixes)
            enough = self._kept(rows) <= budget + _EXACT - self._margin
            num = max(need, int(enough.float().argmax()))
            return self._give_back(prefixes[num], taken_axes[:num].tolist(), budget)
        # As many as the path has passed, but no more than leave counted axes something to do.
        passed = int((place[order] <= 0).sum())
        useful = int((self._kept(prefixes) >= budget).sum()) - 1
        return self._without_idle(prefixes[max(need, min(passed, useful))])

    def _without_last_part(self, order: Tensor) -> Tensor:
        """Leave out the last choice of an order: it would remove the last part."""
        if not self._choices:
            return order
        is_choice = torch.isin(self._step_axis[order], torch.tensor(self._choices))
        last = int(is_choice.nonzero()[-1])
        return torch.cat([order[:last], order[last + 1 :]])

    def _without_idle(self, steps: Tensor) -> Tensor:
        """Undo steps that change nothing: of the units of a part that is removed."""
        shapes = (~self._counted).nonzero()[:, 0].tolist()
        taken = [a for a in shapes if steps[a] > self._bottom[a]]
        return self._give_back(steps, taken, float(self._kept(steps[None])[0]))

    def _give_back(self, steps: Tensor, taken: list[int], budget: float) -> Tensor:
        """Undo steps, the last ones first, as far as the budget allows."""
        candidates = list(dict.fromkeys(reversed(taken)))
        while candidates:
            rows = steps.repeat(len(candidates), 1)
            rows[torch.arange(len(rows)), candidates] -= 1
            fits = self._kept(rows) <= budget + _EXACT
            if not bool(fits.any()):
                break
            steps = rows[int(fits.float().argmax())]
            candidates = [a for a in candidates if steps[a] > self._bottom[a]]
        return steps

    def share(self, shapes: Tensor, z: Tensor, kept: Tensor) -> Tensor:
        """Return ``b x d`` settings: shape axes as they are, counted ones shifted to the budgets.

        Args:
            shapes: ``b x d`` settings of which the shape axes count.
            z: ``b x d`` logits (or ``d``) of which the counted axes count.
            kept: ``b`` budgets; where shapes alone lie below one, counted axes keep all.
        """

        def settings(t: Tensor) -> Tensor:
            moved = self._low + torch.sigmoid(z + t[:, None]) * self._span
            return torch.where(self._counted, moved, shapes)

        ends = torch.full((len(shapes),), _REACH, dtype=torch.float64)
        met = first_met(lambda t: self._cost.size(settings(t)) - kept, -ends, ends, width=_WIDTH)
        return settings(met)

    def exact(self, settings: Tensor, kept: Tensor) -> Tensor:
        """Return ``b x d`` whole steps of settings that lie near their budgets, none above it."""
        steps = torch.where(
            self._counted,
            torch.ceil(settings * self._num_steps - 1e-6),
            torch.round(settings * self._num_steps),
        )
        steps = torch.minimum(torch.maximum(steps, self._bottom), self._top)
        return torch.stack(
            [self._to_the_weight(row, int(k)) for row, k in zip(steps, kept.tolist(), strict=True)]
        )

    def _to_the_weight(self, steps: Tensor, budget: int) -> Tensor:
        """Drop what is above the budget, then return what was dropped beyond it, axis by axis."""
        counted = self._counted.nonzero()[:, 0].tolist()
        for axis in counted:
            if self._exact_size(steps) <= budget:
                break
            steps = self._first_that_fits(steps, axis, float(self._top[axis]), budget)
        if self._exact_size(steps) > budget:
            raise InfeasibleRequestError("the budget can't be met by this space")
        spare = budget - self._exact_size(steps)
        for axis in counted:
            if spare <= self._tolerance:
                break
            low, end = steps.clone(), float(steps[axis])
            low[axis] = self._bottom[axis]
            if self._exact_size(low) > budget:
                low[axis] = max(float(low[axis]), end - self._weights_in(spare))
            steps = self._first_that_fits(low, axis, end, budget)
            spare = budget - self._exact_size(steps)
        return steps

    def _first_that_fits(self, steps: Tensor, axis: int, end: float, budget: int) -> Tensor:
        """Raise an axis from where it is to where the budget is first met, or to ``end``."""
        low, high = float(steps[axis]), end
        trial = steps.clone()
        if self._exact_size(trial) <= budget:
            return trial
        while high - low > 1:
            trial[axis] = (low + high) // 2
            fits = self._exact_size(trial) <= budget
            low, high = (low, float(trial[axis])) if fits else (float(trial[axis]), high)
        trial[axis] = high
        return trial

    @property
    def _tolerance(self) -> int:
        """What may be left of a budget: a weight is one parameter, or (16 bits) two bytes."""
        return 1 if self._cost.counts_bytes else 0

    def _weights_in(self, size: int) -> int:
        """Return no fewer weights than a size holds: two (4 bits) in a byte are the most."""
        return 2 * size + 2 if self._cost.counts_bytes else size

    @cached_property
    def _margin(self) -> float:
        return self._cost.slack

    def _kept(self, steps: Tensor) -> Tensor:
        return self._cost.size(steps / self._num_steps)

    def _exact_size(self, steps: Tensor) -> int:
        return self._cost.size_of((steps / self._num_steps).tolist())
