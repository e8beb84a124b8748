"""Evolution by level switches for one target, as EvoPress does it: the chief rival.

The parent starts uniform. A child moves whole levels between axes: one axis drops a level more,
another a level less, and since a level is the same number of weights everywhere the budget never
changes (arXiv 2410.14649); one to three switches, few more often. Children are judged on few tokens
first and the survivors, with the parent, on all: the best stays (elitist).

What it does not know: any other target. Sixty-four requests cost sixty-four searches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from unicuco.space import StrategySpace
from unicuco.types import Strategy

_LEVEL_FRACTION: Final = 0.1  # of the smallest axis' weights
_MAX_SWITCHES: Final = 3
_TRIES_PER_CHILD: Final = 50  # a space of few levels runs out of new children


@dataclass(frozen=True, slots=True, kw_only=True)
class EvolutionOptions:
    """One generation: ``offspring`` screened on a fraction of the tokens, ``survivors`` on all."""

    offspring: int = 8
    survivors: int = 2
    screening_fraction: float = 1 / 3


class Evolution:
    """One search: ask for children, tell their KL, until the budget is spent.

    Args:
        space: of sparsity axes.
        sparsity: the target.
        options: of a generation.
        seed: decides every draw.
    """

    def __init__(
        self, space: StrategySpace, sparsity: float, options: EvolutionOptions, *, seed: int
    ) -> None:
        self.options = options
        self._space = space
        self._generator = torch.Generator().manual_seed(seed)
        self._level = max(1, int(_LEVEL_FRACTION * min(axis.num_steps for axis in space.axes)))
        self.best = space.uniform(sparsity)
        self.best_kl: float | None = None  # until the start itself, or a child, is told
        self._seen = {self.best.key}

    @property
    def units_per_generation(self) -> float:
        """Forward passes over the whole text that one generation costs."""
        return self.options.offspring * self.options.screening_fraction + self.options.survivors

    def ask(self) -> list[Strategy]:
        """Return children of the best so far, all different and new; fewer where there are none."""
        children: list[Strategy] = []
        for _ in range(_TRIES_PER_CHILD * self.options.offspring):
            child = self._child()
            if child.key not in self._seen:
                self._seen.add(child.key)
                children.append(child)
            if len(children) == self.options.offspring:
                break
        return children

    def survivors(
        self, children: Sequence[Strategy], screening_kl: Sequence[float]
    ) -> list[Strategy]:
        """Return the children that deserve the whole text."""
        order = sorted(range(len(children)), key=lambda k: screening_kl[k])
        return [children[k] for k in order[: self.options.survivors]]

    def tell(self, strategies: Sequence[Strategy], kl: Sequence[float]) -> None:
        """Take measurements on the whole text; the best so far is kept."""
        for strategy, value in zip(strategies, kl, strict=True):
            if self.best_kl is None or value < self.best_kl:
                self.best, self.best_kl = strategy, value

    def _child(self) -> Strategy:
        steps = [
            round(v * axis.num_steps)
            for v, axis in zip(self.best.values, self._space.axes, strict=True)
        ]
        draws = torch.randint(1, _MAX_SWITCHES + 1, (2,), generator=self._generator)
        for _ in range(int(draws.min())):
            self._switch(steps)
        values = [
            count / axis.num_steps for count, axis in zip(steps, self._space.axes, strict=True)
        ]
        return Strategy(settings=tuple(zip(self._space.names, values, strict=True)))

    def _switch(self, steps: list[int]) -> None:
        axes = self._space.axes
        up = [a for a, axis in enumerate(axes) if steps[a] + self._level <= axis.max_step]
        down = [a for a in range(len(axes)) if steps[a] - self._level >= 0]
        more, less = self._pick(up), self._pick(down)
        if more is not None and less is not None:
            steps[more] += self._level
            steps[less] -= self._level

    def _pick(self, candidates: list[int]) -> int | None:
        if not candidates:
            return None
        return candidates[int(torch.randint(len(candidates), (1,), generator=self._generator))]
