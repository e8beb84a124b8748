"""How learning goes, as Ray metrics: each node's metrics endpoint has them as ``ray_unicuco_…``.

The driver counts what its pool takes and returns; the learner's proxy notes the hypervolume of what
was told, which is what was committed. What this module does not know: where the numbers are looked
at, and the service's own metrics (`serve.metrics`).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Final, Protocol

from ray.util.metrics import Counter, Gauge, Histogram

from unicuco.search.hypervolume import quality_volume
from unicuco.types import Ask, Evaluation, FailedEvaluation, Outcome

_SECONDS: Final = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]


class Meter(Protocol):
    """What is told of evaluations."""

    def submitted(self) -> None:
        """Note that an ask was given to the pool."""

    def finished(self, outcome: Outcome) -> None:
        """Note that the pool returned an outcome."""

    def told(self, results: Sequence[tuple[Ask, Outcome]]) -> None:
        """Note what the search was told: committed results, those of a resumed run included."""

    def close(self) -> None:
        """Note that nothing is in flight any more."""


class NoMeter:
    """Notes nothing."""

    def submitted(self) -> None:
        """Note nothing."""

    def finished(self, outcome: Outcome) -> None:
        """Note nothing."""

    def told(self, results: Sequence[tuple[Ask, Outcome]]) -> None:
        """Note nothing."""

    def close(self) -> None:
        """Note nothing."""


class RayMeter:
    """Notes everything in Ray's metrics, which this process' node exports. Ray must run."""

    def __init__(self) -> None:
        self._evaluations = Counter(
            "unicuco_evaluations_total", "Evaluations this driver got back, failed ones included."
        )
        self._failures = Counter("unicuco_failed_evaluations_total", "Those of them that failed.")
        # Ray's histograms know their sum by the middles of buckets only: the mean is this over
        # the number of evaluations.
        self._seconds = Counter(
            "unicuco_evaluation_seconds_total", "Seconds that replicas spent on them."
        )
        self._spread = Histogram(
            "unicuco_evaluation_seconds", "Seconds of one evaluation.", boundaries=_SECONDS
        )
        self._in_flight = Gauge(
            "unicuco_evaluations_in_flight", "Strategies that were submitted and not yet returned."
        )
        self._volume = Gauge(
            "unicuco_best_hypervolume",
            "Area of (kept fraction, log KL) that is dominated, up to the dense size and 3 nats.",
        )
        self._lock = threading.Lock()  # asks come from another thread than outcomes
        self._num_in_flight = 0
        self._points: list[tuple[float, float]] = []

    def submitted(self) -> None:
        """Note that an ask was given to the pool."""
        self._move(1)

    def finished(self, outcome: Outcome) -> None:
        """Note that the pool returned an outcome."""
        self._move(-1)
        self._evaluations.inc()
        if outcome.wall_s > 0:
            self._seconds.inc(outcome.wall_s)
        self._spread.observe(outcome.wall_s)
        if isinstance(outcome, FailedEvaluation):
            self._failures.inc()

    def told(self, results: Sequence[tuple[Ask, Outcome]]) -> None:
        """Note the hypervolume of all that was told."""
        fresh = [
            (outcome.kept_fraction, outcome.kl)
            for ask, outcome in results
            if isinstance(outcome, Evaluation) and ask.tokens is None
        ]
        self._points = _front(self._points + fresh)
        self._volume.set(quality_volume(self._points))

    def close(self) -> None:
        """Note that nothing is in flight any more."""
        self._move(-self._num_in_flight)

    def _move(self, change: int) -> None:
        with self._lock:
            self._num_in_flight += change
            self._in_flight.set(self._num_in_flight)


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other one dominates, by rising first coordinate."""
    kept: list[tuple[float, float]] = []
    for point in sorted(points):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept
