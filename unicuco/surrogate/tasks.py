"""Several search texts: one surrogate each, and what they say together under a weighting.

The weighted KL of a strategy is the sum of the tasks' KLs times their weights, which sum to 1. Its
logarithm's deviation is bounded by the mean of the tasks' own, weighted by their shares of the sum:
what it would be if all were wrong in the same direction.

Notation: k tasks, q query points, d axes, w weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from unicuco.surrogate.gp import GaussianProcess, SurrogateOptions
from unicuco.surrogate.intervals import Intervals, predictions
from unicuco.tensors import named_under
from unicuco.types import Prediction


class Surrogate(Protocol):
    """What is fitted to evaluations, of one search text or of several."""

    def posterior(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of log (KL + EPSILON), ``q`` each, at ``q x d`` points."""

    def state(self) -> dict[str, Tensor]:
        """Return everything that restoring needs, as named tensors."""


class TaskSurrogates:
    """One fitted process per task, in task order."""

    def __init__(self, processes: Mapping[str, GaussianProcess]) -> None:
        self.processes = dict(processes)

    def posteriors(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return every task's mean and deviation, ``k x q`` each."""
        pairs = [process.posterior(points) for process in self.processes.values()]
        return torch.stack([mean for mean, _ in pairs]), torch.stack([std for _, std in pairs])

    def posterior(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of the log KL of all tasks equally weighted."""
        k = len(self.processes)
        return self.weighted(points, torch.full((len(points), k), 1 / k, dtype=torch.float64))

    def weighted(self, points: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of the log weighted KL, ``q`` each, by ``q x k`` weights."""
        mean, std = self.posteriors(points)
        centre, shares = combine(mean, weights)
        return centre, (shares * std).sum(0)

    def state(self) -> dict[str, Tensor]:
        """Return every process' state under its task's number."""
        return {
            f"task{number}/{name}": tensor
            for number, process in enumerate(self.processes.values())
            for name, tensor in process.state().items()
        }

    @classmethod
    def restore(
        cls, options: SurrogateOptions, tasks: Sequence[str], state: Mapping[str, Tensor]
    ) -> TaskSurrogates:
        """Rebuild from `state`, without fitting."""
        processes = {}
        for number, task in enumerate(tasks):
            own = named_under(f"task{number}/", state)
            processes[task] = GaussianProcess.restore(options, own)
        return cls(processes)


def combine(log_kl: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log weighted KL, ``q``, and the tasks' shares in it, ``k x q``.

    Args:
        log_kl: ``k x q`` log (KL + EPSILON).
        weights: ``q x k``, rows of sum 1.
    """
    top = log_kl.detach().max(0).values
    parts = weights.double().T * (log_kl - top).exp()
    total = parts.sum(0)
    return total.log() + top, parts / total


class Forecast(Protocol):
    """Predictions on fresh text, under task weights where there are tasks."""

    def predict(self, points: Tensor, sizes: Tensor, weights: Tensor | None) -> list[Prediction]:
        """Return predictions at ``q x d`` points of ``q`` sizes; ``weights`` ``q x k`` or none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextForecast:
    """A surrogate of one text with its calibration."""

    surrogate: GaussianProcess
    intervals: Intervals

    def predict(self, points: Tensor, sizes: Tensor, weights: Tensor | None) -> list[Prediction]:
        """Return predictions; there is nothing to weigh."""
        with torch.no_grad():
            mean, std = self.surrogate.posterior(points)
        return self.intervals.predict(mean, std, sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskForecast:
    """Surrogates of several tasks, each with its own calibration."""

    surrogates: TaskSurrogates
    intervals: tuple[Intervals, ...]

    def predict(self, points: Tensor, sizes: Tensor, weights: Tensor | None) -> list[Prediction]:
        """Return predictions of the weighted KL; none: all tasks equally."""
        k = len(self.intervals)
        if weights is None:
            weights = torch.full((len(points), k), 1 / k, dtype=torch.float64)
        with torch.no_grad():
            mean, std = self.surrogates.posteriors(points)
        corrected = [
            own.corrected(m, s, sizes) for own, m, s in zip(self.intervals, mean, std, strict=True)
        ]
        centre, shares = combine(torch.stack([centre for centre, _ in corrected]), weights)
        own = torch.stack([variance for _, variance in corrected])
        spread = (shares * own.sqrt()).sum(0)
        degrees = min(interval.degrees for interval in self.intervals)
        return predictions(centre, spread.square(), degrees=degrees)
