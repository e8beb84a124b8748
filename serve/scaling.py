"""How many pruning replicas there should be: from the length of the queue, at once.

Serve's own policy looks at requests under way, of which cutting has none, and waits half a minute
before it scales up. `by_queue` is the hook that Serve calls in its controller; what it decides by
is `replicas_for`, a pure function. What this module does not know: the database.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

QUEUE_METRIC: Final = "active_jobs"

_WATCH_S: Final = 1.0
_WARMING_S: Final = 8.0  # on busy cores, until a replica takes its first job
_IDLE_S: Final = 15.0  # past a burst, and past the time after which idle replicas are stopped


def replicas_for(num_active: float, *, jobs_per_replica: int, lowest: int, highest: int) -> int:
    """Return how many replicas a queue deserves.

    Args:
        num_active: jobs queued and running.
        jobs_per_replica: that one replica may have before it.
        lowest: replicas that always stay.
        highest: replicas that may be.
    """
    return max(lowest, min(highest, math.ceil(num_active / jobs_per_replica)))


def is_worth_warming(
    num_active: int, num_running: int, *, num_finished: int, seconds: float, idle_s: float
) -> bool:
    """Say whether one more replica should warm up now, rather than leave the queue to the others.

    Args:
        num_active: jobs queued and running.
        num_running: of these, the ones at work.
        num_finished: jobs that the others have finished since this one began to watch.
        seconds: since then.
        idle_s: how long there has been nothing to do.
    """
    if num_active == 0:
        return seconds == 0 or idle_s >= _IDLE_S
    if num_running == 0:
        return True
    return seconds >= _WATCH_S and num_active * seconds > _WARMING_S * num_finished


def newest(series: Iterable[Iterable[Any]]) -> float:
    """Return the value of the latest point of all series; 0 if there is none.

    Every replica reports the same queue, so their reports are one series told by many.

    Args:
        series: of points with ``timestamp`` and ``value`` (Any: Serve's own type).
    """
    points = [point for one in series for point in one]
    return float(max(points, key=lambda point: point.timestamp).value) if points else 0.0


class QueuePolicy:
    """What Serve's controller asks.

    Args:
        jobs_per_replica: see `replicas_for`.
    """

    def __init__(self, jobs_per_replica: int) -> None:
        self._jobs_per_replica = jobs_per_replica

    # Any: Serve's context, whose metrics are untyped mappings.
    def __call__(self, context: Any) -> tuple[int, dict[str, object]]:
        """Return the wanted number of replicas, and no state."""
        reported: Mapping[object, Iterable[Any]] = (context.raw_metrics or {}).get(QUEUE_METRIC, {})
        wanted = replicas_for(
            newest(reported.values()),
            jobs_per_replica=self._jobs_per_replica,
            lowest=context.capacity_adjusted_min_replicas,
            highest=context.capacity_adjusted_max_replicas,
        )
        return wanted, {}
