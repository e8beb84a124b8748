"""`RayPool`: asks to replicas, outcomes back in finish order, whatever happens to the replicas.

Asks wait in one queue for whichever replica has room: one for an actor, several for a pipeline of
shards. While as many wait as there may be replicas, an actor is sent its next ask ahead, so that it
does not idle for Ray's round trip. A replica of which anything dies is started again as a whole,
and its asks go first to the next that is free; until they are judged they run alone, for one of
them may have been the reason. So is one that hangs; what is merely late is given to a second
replica, and the first answer counts. A strategy that takes three replicas down with it becomes a
failed evaluation.

The number of replicas is a demand: those that there is room for work, the others join when nodes
come, and where nodes can go too, those without work for as long as a start takes are given back.

One thread of the pool's own does all this; callers leave asks and find outcomes in queues. What
this module does not know: how actors are placed on a cluster.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final

from ray.exceptions import RayError, RayTaskError

from cluster.lateness import Lateness
from cluster.metrics import Meter, NoMeter
from cluster.replicas import Ref, Replica
from unicuco.errors import ClusterError, UnicucoError
from unicuco.types import Ask, FailedEvaluation, Outcome

_MAX_DEATHS: Final = 3
_QUEUED_PER_REPLICA: Final = 1  # fewer, and nothing would be sent ahead
_TOO_LARGE_AFTER_S: Final = 20.0
_LOOK_EVERY_S: Final = 0.5
_CLOSE_S: Final = 30.0


@dataclass(slots=True, eq=False)
class _Member:
    """A replica; ``asks`` are what it has, and since when."""

    replica: Replica
    since: float  # when it was started, or last had something to do
    start_s: float | None = None  # none: it is not ready
    asks: dict[Ask, float] = field(default_factory=dict)

    @property
    def is_ready(self) -> bool:
        return self.start_s is not None


@dataclass(frozen=True, slots=True)
class _Ended:
    """A call of a replica's: a start where the ask is none. Any: of an evaluation the outcome."""

    member: _Member
    ask: Ask | None
    future: Future[Any]


_Event = Ask | _Ended | None  # something submitted; something done; the pool is closed


