"""`Planner`: requests -> plans, many at once, in milliseconds, from what was learned alone.

Every target becomes a sparsity over sites. Sizes convert exactly. ``max_kl`` and ``preference`` are
read off the front, a table of predictions over a fine grid of sparsities made once: ``max_kl`` is
the largest sparsity whose upper bound, made rising, stays within it; ``preference`` minimises the
weighted Tchebycheff value of size and log KL, both scaled to [0, 1] over the front (PAPERS.md 1b),
the weights multiplying, so that more preference for size never keeps more. Then one batch:
StratNet's answers, the exact fill, the surrogate's predictions.

Of a run that learned bits the front counts bytes, and sizes are met by `ByteRequests`. Where shapes
were learned and their latency was measured, ``max_latency_ms`` is read off the front too
(`LatencyRequests`).

With several tasks, a request's weights say what KL means; the front is then that of the weighted
KL, made when a weighting first asks for it.

What it does not know: weights and files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from unicuco.dimensions import ByteCost
from unicuco.errors import InfeasibleRequestError, UnicucoError
from unicuco.objectives import LatencyModel
from unicuco.pipeline.byte_requests import ByteRequests, kv_tokens
from unicuco.pipeline.latency_requests import LatencyRequests, no_latency_model
from unicuco.space import StrategySpace
from unicuco.stratnet import StratNetAllocator
from unicuco.surrogate import EPSILON, Forecast
from unicuco.types import Plan, Prediction, Request, ServedAs, Strategy, Target

_MAX_FRONTS: Final = 64  # kept at a time, of different task weights
_LEARNED: Final = {
    ServedAs.MASK: "masks",
    ServedAs.SHRINK: "smaller shapes",
    ServedAs.QUANTISED: "fewer bits",
}
_GRID: Final = 341  # points of the front: steps of a quarter of a percent over [0.05, 0.9]


# A request's task weights in task order; none: one text, or all tasks equally.
_Weights = tuple[float, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Front:
    """Predictions along the grid under one weighting, and what targets read off them."""

    predictions: list[Prediction]
    upper: Tensor
    quality: Tensor
    num_bytes: Tensor
    latency_features: Tensor | None


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
        forecast: its fitted surrogate with the calibration.
        sparsity_range: what was learned.
        tasks: names that requests may weigh, in order; none: one text.
        latency: what was measured of its shapes, if it was.
    """

    def __init__(
        self,
        *,
        space: StrategySpace,
        allocator: StratNetAllocator,
        forecast: Forecast,
        sparsity_range: tuple[float, float],
        tasks: tuple[str, ...] = (),
        latency: LatencyModel | None = None,
    ) -> None:
        self.space = space
        self._allocator = allocator
        self._forecast = forecast
        self._tasks = tasks
        self._low, self._high = sparsity_range
        self._grid = torch.linspace(self._low, self._high, _GRID, dtype=torch.float64)
        cost = space.cost
        self._latency = None if latency is None else LatencyRequests(latency, cost)
        self._fronts: dict[_Weights, _Front] = {}
        self._front_of(None)
        self._bytes = None
        if isinstance(cost, ByteCost):
            self._bytes = ByteRequests(space, cost, allocator, sparsity_range, self.predict)

    def plan(self, requests: Sequence[Request]) -> list[Plan | UnicucoError]:
        """Answer every request; one that can't be met is answered by its error, at its place."""
        answers: list[UnicucoError | Strategy | float] = []
        weightings: list[_Weights] = []
        for request in requests:
            try:
                weights = self._weights_of(request)
                self._check_served_as(request)
                if self._bytes is not None and self._bytes.moves(request):
                    answers.append(self._bytes.answer(request))
                    continue
                answers.append(self._sparsity_of(request, weights))
                weightings.append(weights)
            except UnicucoError as error:
                answers.append(error)
        targets = [answer for answer in answers if isinstance(answer, float)]
        met = [r for r, answer in zip(requests, answers, strict=True) if isinstance(answer, float)]
        over_sites = [r.target is Target.SPARSITY for r in met]
        strategies = iter(self._strategies(targets, weightings, over_sites))
        plans: list[Plan | UnicucoError] = []
        for request, answer in zip(requests, answers, strict=True):
            if isinstance(answer, UnicucoError):
                plans.append(answer)
            elif isinstance(answer, Strategy):
                plans.append(self._plan(request, answer, *self.predict([answer])))
            else:
                plans.append(self._plan(request, *next(strategies)))
        return plans

    def along(self, targets: Sequence[float]) -> list[Strategy]:
        """Return the answers to targets of the learned range: sparsities, or shares of bytes."""
        return [s for s, _ in self._strategies(list(targets), [None] * len(targets))]

    def predict(self, strategies: Sequence[Strategy]) -> list[Prediction]:
        """Predict the KL of any strategies of the space on fresh text."""
        return self._predict(self.space.encode(strategies), None)

    def front(self, num_points: int = 18) -> list[FrontPoint]:
        """Return predictions at evenly spread sparsities of the learned range."""
        picks = torch.linspace(0, _GRID - 1, num_points).round().long().tolist()
        table = self._front_of(None).predictions
        return [FrontPoint(sparsity=float(self._grid[k]), kl=table[k]) for k in picks]

    def _front_of(self, weights: _Weights) -> _Front:
        if weights not in self._fronts:
            # Of the exact strategies, so that what ``max_kl`` reads here is what its plan will say.
            grid = self._grid.tolist()
            answers = self._strategies(grid, [weights] * len(grid))
            predictions = [p for _, p in answers]
            strategies = [strategy for strategy, _ in answers]
            sizes = [self.space.cost.num_bytes(strategy.values) for strategy in strategies]
            highs = torch.tensor([p.hi95 for p in predictions], dtype=torch.float64)
            means = torch.tensor([p.mean for p in predictions], dtype=torch.float64)
            if len(self._fronts) >= _MAX_FRONTS:
                self._fronts = {None: self._fronts[None]}
            self._fronts[weights] = _Front(
                predictions=predictions,
                upper=highs.cummax(0).values,
                quality=_quality(means),
                num_bytes=torch.tensor(sizes),
                latency_features=None
                if self._latency is None
                else self._latency.features(strategies),
            )
        return self._fronts[weights]

    def _weights_of(self, request: Request) -> _Weights:
        if request.task_weights is None:
            return None
        if not self._tasks:
            raise InfeasibleRequestError(
                "this run has one text and no tasks to weigh; leave task_weights out, or learn "
                "one with --task NAME=FILE"
            )
        given = dict(request.task_weights)
        unknown = [name for name in given if name not in self._tasks]
        if unknown:
            raise InfeasibleRequestError(
                f"this run has no task {unknown[0]!r}; its tasks are {', '.join(self._tasks)}"
            )
        return tuple(given.get(task, 0.0) for task in self._tasks)

    def _matrix(self, weightings: Sequence[_Weights]) -> Tensor | None:
        """Return ``b x k`` task weights; none where there is one text."""
        if not self._tasks:
            return None
        even = (1 / len(self._tasks),) * len(self._tasks)
        return torch.tensor([w or even for w in weightings], dtype=torch.float64)

    def _strategies(
        self,
        sparsities: list[float],
        weightings: Sequence[_Weights],
        over_sites: Sequence[bool] = (),
    ) -> list[tuple[Strategy, Prediction]]:
        """Answer targets; those ``over_sites`` are reached by what sites lose alone."""
        if not sparsities:
            return []
        targets = torch.tensor(sparsities, dtype=torch.float64)
        # Below the learned range the network is asked for its lowest target, and projection scales
        # that down.
        weights = self._matrix(weightings)
        units = self._allocator.units(targets.clamp(min=self._low), weights)
        budgets = [self.space.kept_for_sparsity(sparsity) for sparsity in sparsities]
        strategies = self.space.decode_exact(units, budgets)
        shrinks = self.space.cost.served_as is ServedAs.SHRINK
        for k, sparsity in enumerate(sparsities if shrinks and over_sites else ()):
            if over_sites[k]:
                strategies[k] = self._reach(units[k : k + 1], strategies[k], sparsity)
        predictions = self._predict(self.space.encode(strategies), weights)
        return list(zip(strategies, predictions, strict=True))

    def _reach(self, unit: Tensor, strategy: Strategy, sparsity: float) -> Strategy:
        """Lower the budget by what norms and biases took of it, until the sites lose enough."""
        cost = self.space.cost
        budget = self.space.kept_for_sparsity(sparsity)
        wanted = cost.total_params - budget
        fewest, _ = self.space.kept_range()
        while budget > fewest:
            lost = sum(cost.site_drops(strategy.values).values())
            if lost >= wanted:
                break
            budget = max(fewest, budget - (wanted - lost))
            (strategy,) = self.space.decode_exact(unit, [budget])
        return strategy

    def _predict(self, points: Tensor, weights: Tensor | None) -> list[Prediction]:
        sizes = self.space.cost.size(self.space.settings(points))
        predictions = self._forecast.predict(points, sizes, weights)
        dense = (points <= 0).all(1).tolist()
        nothing = Prediction(mean=0.0, lo95=0.0, hi95=0.0)  # the dense model itself, by definition
        return [nothing if is_dense else p for p, is_dense in zip(predictions, dense, strict=True)]

    def _plan(self, request: Request, strategy: Strategy, kl: Prediction) -> Plan:
        cost, values = self.space.cost, strategy.values
        packed = kv = None
        if isinstance(cost, ByteCost):
            packed = cost.packed_bytes(values)
            if request.target is Target.MAX_TOTAL_BYTES:
                kv = cost.kv_bytes(values, kv_tokens(request, cost))
        dropped = sum(cost.site_drops(values).values())
        return Plan(
            request=request,
            strategy=strategy,
            sparsity=dropped / cost.num_site_weights,
            kept_params=cost.kept_params(values),
            total_params=cost.total_params,
            num_bytes=cost.num_bytes(values),
            served_as=cost.served_as,
            kl=kl,
            packed_bytes=packed,
            kv_bytes=kv,
            latency=None if self._latency is None else self._latency.forecast(request, strategy),
        )

    def _check_served_as(self, request: Request) -> None:
        served_as = self.space.cost.served_as
        if request.served_as not in (None, served_as):
            raise InfeasibleRequestError(
                f"this run learned {_LEARNED[served_as]} only; "
                f"it can't serve a variant as {request.served_as}"
            )

    def _sparsity_of(self, request: Request, weights: _Weights) -> float:
        value = request.value
        if request.target is Target.SPARSITY:
            if value > self._high + 1e-12:
                raise self._outside(f"sparsity {value:g}", f"{self._high:g}", self._high)
            return float(value)
        if request.target is Target.MAX_PARAMS:
            return self._of_params(int(value))
        if request.target is Target.MAX_BYTES:
            return self._of_bytes(int(value), self._front_of(weights))
        if request.target is Target.MAX_KL:
            return self._of_kl(value, self._front_of(weights))
        if request.target is Target.MAX_LATENCY_MS:
            return self._of_latency(request, self._front_of(weights))
        if request.target in (Target.MAX_TOTAL_BYTES, Target.MAX_PACKED_BYTES):
            raise InfeasibleRequestError(
                f"this run did not learn bits, which {request.target} counts; learn one with "
                "--dimensions weight_bits,kv_bits or sparsity,weight_bits"
            )
        return self._of_preference(value, self._front_of(weights))

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

    def _of_bytes(self, wanted: int, front: _Front) -> float:
        dense = self.space.cost.num_bytes([0.0] * self.space.num_axes)
        if wanted >= dense:
            return 0.0
        if self.space.cost.served_as is ServedAs.MASK:
            raise InfeasibleRequestError(
                f"max_bytes {wanted:,} can't be met: a mask stores its zeros, "
                f"so every variant of this run takes {dense:,} bytes",
                nearest=float(dense),
            )
        fits = (front.num_bytes <= wanted).nonzero()[:, 0]
        if not len(fits):
            least = int(front.num_bytes.min())
            raise self._outside(f"max_bytes {wanted:,}", f"{least:,}", least)
        return float(self._grid[int(fits[0])])

    def _of_kl(self, bound: float, front: _Front) -> float:
        fits = int((front.upper * (1 + 1e-6) <= bound).sum())  # the last bits depend on the batch
        return float(self._grid[fits - 1]) if fits else 0.0

    def _of_latency(self, request: Request, front: _Front) -> float:
        if self._latency is None or front.latency_features is None:
            raise no_latency_model(self.space.cost.served_as)
        first = self._latency.first_within(request, front.latency_features)
        return 0.0 if first is None else float(self._grid[first])

    def _of_preference(self, preference: float, front: _Front) -> float:
        if preference == 0.0:
            return 0.0
        size = (self._high - self._grid) / (self._high - self._low)
        worst = torch.maximum(preference * size, (1 - preference) * front.quality)
        return float(self._grid[int(worst.argmin())])


def _quality(mean: Tensor) -> Tensor:
    """Scale log KL along the front to [0, 1], made rising."""
    log_kl = (mean + EPSILON).log().cummax(0).values
    return (log_kl - log_kl[0]) / (log_kl[-1] - log_kl[0]).clamp(min=1e-12)
