"""Rank-window descent (ours): projected gradient descent for one target, on the model itself.

One evaluation gives the KL and its derivative along every axis (3 units; DESIGN.md section 8,
finding 2). The gradient of log KL is pulled back through the projection onto the budget to logits,
where Adam takes a step, smaller every time; each point is rounded to its exact strategy, and the
best measured one is the answer. The start is half way between the uniform and the Fisher
allocation (finding 1): a direction that costs nothing more, and a step that is not too long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from unicuco.allocate import AllocationContext, Fisher
from unicuco.calibration import Sampling
from unicuco.search.request import Record, RequestConfig, asks_of
from unicuco.surrogate import EPSILON
from unicuco.types import Ask, Evaluation, Outcome, Strategy

_UNITS_PER_STEP: Final = 3.0
_STEPS: Final = 12
LEARNING_RATE: Final = 0.4
_BETAS: Final = (0.0, 0.9)  # a dozen steps leave no time for momentum
_MIX: Final = 0.5


class Descent:
    """One search (see the module's docstring).

    Args:
        config: of the request.
        learning_rate: of the first step, in logits; falls as a cosine.
    """

    lag = 1
    sampling = Sampling.EVEN
    round_size = 1

    def __init__(self, config: RequestConfig, learning_rate: float = LEARNING_RATE) -> None:
        self.config = config
        self._learning_rate = learning_rate
        space = config.space
        self._kept = space.kept_for_sparsity(config.sparsity)
        self._budget = torch.tensor([self._kept], dtype=torch.float64)
        uniform = space.uniform(config.sparsity)
        fisher = Fisher(AllocationContext(space=space, curves=config.curves))
        ends = space.encode([uniform, *fisher.allocate([config.sparsity])])
        self._start = torch.logit(ends[:1] + _MIX * (ends[1:] - ends[:1]), eps=1e-4)
        self.record = Record(best=uniform)

    @property
    def num_evaluations(self) -> int:
        """Steps: a dozen, or as many as the units pay for."""
        units = self.config.units
        return _STEPS if units is None else int(units / _UNITS_PER_STEP)

    @property
    def best(self) -> Strategy:
        """The best point so far."""
        return self.record.best

    def ask(self, round: int) -> list[Ask]:
        """Return the next point; none after the last step, or where it would stand still."""
        if round >= self.num_evaluations:
            return []
        unit = self.config.space.project_logits(self._logits(round), self._budget)
        strategies = self.config.space.decode_exact(unit, [self._kept])
        seen = self.record.seen(round)
        return asks_of(round, [s for s in strategies if s.key not in seen], derivatives=True)

    def tell(self, round: int, results: Sequence[tuple[Ask, Outcome]]) -> None:
        """Take one point."""
        self.record.tell(round, results)

    def _logits(self, num_steps: int) -> Tensor:
        """Return the ``1 x d`` logits after the steps that the first rounds' results imply."""
        z = self._start.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([z], lr=self._learning_rate, betas=_BETAS)
        for step in range(num_steps):
            for _, outcome in self.record.told(step):
                if isinstance(outcome, Evaluation) and outcome.gradient is not None:
                    share = step / max(1, self.num_evaluations - 1)
                    optimizer.param_groups[0]["lr"] = (
                        self._learning_rate * 0.5 * (1.1 + 0.9 * math.cos(math.pi * share))
                    )
                    optimizer.zero_grad()
                    slope = torch.tensor(outcome.gradient, dtype=torch.float64)
                    slope = self.config.space.span * slope / (outcome.kl + EPSILON)
                    unit = self.config.space.project_logits(z, self._budget)
                    unit.backward(slope[None])
                    optimizer.step()
        return z.detach()
