"""Local search over shapes: the best strategy within a budget, as far as a judge can tell.

From the best starts that remove different parts, single steps and swaps (a step back here for a
step there) as long as one of them is judged better and stays within the budget: no chain of such
moves, each within it, gives back a whole part for steps elsewhere. Every move is judged in one
batch. Axes that count
weights are not moved by themselves: they follow, shifted to the budget along their own path.

What it does not know: what the judge is (a surrogate, or a measurement).

Notation: d axes, c candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from unicuco.space import StrategySpace
from unicuco.types import Strategy

Judge = Callable[[Tensor], Tensor]  # ``c x d`` unit points -> ``c`` costs to lower

_MAX_MOVES: Final = 60
_DESCENTS: Final = 3  # from starts that remove different parts
_MAX_CANDIDATES: Final = 512  # judged per move; more are sampled
_MAX_SHARED: Final = 64  # likewise where counted axes must be shifted for each


class Neighbourhood:
    """Moves in one space.

    Args:
        space: with shape axes.
        rest: ``d`` unit point whose counted axes say how these share what shapes leave to them.
    """

    def __init__(self, space: StrategySpace, rest: Tensor) -> None:
        self._space = space
        self._rest = rest
        axes = space.axes
        self._shapes = [a for a, axis in enumerate(axes) if axis.is_shape]
        self._choices = [a for a in self._shapes if axes[a].is_choice]
        self._unit_step = 1 / (
            torch.tensor([axis.num_steps for axis in axes], dtype=torch.float64) * space.span
        )
        self._is_shape = torch.tensor([axis.is_shape for axis in axes])
        self._counts = len(self._shapes) < len(axes)

    def improve(
        self,
        starts: Sequence[Strategy],
        budget: int,
        judge: Judge,
        generator: torch.Generator,
        *,
        num_best: int = 1,
    ) -> list[Strategy]:
        """Return the best strategies met on the way down, best first.

        Args:
            starts: within the budget.
            budget: as the space counts.
            judge: what is lowered.
            generator: draws the moves that are judged where there are too many.
            num_best: how many.
        """
        points = self._space.encode(starts)
        costs = judge(points)
        met = [(float(cost), point) for cost, point in zip(costs, points, strict=True)]
        best: dict[tuple[bool, ...], tuple[float, Tensor]] = {}
        for cost, point in sorted(met, key=lambda pair: pair[0]):
            best.setdefault(tuple((point[self._choices] > 0.5).tolist()), (cost, point))
        for cost, point in [*best.values()][:_DESCENTS]:
            met += self._descend(cost, point, budget, judge, generator, num_best)
        ranked = [point for _, point in sorted(met, key=lambda pair: pair[0])]
        strategies = self._space.exactly(torch.stack(ranked[: 4 * num_best]), budget)
        return list({strategy.key: strategy for strategy in strategies}.values())[:num_best]

    def _descend(
        self,
        cost: float,
        point: Tensor,
        budget: int,
        judge: Judge,
        generator: torch.Generator,
        num_best: int,
    ) -> list[tuple[float, Tensor]]:
        """Return the best of every step down from a point, with what they cost."""
        met: list[tuple[float, Tensor]] = []
        for _ in range(_MAX_MOVES):
            candidates = self._moves(point, budget, generator)
            if not len(candidates):
                break
            costs = judge(candidates)
            order = costs.argsort(stable=True)[:num_best]
            met += [(float(costs[k]), candidates[k]) for k in order]
            if float(costs[order[0]]) >= cost - 1e-9:
                break
            point, cost = candidates[order[0]], float(costs[order[0]])
        return met

    def _moves(self, point: Tensor, budget: int, generator: torch.Generator) -> Tensor:
        """Return ``c x d`` points one move away that are within the budget."""
        shapes = torch.tensor(self._shapes)
        steps = torch.zeros(len(shapes), len(point), dtype=torch.float64)
        steps[torch.arange(len(shapes)), shapes] = self._unit_step[shapes]
        back, forth = -steps, steps
        swaps = (forth[:, None] + back[None, :]).flatten(0, 1)
        twice = (forth[:, None] + 2 * back[None, :]).flatten(0, 1)
        moved = point + torch.cat([back, forth, swaps, twice])
        inside = ((moved > -1e-9) & (moved < 1 + 1e-9)).all(1)
        moved = moved[inside & ~((moved - point).abs().sum(1) < 1e-12)].clamp(0, 1)
        limit = _MAX_SHARED if self._counts else _MAX_CANDIDATES
        moved = moved[self._alive(moved)]
        if self._counts:
            # Counted axes at their ends leave room for a weight that rounding gives back to each.
            least = torch.where(self._is_shape, moved, 1.0)
            fits = self._kept(least) <= budget - 2 * len(self._is_shape)
            moved = _sample(moved[fits], limit, generator)
            return self._space.share(moved, self._rest, budget) if len(moved) else moved
        return _sample(moved[self._kept(moved) <= budget + 0.5], limit, generator)

    def _kept(self, points: Tensor) -> Tensor:
        return self._space.cost.size(self._space.settings(points))

    def _alive(self, points: Tensor) -> Tensor:
        """Say which of ``c`` points leave a part standing."""
        if not self._choices:
            return torch.ones(len(points), dtype=torch.bool)
        return (points[:, self._choices] < 0.5).any(1)


def _sample(points: Tensor, most: int, generator: torch.Generator) -> Tensor:
    if len(points) <= most:
        return points
    return points[torch.randperm(len(points), generator=generator)[:most]]