class RayPool:
    """A `unicuco.search.drive.Pool` of replicas.

    Args:
        start_replica: starts one and returns it at once.
        num_replicas: how many to hold at most.
        gives_back: whether to end replicas that have long had nothing to do, all but one.
        least_idle_s: how long at least; longer where a start takes longer.
        start_timeout_s: how long to wait while no replica at all is ready.
        too_large: says in a line why no node can ever hold a replica; none: one may.
        meter: told of every ask and outcome.
    """

    def __init__(
        self,
        start_replica: Callable[[], Replica],
        num_replicas: int,
        *,
        gives_back: bool = False,
        least_idle_s: float = 10.0,
        start_timeout_s: float = 600.0,
        too_large: Callable[[], str | None] = lambda: None,
        meter: Meter | None = None,
    ) -> None:
        self._start_replica = start_replica
        self._num_replicas = num_replicas
        self._gives_back = gives_back
        self._least_idle_s = least_idle_s
        self._start_timeout_s = start_timeout_s
        self._too_large = too_large
        self._meter = meter or NoMeter()
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[tuple[Ask, Outcome] | Exception] = queue.SimpleQueue()
        self._is_closed = False
        self._lateness = Lateness()
        self._waiting: deque[Ask] = deque()
        self._late: list[Ask] = []  # wait for a second replica
        self._open: set[Ask] = set()  # submitted and not answered
        self._deaths: Counter[Ask] = Counter()
        self._failed_starts = 0
        self._has_served = False  # so a node can hold one, and what left may come back
        self._members: list[_Member] = []
        self._served_at = time.monotonic()
        self._wanted_at = math.inf  # nothing is given back before there was anything to do
        for _ in range(num_replicas):
            self._add()
        room = sum(member.replica.capacity + member.replica.ahead for member in self._members)
        self.max_pending = room + num_replicas * _QUEUED_PER_REPLICA
        self._thread = threading.Thread(target=self._run, name="unicuco-replicas", daemon=True)
        self._thread.start()

    @property
    def replicas(self) -> list[Replica]:
        """Those that are held now."""
        return [member.replica for member in self._members]

    def submit(self, ask: Ask) -> None:
        """Give an ask to a free replica, or queue it; returns at once."""
        self._meter.submitted()
        self._events.put(ask)

    def next_outcome(self) -> tuple[Ask, Outcome]:
        """Wait for the next ask to finish, whichever it is.

        Raises:
            ClusterError: no replica can be started, or the pool was closed.
            UnicucoError: what a replica raised while it built its evaluator.
        """
        result = self._outcomes.get()
        if isinstance(result, Exception):
            self._outcomes.put(result)  # for whoever asks again
            raise result
        self._meter.finished(result[1])
        return result

    def close(self) -> None:
        """End every replica; a `next_outcome` that waits is told."""
        self._is_closed = True
        self._events.put(None)
        self._thread.join(_CLOSE_S)  # a cluster that is gone may hold it up

    # --- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            look_at = time.monotonic() + _LOOK_EVERY_S
            while not self._is_closed:
                self._take_event(max(0.0, look_at - time.monotonic()))
                for _ in range(self._events.qsize()):  # of many replicas many at once
                    self._take_event(0.0)
                if time.monotonic() >= look_at:
                    self._look(time.monotonic())
                    look_at = time.monotonic() + _LOOK_EVERY_S
                self._dispatch()
            reason: Exception = ClusterError(
                "the pool of replicas was closed: begin again with --resume"
            )
        except Exception as error:  # raised again by next_outcome
            reason = error
        self._outcomes.put(reason)
        for member in self._members:
            member.replica.kill()

    def _take_event(self, timeout_s: float) -> None:
        try:
            event = self._events.get(timeout=timeout_s)
        except queue.Empty:
            return
        if isinstance(event, Ask):
            self._wanted_at = time.monotonic()
            self._open.add(event)
            self._waiting.append(event)
        elif event is not None and event.member in self._members:  # else it was given up before
            error = event.future.exception()
            if event.ask is None:
                self._settle_start(event.member, error)
            elif error is None:
                self._settle(event.member, event.ask, event.future.result())
            else:
                self._settle_failure(event.member, event.ask, error)

    def _look(self, now: float) -> None:
        """Do what has to be done because nothing happens."""
        if any(member.is_ready for member in self._members) or not self._open:
            self._served_at = now
        else:
            self._explain(now - self._served_at)
        self._give_up_hung(now)
        self._late = self._find_late(now)
        if self._waiting:
            self._wanted_at = now
        elif self._gives_back:
            self._give_back(now)

    def _explain(self, waited_s: float) -> None:
        """Give up where no replica can start.

        Raises:
            ClusterError: there is no room, and none will come.
        """
        if not self._has_served and waited_s >= min(_TOO_LARGE_AFTER_S, self._start_timeout_s):
            reason = self._too_large()
            if reason is not None:
                raise ClusterError(reason)
        if waited_s >= self._start_timeout_s:
            raise ClusterError(
                f"no replica could be started in {self._start_timeout_s:.0f} s: the cluster has"
                " no free CPU for one; free some, add nodes, or ask for fewer --replicas"
            )

    # --- work -----------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        self._late = [ask for ask in self._late if ask in self._open and not self._gave(ask)]
        while self._waiting and self._gave(
            self._waiting[0], ahead=len(self._waiting) >= self._num_replicas
        ):
            self._waiting.popleft()
        if not self._waiting or len(self._members) == self._num_replicas:
            return
        coming = sum(m.replica.capacity for m in self._members if not m.is_ready)
        while len(self._waiting) > coming and len(self._members) < self._num_replicas:
            coming += self._add().replica.capacity

    def _gave(self, ask: Ask, *, ahead: bool = False) -> bool:
        """Give an ask to the emptiest replica, perhaps ahead; say whether any had room."""
        member: _Member | None = None
        for one in self._members:
            has_room = self._has_room(one, ask, ahead=ahead)
            if has_room and (member is None or len(one.asks) < len(member.asks)):
                member = one
                if not one.asks:
                    break
        if member is not None:
            member.asks[ask] = time.monotonic()
            self._watch(member, ask, member.replica.evaluate(ask))
        return member is not None

    def _has_room(self, member: _Member, ask: Ask, *, ahead: bool) -> bool:
        """Say whether a replica can take an ask; what saw one die gets a replica to itself."""
        # Asked of every replica for every ask: what most of them answer comes first.
        room = member.replica.capacity + ahead * member.replica.ahead
        if not member.is_ready or len(member.asks) >= room:
            return False
        if not member.asks:
            return True
        suspects = any(self._deaths[own] for own in (ask, *member.asks))
        return ask not in member.asks and not suspects

    def _settle(self, member: _Member, ask: Ask, outcome: Outcome) -> None:
        now = time.monotonic()
        self._lateness.finished(ask, now - member.asks.pop(ask))
        member.since = now
        if member.replica.ahead:  # what was sent ahead begins now
            member.asks = dict.fromkeys(member.asks, now)
        self._answer(ask, outcome)

    def _settle_failure(self, member: _Member, ask: Ask, error: BaseException) -> None:
        if isinstance(error, RayTaskError) and not _is_death(error):
            # It lives: e.g. an outcome that could not be sent.
            self._settle(member, ask, FailedEvaluation.from_error(ask.strategy.key, error.cause))
        else:
            self._replace(member)

    def _answer(self, ask: Ask, outcome: Outcome) -> None:
        """Hand over what is known of an ask, unless another replica was faster."""
        if ask in self._open:
            self._open.remove(ask)
            self._deaths.pop(ask, None)
            self._outcomes.put((ask, outcome))

    # --- replicas -------------------------------------------------------------------------------

    def _add(self) -> _Member:
        member = _Member(self._start_replica(), time.monotonic())
        self._members.append(member)
        self._watch(member, None, member.replica.start())
        return member

    def _watch(self, member: _Member, ask: Ask | None, ref: Ref) -> None:
        # The callback runs in a thread of Ray's, where nothing of Ray may be called: only note it.
        ref.future().add_done_callback(lambda future: self._events.put(_Ended(member, ask, future)))

    def _settle_start(self, member: _Member, error: BaseException | None) -> None:
        if error is None:
            now = time.monotonic()
            member.start_s, member.since = now - member.since, now
            self._has_served = True
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

    def _replace(self, member: _Member) -> None:
        """Start a replica in place of one that died or hangs, and see to its asks."""
        member.replica.kill()  # where it is merely out of reach, or a part of it lives
        self._members.remove(member)
        self._add()
        again = [ask for ask in member.asks if ask in self._open]
        for ask in again:
            self._deaths[ask] += 1
        deadly = [ask for ask in again if self._deaths[ask] >= _MAX_DEATHS]
        for ask in deadly:
            message = f"{_MAX_DEATHS} replicas died or hung while evaluating it"
            key = ask.strategy.key
            self._answer(
                ask, FailedEvaluation(strategy_key=key, kind="ReplicaDied", message=message)
            )
        elsewhere = {ask for other in self._members for ask in other.asks}
        self._waiting.extendleft(
            ask for ask in reversed(again) if ask not in elsewhere and ask not in deadly
        )

    def _give_up_hung(self, now: float) -> None:
        """Replace replicas that have had an ask for far too long, be it answered elsewhere."""
        hung = [
            member
            for member in self._members
            if any(self._lateness.is_hung(ask, now - since) for ask, since in member.asks.items())
        ]
        for member in hung:
            self._replace(member)
        if hung:
            self._lateness.gave_up()

    def _find_late(self, now: float) -> list[Ask]:
        """Return what is out at one replica for too long."""
        holders = Counter(ask for member in self._members for ask in member.asks)
        return [
            ask
            for member in self._members
            for ask, since in member.asks.items()
            if holders[ask] == 1 and ask in self._open and self._lateness.is_late(ask, now - since)
        ]

    def _give_back(self, now: float) -> None:
        """End replicas, all but one, that waited for work longer than a new one takes to start."""
        for member in sorted(reversed(self._members), key=lambda member: member.is_ready):
            idle_s = now - max(member.since, self._wanted_at)
            is_idle = not member.asks and idle_s > max(self._least_idle_s, member.start_s or 0.0)
            if is_idle and len(self._members) > 1:
                member.replica.kill()
                self._members.remove(member)


def _is_death(error: BaseException) -> bool:
    """Say whether a process died, be it one that another's input came from."""
    return not isinstance(error, RayTaskError) or isinstance(error.cause, RayError)
