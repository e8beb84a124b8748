"""`RayPool`: asks to replicas, outcomes back in finish order, whatever happens to the replicas.

A replica has one ask at a time, taken from one queue by whichever replica is free. A replica that
dies is started again and its ask goes first to the next free one; a strategy that takes three
replicas down with it becomes a failed evaluation. What this module does not know: how actors are
placed on a cluster.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final

import ray
from ray.exceptions import RayTaskError

from cluster.actors import Handle
from unicuco.errors import ClusterError, UnicucoError
from unicuco.types import Ask, FailedEvaluation, Outcome

_MAX_DEATHS: Final = 3
_QUEUED_PER_REPLICA: Final = 1


@dataclass(slots=True, eq=False)
class _Replica:
    handle: Handle
    is_ready: bool = False
    ask: Ask | None = None


# None: the pool was closed. Any: of a start it is None, of an evaluation the outcome.
_Event = tuple[_Replica, "Future[Any]"] | None


class RayPool:
    """A `unicuco.search.drive.Pool` of evaluator actors.

    Args:
        start_replica: starts one evaluator actor and returns its handle at once.
        num_replicas: how many to hold.
        start_timeout_s: how long to wait while no replica at all is ready.
    """

    def __init__(
        self,
        start_replica: Callable[[], Handle],
        num_replicas: int,
        *,
        start_timeout_s: float = 600.0,
    ) -> None:
        self.max_pending = num_replicas * (1 + _QUEUED_PER_REPLICA)
        self._start_replica = start_replica
        self._start_timeout_s = start_timeout_s
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._lock = threading.Lock()  # over all below: asks come from another thread than outcomes
        self._is_closed = False
        self._waiting: deque[Ask] = deque()
        self._deaths: Counter[str] = Counter()
        self._failed_starts = 0
        self._replicas = [self._started() for _ in range(num_replicas)]

    def submit(self, ask: Ask) -> None:
        """Give an ask to a free replica, or queue it."""
        with self._lock:
            self._waiting.append(ask)
            self._dispatch()

    def next_outcome(self) -> tuple[Ask, Outcome]:
        """Wait for the next ask to finish, whichever it is.

        Raises:
            ClusterError: no replica can be started, or the pool was closed.
            UnicucoError: what a replica raised while it built its evaluator.
        """
        deadline = time.monotonic() + self._start_timeout_s
        while True:
            replica, future = self._next_event(deadline)
            error = future.exception()
            with self._lock:
                ask, replica.ask = replica.ask, None
                if ask is None:
                    self._settle_start(replica, error)
                    result = None
                elif error is None:
                    result = ask, future.result()
                else:
                    result = self._settle_failure(replica, ask, error)
                self._dispatch()
            if result is not None:
                return result

    def close(self) -> None:
        """End every replica; a `next_outcome` that waits is told."""
        with self._lock:
            self._is_closed = True
            for replica in self._replicas:
                ray.kill(replica.handle)
        self._events.put(None)

    def _next_event(self, deadline: float) -> tuple[_Replica, Future[Any]]:
        while True:
            ready = any(replica.is_ready for replica in self._replicas)
            try:
                event = self._events.get(
                    timeout=None if ready else max(0.0, deadline - time.monotonic())
                )
            except queue.Empty:
                raise ClusterError(
                    f"no replica could be started in {self._start_timeout_s:.0f} s: the cluster has"
                    " no free CPU for one; free some, add nodes, or ask for fewer --replicas"
                ) from None
            if event is None:
                self._events.put(None)
                raise ClusterError("the pool of replicas was closed: begin again with --resume")
            if event[0] in self._replicas:  # else it was given up before
                return event

    def _started(self) -> _Replica:
        handle = self._start_replica()
        replica = _Replica(handle)
        self._watch(replica, handle.start.remote())
        return replica

    # Any: ObjectRef has no public type that both Ray's core and its client share.
    def _watch(self, replica: _Replica, ref: Any) -> None:
        # The callback runs in a thread of Ray's, where nothing of Ray may be called: only note it.
        ref.future().add_done_callback(lambda future: self._events.put((replica, future)))

    def _dispatch(self) -> None:
        if self._is_closed:
            return
        for replica in self._replicas:
            if not self._waiting:
                return
            if replica.is_ready and replica.ask is None:
                replica.ask = self._waiting.popleft()
                self._watch(replica, replica.handle.evaluate.remote(replica.ask))

    def _settle_start(self, replica: _Replica, error: BaseException | None) -> None:
        if error is None:
            replica.is_ready = True
            self._failed_starts = 0
            return
        cause = error.cause if isinstance(error, RayTaskError) else error
        self._failed_starts += 1
        if isinstance(cause, UnicucoError):
            raise cause
        if isinstance(error, RayTaskError) or self._failed_starts >= _MAX_DEATHS:
            reason = " ".join(str(cause).split())[:300]
            raise ClusterError(
                f"a replica can't start: {type(cause).__name__}: {reason}"
            ) from error
        self._replace(replica)

    def _settle_failure(
        self, replica: _Replica, ask: Ask, error: BaseException
    ) -> tuple[Ask, Outcome] | None:
        key = ask.strategy.key
        if isinstance(error, RayTaskError):  # it lives: e.g. an outcome that could not be sent
            return ask, FailedEvaluation.from_error(key, error.cause)
        self._replace(replica)
        self._deaths[key] += 1
        if self._deaths[key] < _MAX_DEATHS:
            self._waiting.appendleft(ask)
            return None
        message = f"{_MAX_DEATHS} replicas died while evaluating it"
        return ask, FailedEvaluation(strategy_key=key, kind="ReplicaDied", message=message)

    def _replace(self, replica: _Replica) -> None:
        ray.kill(replica.handle)  # where it is merely out of reach
        if not self._is_closed:
            self._replicas[self._replicas.index(replica)] = self._started()
