"""`RayPool`: asks to replicas, outcomes back in finish order, whatever happens to the replicas.

Asks wait in one queue for whichever replica has room: one for an actor, several for a pipeline of
shards. A replica of which anything dies is started again as a whole, and its asks go first to the
next that is free; until they are judged they run alone, for one of them may have been the reason.
A strategy that takes three replicas down with it becomes a failed evaluation. What this module does
not know: how actors are placed on a cluster.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final

from ray.exceptions import RayError, RayTaskError

from cluster.metrics import Meter, NoMeter
from cluster.replicas import Ref, Replica
from unicuco.errors import ClusterError, UnicucoError
from unicuco.types import Ask, FailedEvaluation, Outcome

_MAX_DEATHS: Final = 3
_QUEUED_PER_REPLICA: Final = 1
_TOO_LARGE_AFTER_S: Final = 20.0


@dataclass(slots=True, eq=False)
class _Member:
    replica: Replica
    is_ready: bool = False
    asks: list[Ask] = field(default_factory=list)


# None: the pool was closed. The ask is none for a start, whose future is of nothing. Any: of an
# evaluation the outcome.
_Event = tuple[_Member, Ask | None, "Future[Any]"] | None


class RayPool:
    """A `unicuco.search.drive.Pool` of replicas.

    Args:
        start_replica: starts one and returns it at once.
        num_replicas: how many to hold.
        start_timeout_s: how long to wait while no replica at all is ready.
        too_large: says in a line why no node can ever hold a replica; none: one may.
        meter: told of every ask and outcome.
    """

    def __init__(
        self,
        start_replica: Callable[[], Replica],
        num_replicas: int,
        *,
        start_timeout_s: float = 600.0,
        too_large: Callable[[], str | None] = lambda: None,
        meter: Meter | None = None,
    ) -> None:
        self._start_replica = start_replica
        self._start_timeout_s = start_timeout_s
        self._too_large = too_large
        self._meter = meter or NoMeter()
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._lock = threading.Lock()  # over all below: asks come from another thread than outcomes
        self._is_closed = False
        self._waiting: deque[Ask] = deque()
        self._deaths: Counter[str] = Counter()
        self._failed_starts = 0
        self._members = [self._started() for _ in range(num_replicas)]
        room = sum(member.replica.capacity for member in self._members)
        self.max_pending = room + num_replicas * _QUEUED_PER_REPLICA

    @property
    def replicas(self) -> list[Replica]:
        """Those that are held now."""
        return [member.replica for member in self._members]

    def submit(self, ask: Ask) -> None:
        """Give an ask to a free replica, or queue it."""
        with self._lock:
            self._meter.submitted()
            self._waiting.append(ask)
            self._dispatch()

    def next_outcome(self) -> tuple[Ask, Outcome]:
        """Wait for the next ask to finish, whichever it is.

        Raises:
            ClusterError: no replica can be started, or the pool was closed.
            UnicucoError: what a replica raised while it built its evaluator.
        """
        started = time.monotonic()
        while True:
            member, ask, future = self._next_event(started)
            error = future.exception()
            with self._lock:
                result = None
                if ask is None:
                    self._settle_start(member, error)
                elif error is None:
                    member.asks.remove(ask)
                    self._deaths.pop(ask.strategy.key, None)
                    result = ask, future.result()
                else:
                    result = self._settle_failure(member, ask, error)
                self._dispatch()
                if result is not None:
                    self._meter.finished(result[1])
                    return result

    def close(self) -> None:
        """End every replica; a `next_outcome` that waits is told."""
        with self._lock:
            self._is_closed = True
            for member in self._members:
                member.replica.kill()
        self._events.put(None)

    def _next_event(self, started: float) -> tuple[_Member, Ask | None, Future[Any]]:
        while True:
            try:
                event = self._events.get(timeout=self._patience(started))
            except queue.Empty:
                self._explain(started)
                continue
            if event is None:
                self._events.put(None)
                raise ClusterError("the pool of replicas was closed: begin again with --resume")
            if event[0] in self._members:  # else it was given up before
                return event

    def _patience(self, started: float) -> float | None:
        """Return how long to wait for an event before asking why there is none; none: for ever."""
        if any(member.is_ready for member in self._members):
            return None
        waited = time.monotonic() - started
        first = min(_TOO_LARGE_AFTER_S, self._start_timeout_s)
        return max(0.0, (first if waited < first else self._start_timeout_s) - waited)

    def _explain(self, started: float) -> None:
        """Give up where no replica can start.

        Raises:
            ClusterError: there is no room, and none will come.
        """
        reason = self._too_large()
        if reason is not None:
            raise ClusterError(reason)
        if time.monotonic() - started >= self._start_timeout_s:
            raise ClusterError(
                f"no replica could be started in {self._start_timeout_s:.0f} s: the cluster has"
                " no free CPU for one; free some, add nodes, or ask for fewer --replicas"
            )

    def _started(self) -> _Member:
        member = _Member(self._start_replica())
        self._watch(member, None, member.replica.start())
        return member

    def _watch(self, member: _Member, ask: Ask | None, ref: Ref) -> None:
        # The callback runs in a thread of Ray's, where nothing of Ray may be called: only note it.
        ref.future().add_done_callback(lambda future: self._events.put((member, ask, future)))

    def _dispatch(self) -> None:
        while self._waiting and not self._is_closed:
            ask = self._waiting[0]
            free = [member for member in self._members if self._has_room(member, ask)]
            if not free:
                return
            member = min(free, key=lambda member: len(member.asks))
            self._waiting.popleft()
            member.asks.append(ask)
            self._watch(member, ask, member.replica.evaluate(ask))

    def _has_room(self, member: _Member, ask: Ask) -> bool:
        """Say whether a replica can take an ask; what saw one die gets a replica to itself."""
        is_free = member.is_ready and len(member.asks) < member.replica.capacity
        suspects = any(self._deaths[own.strategy.key] for own in (ask, *member.asks))
        return is_free and not (suspects and member.asks)

    def _settle_start(self, member: _Member, error: BaseException | None) -> None:
        if error is None:
            member.is_ready = True
            self._failed_starts = 0
            return
        cause = error.cause if isinstance(error, RayTaskError) else error
        self._failed_starts += 1
        if isinstance(cause, UnicucoError):
            raise cause
        if not _is_death(error) or self._failed_starts >= _MAX_DEATHS:
            reason = " ".join(str(cause).split())[:300]
            raise ClusterError(
                f"a replica can't start: {type(cause).__name__}: {reason}"
            ) from error
        self._replace(member)

    def _settle_failure(
        self, member: _Member, ask: Ask, error: BaseException
    ) -> tuple[Ask, Outcome] | None:
        key = ask.strategy.key
        if isinstance(error, RayTaskError) and not _is_death(error):
            member.asks.remove(ask)  # it lives: e.g. an outcome that could not be sent
            return ask, FailedEvaluation.from_error(key, error.cause)
        self._replace(member)
        for own in member.asks:
            self._deaths[own.strategy.key] += 1
        self._waiting.extendleft(
            own for own in reversed(member.asks) if own is not ask or not self._is_deadly(ask)
        )
        if not self._is_deadly(ask):
            return None
        message = f"{_MAX_DEATHS} replicas died while evaluating it"
        return ask, FailedEvaluation(strategy_key=key, kind="ReplicaDied", message=message)

    def _is_deadly(self, ask: Ask) -> bool:
        return self._deaths[ask.strategy.key] >= _MAX_DEATHS

    def _replace(self, member: _Member) -> None:
        member.replica.kill()  # where it is merely out of reach, or a part of it lives
        if not self._is_closed:
            self._members[self._members.index(member)] = self._started()


def _is_death(error: BaseException) -> bool:
    """Say whether a process died, be it one that another's input came from."""
    return not isinstance(error, RayTaskError) or isinstance(error.cause, RayError)
