"""A discrete-event simulation of learning on many replicas, from times that were measured.

It moves as the real parts do: `unicuco.search.drive` (rounds overlap by one, whole groups of
outcomes are committed at once, a refill comes before the commit), `cluster.pool.RayPool` (one ask
at work per replica and one more in the queue; a replica that dies is started again and its ask goes
first) and the learner (one thing at a time). What it does not know: what is learned.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_LAG = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Measured seconds.

    ``evaluation_s`` of one evaluation, ``hand_over_s`` between two on one replica,
    ``restart_s`` from a replica's death to its next evaluation; ``commit_s`` of a transaction and
    ``row_s`` of each evaluation in it; ``fits`` are (evaluations told, seconds of an ask), rising.
    """

    evaluation_s: float
    hand_over_s: float
    restart_s: float
    commit_s: float
    row_s: float
    fits: tuple[tuple[int, float], ...]

    def ask_s(self, num_told: int) -> float:
        """Return the seconds of an ask that sees so many evaluations, interpolated."""
        if num_told == 0:
            return 0.0
        below = [fit for fit in self.fits if fit[0] <= num_told]
        above = [fit for fit in self.fits if fit[0] > num_told]
        if not below or not above:
            return (below or above)[-1 if below else 0][1]
        (n0, s0), (n1, s1) = below[-1], above[0]
        return s0 + (s1 - s0) * (num_told - n0) / (n1 - n0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """What goes wrong: shares of evaluations that take longer, or whose replica dies half-way."""

    straggling: float = 0.0
    factor: float = 5.0
    deadly: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How a simulated run went: its seconds, and the shares of them that parts were busy."""

    seconds: float
    replicas_busy: float
    learner_busy: float
    driver_busy: float


def simulate(
    *,
    replicas: int,
    evaluations: int,
    round_size: int,
    times: Times,
    trouble: Trouble | None = None,
    seed: int = 0,
) -> Result:
    """Return how learning goes.

    Args:
        replicas: how many evaluate.
        evaluations: in all.
        round_size: asked at a time.
        times: as measured.
        trouble: what goes wrong.
        seed: draws who it goes wrong with.
    """
    return _Simulation(replicas, evaluations, round_size, times, trouble or Trouble(), seed).run()


class _Simulation:
    def __init__(
        self, replicas: int, total: int, round_size: int, times: Times, trouble: Trouble, seed: int
    ) -> None:
        self._times, self._trouble = times, trouble
        self._random = random.Random(seed)
        self._replicas = replicas
        starts = range(0, total, round_size)
        self._sizes = [min(round_size, total - start) for start in starts]
        self._missing = list(self._sizes)  # of each round, not yet committed
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._free = replicas
        self._queue: deque[int] = deque()  # in the pool: the rounds that asks are of
        self._waiting: deque[int] = deque()  # in the driver
        self._pending = 0
        self._told = self._asked = 0
        self._inbox: list[int] = []  # outcomes that the driver has not looked at
        self._accepted: deque[int] = deque()
        self._driver_works = self._learner_works = False
        self._busy = {"replica": 0.0, "learner": 0.0, "driver": 0.0}

    def run(self) -> Result:
        self._ask()
        while self._events:
            self._now, _, happen = heapq.heappop(self._events)
            happen()
        assert not any(self._missing), "the simulation stopped before the run did"
        shares = {name: busy / self._now for name, busy in self._busy.items()}
        return Result(
            seconds=self._now,
            replicas_busy=shares["replica"] / self._replicas,
            learner_busy=shares["learner"],
            driver_busy=shares["driver"],
        )

    def _after(self, seconds: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self._now + seconds, next(self._order), happen))

    # --- the learner ----------------------------------------------------------------------------

    def _ask(self) -> None:
        round_ = self._asked
        if self._learner_works or round_ == len(self._sizes) or round_ > self._told + _LAG - 1:
            return
        self._learner_works = True
        seconds = self._times.ask_s(sum(self._sizes[: max(0, round_ - 1)]))
        self._busy["learner"] += seconds

        def asked() -> None:
            self._learner_works = False
            self._asked += 1
            self._accepted.append(round_)
            self._drive()

        self._after(seconds, asked)

    # --- the driver -----------------------------------------------------------------------------

    def _drive(self) -> None:
        self._refill()
        if self._driver_works or not (self._inbox or self._accepted):
            return
        self._driver_works = True
        outcomes, self._inbox = self._inbox, []
        rounds = [self._accepted.popleft() for _ in range(len(self._accepted))]
        rows = len(outcomes) + sum(self._sizes[round_] for round_ in rounds)
        commits = bool(outcomes) + len(rounds)
        seconds = commits * self._times.commit_s + rows * self._times.row_s
        self._busy["driver"] += seconds

        def committed() -> None:
            self._driver_works = False
            for round_ in outcomes:
                self._missing[round_] -= 1
            while self._told < self._asked and not self._missing[self._told]:
                self._told += 1
            for round_ in rounds:
                self._waiting.extend([round_] * self._sizes[round_])
            self._ask()
            self._drive()

        self._after(seconds, committed)

    def _refill(self) -> None:
        while self._waiting and self._pending < 2 * self._replicas:
            self._pending += 1
            self._queue.append(self._waiting.popleft())
        self._dispatch()

    # --- the pool -------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        while self._queue and self._free:
            self._free -= 1
            self._evaluate(self._queue.popleft())

    def _evaluate(self, round_: int) -> None:
        is_slow = self._random.random() < self._trouble.straggling
        is_deadly = self._random.random() < self._trouble.deadly
        seconds = self._times.evaluation_s * (self._trouble.factor if is_slow else 1.0)

        def finished() -> None:
            self._pending -= 1
            self._inbox.append(round_)
            self._busy["replica"] += seconds
            self._after(self._times.hand_over_s, self._freed)
            self._drive()

        def died() -> None:
            self._queue.appendleft(round_)
            self._after(self._times.restart_s, self._freed)
            self._dispatch()

        if is_deadly:
            self._after(seconds / 2, died)
        else:
            self._after(seconds, finished)

    def _freed(self) -> None:
        self._free += 1
        self._dispatch()


def stops_at(seconds: Sequence[tuple[int, float]], gain: float = 1.25) -> int:
    """Return the replicas beyond which doubling them no longer gains ``gain``; pairs rise."""
    for (replicas, slower), (_, faster) in itertools.pairwise(seconds):
        if slower / faster < gain:
            return replicas
    return seconds[-1][0]
