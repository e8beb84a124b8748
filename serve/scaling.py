"""How many pruning replicas there should be: from the length of the queue, within seconds.

Serve's own policy looks at requests under way, of which cutting has none, and waits half a minute
before it scales up. `QueuePolicy` is the hook that Serve calls in its controller; what it decides
by are `replicas_for` and `replicas_now`, which know neither clock nor cluster. What this module
does not know: the database.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

QUEUE_METRIC: Final = "active_jobs"
_STATE: Final = "burst"

_WATCH_S: Final = 1.0
_WARMING_S: Final = 8.0  # on busy cores, until a replica takes its first job
_IDLE_S: Final = 15.0  # past a burst, and past the time after which idle replicas are stopped
_HOLD_S: Final = 3.0  # what starting replicas takes, and takes from the others, on busy cores
_NOTABLE_S: Final = 1.0


def replicas_for(num_active: float, *, jobs_per_replica: int, lowest: int, highest: int) -> int:
    """Return how many replicas a queue deserves.

    Args:
        num_active: jobs queued and running.
        jobs_per_replica: that one replica may have before it.
        lowest: replicas that always stay.
        highest: replicas that may be.
    """
    return max(lowest, min(highest, math.ceil(num_active / jobs_per_replica)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Burst:
    """A queue for which there are too few replicas, and what they wait for.

    A replica that is started takes seconds of a core before it is of use. So none is started while
    those that are there may get through the queue sooner. If they do, the others are started after
    it, when nothing is slowed down by that: where many came once, many may come again. A queue that
    was gone within ``_NOTABLE_S`` is not taken for a sign of more.

    ``began_s``: when they became too few. ``most``: replicas that it deserved at its longest.
    ``longest``: jobs that there were then.
    """

    began_s: float
    most: int
    longest: float

    def is_worth_more(self, num_active: float, now_s: float) -> bool:
        """Say whether replicas that start now come before the others are through the queue."""
        seconds, num_done = now_s - self.began_s, self.longest - num_active
        is_soon_gone = num_active * seconds <= _HOLD_S * num_done
        return seconds >= (2 * _HOLD_S if is_soon_gone else _HOLD_S)


def replicas_now(
    burst: Burst | None, *, num_active: float, wanted: int, present: int, now_s: float
) -> tuple[int, Burst | None]:
    """Return how many replicas there should be now, and what to remember.

    Args:
        burst: what was remembered.
        num_active: jobs queued and running.
        wanted: see `replicas_for`.
        present: replicas that there should be so far.
        now_s: seconds of a clock.
    """
    if wanted > present:
        burst = burst or Burst(began_s=now_s, most=0, longest=0)
        burst = replace(burst, most=max(burst.most, wanted), longest=max(burst.longest, num_active))
        return (burst.most, None) if burst.is_worth_more(num_active, now_s) else (present, burst)
    if burst is not None and now_s - burst.began_s >= _NOTABLE_S:
        return max(burst.most, wanted), None
    return wanted, None


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

    # Any: Serve's context, whose metrics are untyped mappings, and what it keeps between calls.
    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Return the wanted number of replicas, and what to be told the next time."""
        reported: Mapping[object, Iterable[Any]] = (context.raw_metrics or {}).get(QUEUE_METRIC, {})
        num_active = newest(reported.values())
        wanted = replicas_for(
            num_active,
            jobs_per_replica=self._jobs_per_replica,
            lowest=context.capacity_adjusted_min_replicas,
            highest=context.capacity_adjusted_max_replicas,
        )
        replicas, burst = replicas_now(
            context.policy_state.get(_STATE),
            num_active=num_active,
            wanted=wanted,
            present=context.target_num_replicas,
            now_s=context.current_time,
        )
        return replicas, {_STATE: burst}
