"""`PaperSearch`, the published preset: UniCuCo's loop where it is known, else PSL-MOBO's.

Weighted Tchebycheff scalarisation of size and quality with weights multiplied (large weight on
size: smaller), a Gaussian process of the quality, a set model from preferences to strategies
trained by its gradient at a lower confidence bound and re-created every round, and batches chosen
by greedy hypervolume gain (arXiv 2505.12216; Lin et al. 2022, whose constants these are). Size is
exact and linear, so it needs no process. Two departures, both forced by overlapping rounds: a round
sees the evaluations up to two rounds before, and the ten Latin-hypercube points are the first two
rounds.

Notation: f1 = kept density in the unit cube, f2 = log KL standardised, z the ideal point, lambda
the preference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from unicuco.search.base import History, SearchConfig
from unicuco.search.hypervolume import greedy_batch
from unicuco.space import StrategySpace
from unicuco.stratnet import NetKind, StratNet
from unicuco.surrogate import GaussianProcess, Observations, SurrogateOptions
from unicuco.types import Ask, Evaluation, Outcome, Strategy

_STEPS: Final = 1000
_PREFERENCES_PER_STEP: Final = 10
_LEARNING_RATE: Final = 1e-3
_LCB: Final = 0.1
_CANDIDATES: Final = 1000
_LOCAL_STEP: Final = 0.01
_IDEAL_MARGIN: Final = 0.1
_SUM_WEIGHT: Final = 0.01
_INITIAL: Final = 10


class PaperSearch:
    """The published search (see the module's docstring)."""

    round_size = 5

    def __init__(self, config: SearchConfig) -> None:
        self.config = config
        self._space = config.space()
        self._history = History()

    def ask(self, round: int) -> list[Ask]:
        """Return the strategies of a round; values only, no derivatives."""
        evaluations = self._history.visible(round)
        if len({strategy.key for strategy, _ in evaluations}) < 2:
            points = self._design(round)
        else:
            points = self._batch(evaluations, round)
        return [
            Ask(round=round, position=position, strategy=strategy, derivatives=False)
            for position, strategy in enumerate(self._space.decode(points))
        ]

    def tell(self, round: int, results: Sequence[tuple[Ask, Outcome]]) -> None:
        """Take a whole round in ask order."""
        self._history.tell(round, results)

    def _design(self, round: int) -> Tensor:
        """Return points of a Latin hypercube: at first, and while nothing succeeds."""
        number, half = divmod(round, _INITIAL // self.round_size)
        seed = self.config.seed + 1_000_003 * number
        design = latin_hypercube(_INITIAL, self._space.num_axes, seed=seed)
        return design[half * self.round_size : (half + 1) * self.round_size]

    def _batch(self, evaluations: list[tuple[Strategy, Evaluation]], round: int) -> Tensor:
        seed = self.config.seed * 100_003 + round
        surrogate, net = learn_preferences(self.config, evaluations, seed=seed)
        objectives = _Objectives(surrogate, _observe(self._space, evaluations))
        generator = torch.Generator().manual_seed(seed + 1)
        preferences = _draw_preferences(_CANDIDATES, generator)
        points = net(preferences).detach().double()
        moved = (
            points - _LOCAL_STEP * objectives.descent(points, preferences, normalise=False)
        ).clamp(0, 1)
        candidates = torch.cat([points, moved])
        values = objectives.bounds(candidates)[0]
        return candidates[greedy_batch(objectives.measured, values, self.round_size)]


def learn_preferences(
    config: SearchConfig, evaluations: Sequence[tuple[Strategy, Evaluation]], *, seed: int
) -> tuple[GaussianProcess, StratNet]:
    """Fit the process and train a fresh preference network through it.

    Raises:
        SurrogateError: too few evaluations succeeded.
    """
    space = config.space()
    observations = _observe(space, evaluations)
    surrogate = GaussianProcess(
        SurrogateOptions(curves=False, directions=0, steps=config.surrogate.steps)
    )
    surrogate.fit(observations)
    objectives = _Objectives(surrogate, observations)
    net = StratNet(NetKind.PREFERENCE, space.num_axes, seed=seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=_LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(_STEPS):
        preferences = _draw_preferences(_PREFERENCES_PER_STEP, generator)
        points = net(preferences)
        direction = objectives.descent(points.detach().double(), preferences, normalise=True)
        optimizer.zero_grad()
        points.backward(direction.to(points.dtype))
        optimizer.step()
    return surrogate, net


def latin_hypercube(n: int, d: int, *, seed: int) -> Tensor:
    """Return ``n x d`` float64 points: every axis' n equal slices hold one point each."""
    generator = torch.Generator().manual_seed(seed)
    slices = torch.stack([torch.randperm(n, generator=generator) for _ in range(d)], dim=1)
    return (slices + torch.rand(n, d, generator=generator, dtype=torch.float64)) / n


class _Objectives:
    """Both objectives' lower confidence bounds, standardised, and how Tchebycheff values fall."""

    def __init__(self, surrogate: GaussianProcess, observations: Observations) -> None:
        self._surrogate = surrogate
        raw = torch.stack([1 - observations.points.mean(1), observations.values], dim=1)
        self._shift, self._scale = raw.mean(0), raw.std(0).clamp(min=1e-6)
        self.measured = (raw - self._shift) / self._scale
        self._ideal = torch.minimum(
            torch.zeros(2, dtype=torch.float64), self.measured.min(0).values - _IDEAL_MARGIN
        )

    def bounds(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``q x 2`` bounds and the ``q x 2 x d`` gradients at ``q x d`` points."""
        x = points.detach().requires_grad_(True)
        with torch.enable_grad():
            mean, std = self._surrogate.posterior(x)
            quality = (mean - _LCB * std - self._shift[1]) / self._scale[1]
            gradient = torch.autograd.grad(quality.sum(), x)[0]
        size = (1 - points.mean(1) - self._shift[0]) / self._scale[0]
        slope = torch.full_like(points, -1.0 / points.shape[1]) / self._scale[0]
        return torch.stack([size, quality.detach()], 1), torch.stack([slope, gradient], 1)

    def descent(self, points: Tensor, preferences: Tensor, *, normalise: bool) -> Tensor:
        """Return the ``q x d`` gradient of each point's weighted Tchebycheff value."""
        values, gradients = self.bounds(points)
        weights = preferences.double()
        worst = (weights * (values - self._ideal)).argmax(1)
        rows = torch.arange(len(points))
        direction = weights[rows, worst, None] * gradients[
            rows, worst
        ] + _SUM_WEIGHT * gradients.sum(1)
        return (
            direction / direction.norm(dim=1, keepdim=True).clamp(min=1e-12)
            if normalise
            else direction
        )


def _draw_preferences(n: int, generator: torch.Generator) -> Tensor:
    # Dirichlet(1, 1) is uniform on the segment.
    share = torch.rand(n, generator=generator)
    return torch.stack([share, 1 - share], dim=1) + 1e-4


def _observe(
    space: StrategySpace, evaluations: Sequence[tuple[Strategy, Evaluation]]
) -> Observations:
    return Observations.from_measurements(
        space.encode([strategy for strategy, _ in evaluations]),
        torch.tensor([evaluation.kl for _, evaluation in evaluations], dtype=torch.float64),
        [None] * len(evaluations),
        space.span,
    )
