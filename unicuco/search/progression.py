"""ATP for one target: sparsities rise along the blocks in an arithmetic progression.

The whole allocation is one number, the difference between neighbouring blocks (arXiv 2502.14770):
block b gets s + beta (b - mean block), the mean over weights being the target exactly, and every
site of a block the same. The number is tuned in a handful of trials: five shares of the largest
difference that keeps every block in range, then twice the two neighbours of the best, at half the
distance each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from unicuco.calibration import Sampling
from unicuco.search.request import Record, RequestConfig, asks_of, kl_of
from unicuco.types import Ask, Outcome, Strategy

_GRID: Final = (0.0, 0.2, 0.4, 0.6, 0.8)
_REFINEMENTS: Final = (0.1, 0.05)


class Progression:
    """One search (see the module's docstring); nine trials at most."""

    lag = 1
    sampling = Sampling.EVEN
    round_size = len(_GRID)

    def __init__(self, config: RequestConfig) -> None:
        self.config = config
        space = config.space
        self._block = torch.tensor(config.blocks, dtype=torch.float64)
        weights = torch.tensor([axis.num_steps for axis in space.axes], dtype=torch.float64)
        self._offset = self._block - (weights * self._block).sum() / weights.sum()
        self._largest = self._largest_difference()
        self._shares: dict[str, float] = {}  # of the strategies that were made
        self.record = Record(best=space.uniform(config.sparsity))

    @property
    def num_evaluations(self) -> int:
        """The most asks in all, or as many as the units pay for."""
        most = len(_GRID) + 2 * len(_REFINEMENTS)
        return most if self.config.units is None else min(most, int(self.config.units))

    @property
    def best(self) -> Strategy:
        """The best progression so far."""
        return self.record.best

    def ask(self, round: int) -> list[Ask]:
        """Return the progressions of a round."""
        if round == 0:
            shares = list(_GRID)
        elif round <= len(_REFINEMENTS):
            middle = self._best_share(round)
            step = _REFINEMENTS[round - 1]
            shares = [s for s in (middle - step, middle + step) if 0 <= s <= 1]
        else:
            return []
        seen = self.record.seen(round)
        chosen = {s.key: s for s in map(self.progression, shares) if s.key not in seen}
        left = self.num_evaluations - sum(len(self.record.told(k)) for k in range(round))
        return asks_of(round, list(chosen.values())[: max(0, left)])

    def tell(self, round: int, results: Sequence[tuple[Ask, Outcome]]) -> None:
        """Take a round of trials."""
        self.record.tell(round, results)

    def progression(self, share: float) -> Strategy:
        """Return the progression whose difference is ``share`` in [0, 1] of the largest."""
        space, target = self.config.space, self.config.sparsity
        values = target + share * self._largest * self._offset
        low = torch.tensor([axis.low for axis in space.axes], dtype=torch.float64)
        unit = ((values - low) / space.span).clamp(0, 1)
        (strategy,) = space.decode_exact(unit[None], [space.kept_for_sparsity(target)])
        self._shares.setdefault(strategy.key, share)
        return strategy

    def _best_share(self, round: int) -> float:
        told = [pair for k in range(round) for pair in self.record.told(k)]
        if not told:
            return 0.0
        best = min(told, key=lambda pair: kl_of(pair[1]))[0].strategy
        if best.key not in self._shares:  # told by a record of an earlier process
            for earlier in range(round):
                self.ask(earlier)
        return self._shares[best.key]

    def _largest_difference(self) -> float:
        """Return the largest difference at which no block leaves the range of its axes."""
        target = self.config.sparsity
        bounds = [
            (axis.high - target) / offset if offset > 0 else (target - axis.low) / -offset
            for axis, offset in zip(self.config.space.axes, self._offset.tolist(), strict=True)
            if offset
        ]
        return max(0.0, min(bounds, default=0.0))
