"""Asks the strategies' deployment for all callers of one ingress replica together.

A caller who is alone is asked for at once. While Serve's proxy has more callers on their way here
(`serve.proxy`), or while calls are under way, those who come are gathered and go together, so a
burst costs one or two calls. A plan is a pure function of run and request, so a call that a dying
replica lost is made again.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ray.exceptions import RayError

from serve.asks import Answer, Ask
from serve.errors import ApiError
from serve.handles import Handle
from serve.proxy import Arrival

_ATTEMPTS: Final = 5
_RETRY_S: Final = 0.2
_MAX_CALLS: Final = 2  # under way at once: one computes while the next travels,
_WORTH_A_CALL: Final = 32  # if so many callers wait for it
_MAX_REQUESTS: Final = 2048  # of one call
_FULL: Final = 64  # callers that wait for no others
_LONGEST_GAP_S: Final = 0.05  # between two of a burst; they are milliseconds apart
_LONGEST_WAIT_S: Final = 0.5


class Arrivals:
    """How many callers the proxies have sent on their way here that have not arrived yet."""

    def __init__(self) -> None:
        self._come: dict[str, int] = {}
        self._arrived: Counter[str] = Counter()

    def note(self, arrival: Arrival) -> None:
        """Note that a caller has arrived."""
        name = arrival.proxy
        self._come[name] = max(self._come.get(name, 0), arrival.num_come)
        self._arrived[name] = min(self._arrived[name] + 1, self._come[name])

    @property
    def num_coming(self) -> int:
        """Callers on their way."""
        return sum(come - self._arrived[name] for name, come in self._come.items())

    def settle(self) -> None:
        """Give up those who have not arrived: they went away, or to another replica."""
        self._arrived = Counter(self._come)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Waiting:
    ask: Ask
    answers: asyncio.Future[list[Answer]]
    since_s: float


class Planning:
    """The callers' side of the strategies' deployment.

    Args:
        handle: of the deployment.
        max_waiting: asks that may wait; more are refused.
        arrivals: told of every caller as it arrives.
    """

    def __init__(
        self, handle: Handle, *, max_waiting: int, arrivals: Arrivals | None = None
    ) -> None:
        self._handle = handle
        self._max_waiting = max_waiting
        self._arrivals = arrivals or Arrivals()
        self._waiting: list[_Waiting] = []
        self._newest_s = 0.0
        self._calls: set[asyncio.Task[None]] = set()
        self._alarm: asyncio.TimerHandle | None = None

    async def ask(self, ask: Ask) -> list[Answer]:
        """Return one answer per request, in order.

        Raises:
            ApiError: too many wait already, or the deployment can't be reached.
        """
        if len(self._waiting) >= self._max_waiting:
            raise ApiError(503, "overloaded", "too many requests wait", retry_after_s=1)
        loop = asyncio.get_running_loop()
        self._newest_s = loop.time()
        one = _Waiting(ask=ask, answers=loop.create_future(), since_s=self._newest_s)
        self._waiting.append(one)
        self._start_calls()
        return await one.answers

    def _start_calls(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        while self._waiting and self._may_call():
            loop = asyncio.get_running_loop()
            wait_s = self._wait_s(loop.time())
            if wait_s > 0:
                self._alarm = loop.call_later(wait_s, self._start_calls)
                return
            task = asyncio.create_task(self._call(self._take()))
            self._calls.add(task)
            task.add_done_callback(self._on_done)

    def _may_call(self) -> bool:
        is_worth_it = not self._calls or len(self._waiting) >= _WORTH_A_CALL
        return is_worth_it and len(self._calls) < _MAX_CALLS

    def _wait_s(self, now_s: float) -> float:
        """Return how long to wait for others; the next who comes decides anew."""
        if len(self._waiting) >= _FULL:
            return 0.0
        quiet_s = now_s - self._newest_s
        if quiet_s >= _LONGEST_GAP_S:
            self._arrivals.settle()
        if not self._arrivals.num_coming:
            return 0.0
        waited_s = now_s - self._waiting[0].since_s
        return min(_LONGEST_GAP_S - quiet_s, _LONGEST_WAIT_S - waited_s)

    def _take(self) -> list[_Waiting]:
        count = size = 0
        for one in self._waiting:
            size += len(one.ask.requests)
            if count and size > _MAX_REQUESTS:
                break
            count += 1
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        return batch

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._calls.discard(task)
        self._start_calls()

    async def _call(self, batch: Sequence[_Waiting]) -> None:
        try:
            found = await self._answers([one.ask for one in batch])
        except Exception as error:  # whatever it is, every caller of the batch must hear of it
            for one in batch:
                if not one.answers.done():
                    one.answers.set_exception(error)
            return
        for one, answers in zip(batch, found, strict=True):
            if not one.answers.done():  # else its caller has gone away
                one.answers.set_result(answers)

    async def _answers(self, asks: list[Ask]) -> list[list[Answer]]:
        for attempt in range(_ATTEMPTS):
            try:
                found: list[list[Answer]] = await self._handle.answer.remote(asks)
                return found
            except RayError:
                if attempt == _ATTEMPTS - 1:
                    raise
                await asyncio.sleep(_RETRY_S)
        raise AssertionError("the last attempt returns or raises")
