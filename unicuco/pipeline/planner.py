"""`Planner`: requests -> plans, many at once, in milliseconds, from what was learned alone.

Every target becomes a sparsity over sites. Sizes convert exactly. ``max_kl`` and ``preference`` are
read off the front, a table of predictions over a fine grid of sparsities made once: ``max_kl`` is
the largest sparsity whose upper bound, made rising, stays within it; ``preference`` minimises the
weighted Tchebycheff value of size and log KL, both scaled to [0, 1] over the front (PAPERS.md 1b),
the weights multiplying, so that more preference for size never keeps more. Then one batch:
StratNet's answers, the exact fill, the surrogate's predictions.

What it does not know: weights and files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from unicuco.errors import InfeasibleRequestError, UnicucoError
from unicuco.space import StrategySpace
from unicuco.stratnet import StratNetAllocator
from unicuco.surrogate import EPSILON, GaussianProcess, Intervals
from unicuco.types import Plan, Prediction, Request, ServedAs, Strategy, Target

_GRID: Final = 341  # points of the front: steps of a quarter of a percent over [0.05, 0.9]


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontPoint:
    """One point of the front: a sparsity and its predicted KL.

    ``uniform_kl`` and ``fisher_kl`` are what those measured there on the validation text.
    """

    sparsity: float
    kl: Prediction
    uniform_kl: float | None = None
    fisher_kl: float | None = None


class Planner:
    """Answers requests for one run.

    Args:
        space: of the run.
        allocator: its StratNet.
        surrogate: its fitted surrogate.
        intervals: their calibration.
        sparsity_range: what was learned.
    """

    def __init__(
        self,
        *,
        space: StrategySpace,
        allocator: StratNetAllocator,
        surrogate: GaussianProcess,
        intervals: Intervals,
        sparsity_range: tuple[float, float],
    ) -> None:
        self.space = space
        self._allocator = allocator
        self._surrogate = surrogate
        self._intervals = intervals
        self._low, self._high = sparsity_range
        self._grid = torch.linspace(self._low, self._high, _GRID, dtype=torch.float64)
        # Of the exact strategies, so that what ``max_kl`` reads here is what its plan will say.
        predictions = [prediction for _, prediction in self._strategies(self._grid.tolist())]
        self._table = predictions
        self._upper = (
            torch.tensor([p.hi95 for p in predictions], dtype=torch.float64).cummax(0).values
        )
        self._quality = _quality(torch.tensor([p.mean for p in predictions], dtype=torch.float64))

    def plan(self, requests: Sequence[Request]) -> list[Plan | UnicucoError]:
        """Answer every request; one that can't be met is answered by its error, at its place."""
        answers: list[Plan | UnicucoError | float] = []
        for request in requests:
            try:
                answers.append(self._sparsity_of(request))
            except UnicucoError as error:
                answers.append(error)
        targets = [answer for answer in answers if isinstance(answer, float)]
        strategies = iter(self._strategies(targets))
        return [
            answer if isinstance(answer, UnicucoError) else self._plan(request, *next(strategies))
            for request, answer in zip(requests, answers, strict=True)
        ]

    def predict(self, strategies: Sequence[Strategy]) -> list[Prediction]:
        """Predict the KL of any strategies of the space on fresh text."""
        return self._predict(self.space.encode(strategies))

    def front(self, num_points: int = 18) -> list[FrontPoint]:
        """Return predictions at evenly spread sparsities of the learned range."""
        picks = torch.linspace(0, _GRID - 1, num_points).round().long().tolist()
        return [FrontPoint(sparsity=float(self._grid[k]), kl=self._table[k]) for k in picks]

    def _strategies(self, sparsities: list[float]) -> list[tuple[Strategy, Prediction]]:
        if not sparsities:
            return []
        targets = torch.tensor(sparsities, dtype=torch.float64)
        # Below the learned range the network is asked for its lowest target, and projection scales
        # that down.
        units = self._allocator.units(targets.clamp(min=self._low))
        budgets = [self.space.kept_for_sparsity(sparsity) for sparsity in sparsities]
        strategies = self.space.decode_exact(units, budgets)
        return list(zip(strategies, self.predict(strategies), strict=True))

    def _predict(self, points: Tensor) -> list[Prediction]:
        with torch.no_grad():
            mean, std = self._surrogate.posterior(points)
        predictions = self._intervals.predict(mean, std)
        dense = (points <= 0).all(1).tolist()
        nothing = Prediction(mean=0.0, lo95=0.0, hi95=0.0)  # the dense model itself, by definition
        return [nothing if is_dense else p for p, is_dense in zip(predictions, dense, strict=True)]

    def _plan(self, request: Request, strategy: Strategy, kl: Prediction) -> Plan:
        cost = self.space.cost
        kept = cost.kept_params(strategy.values)
        dropped = sum(cost.site_drops(strategy.values).values())
        return Plan(
            request=request,
            strategy=strategy,
            sparsity=dropped / cost.num_site_weights,
            kept_params=kept,
            total_params=cost.total_params,
            num_bytes=cost.num_bytes(strategy.values),
            served_as=ServedAs.MASK,
            kl=kl,
        )

    def _sparsity_of(self, request: Request) -> float:
        if request.served_as not in (None, ServedAs.MASK):
            raise InfeasibleRequestError(
                f"this run learned masks only; it can't serve a variant as {request.served_as}"
            )
        value = request.value
        if request.target is Target.SPARSITY:
            if value > self._high + 1e-12:
                raise self._outside(f"sparsity {value:g}", f"{self._high:g}", self._high)
            return float(value)
        if request.target is Target.MAX_PARAMS:
            return self._of_params(int(value))
        if request.target is Target.MAX_BYTES:
            return self._of_bytes(int(value))
        if request.target is Target.MAX_KL:
            return self._of_kl(value)
        return self._of_preference(value)

    def _of_params(self, wanted: int) -> float:
        cost = self.space.cost
        nearest = self.space.kept_for_sparsity(self._high)
        if wanted < nearest:
            raise self._outside(f"max_params {wanted:,}", f"{nearest:,}", nearest)
        return max(0, cost.total_params - wanted) / cost.num_site_weights

    def _outside(self, what: str, named: str, nearest: float) -> InfeasibleRequestError:
        return InfeasibleRequestError(
            f"{what} lies outside what this run learned (sparsity up to {self._high:g}); "
            f"the nearest that can be met is {named}",
            nearest=nearest,
        )

    def _of_bytes(self, wanted: int) -> float:
        dense = self.space.cost.num_bytes([0.0] * self.space.num_axes)
        if wanted < dense:
            raise InfeasibleRequestError(
                f"max_bytes {wanted:,} can't be met: a mask stores its zeros, "
                f"so every variant of this run takes {dense:,} bytes",
                nearest=float(dense),
            )
        return 0.0

    def _of_kl(self, bound: float) -> float:
        fits = int((self._upper * (1 + 1e-6) <= bound).sum())  # the last bits depend on the batch
        return float(self._grid[fits - 1]) if fits else 0.0

    def _of_preference(self, preference: float) -> float:
        if preference == 0.0:
            return 0.0
        size = (self._high - self._grid) / (self._high - self._low)
        worst = torch.maximum(preference * size, (1 - preference) * self._quality)
        return float(self._grid[int(worst.argmin())])


def _quality(mean: Tensor) -> Tensor:
    """Scale log KL along the front to [0, 1], made rising."""
    log_kl = (mean + EPSILON).log().cummax(0).values
    return (log_kl - log_kl[0]) / (log_kl[-1] - log_kl[0]).clamp(min=1e-12)
