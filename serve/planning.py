"""Asks the strategies' deployment for all callers of one ingress replica together.

While a call is under way, those who come meanwhile are gathered and go with the next one: an idle
service adds no delay, and a burst costs a few calls instead of one each. A plan is a pure function
of run and request, so a call that a dying replica lost is made again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from ray.exceptions import RayError

from serve.asks import Answer, Ask
from serve.errors import ApiError
from serve.handles import Handle

_ATTEMPTS: Final = 5
_RETRY_S: Final = 0.2
_MAX_CALLS: Final = 2  # under way at once: one computes while the next travels
_MAX_REQUESTS: Final = 2048  # of one call


class Planning:
    """The callers' side of the strategies' deployment.

    Args:
        handle: of the deployment.
        max_waiting: asks that may wait; more are refused.
    """

    def __init__(self, handle: Handle, *, max_waiting: int) -> None:
        self._handle = handle
        self._max_waiting = max_waiting
        self._waiting: list[tuple[Ask, asyncio.Future[list[Answer]]]] = []
        self._calls: set[asyncio.Task[None]] = set()

    async def ask(self, ask: Ask) -> list[Answer]:
        """Return one answer per request, in order.

        Raises:
            ApiError: too many wait already, or the deployment can't be reached.
        """
        if len(self._waiting) >= self._max_waiting:
            raise ApiError(503, "overloaded", "too many requests wait", retry_after_s=1)
        answers: asyncio.Future[list[Answer]] = asyncio.get_running_loop().create_future()
        self._waiting.append((ask, answers))
        self._start_calls()
        return await answers

    def _start_calls(self) -> None:
        while self._waiting and len(self._calls) < _MAX_CALLS:
            batch = self._take()
            task = asyncio.create_task(self._call(batch))
            self._calls.add(task)
            task.add_done_callback(self._on_done)

    def _take(self) -> list[tuple[Ask, asyncio.Future[list[Answer]]]]:
        count = size = 0
        for ask, _ in self._waiting:
            size += len(ask.requests)
            if count and size > _MAX_REQUESTS:
                break
            count += 1
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        return batch

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._calls.discard(task)
        self._start_calls()

    async def _call(self, batch: Sequence[tuple[Ask, asyncio.Future[list[Answer]]]]) -> None:
        try:
            found = await self._answers([ask for ask, _ in batch])
        except Exception as error:  # whatever it is, every caller of the batch must hear of it
            for _, answers in batch:
                if not answers.done():
                    answers.set_exception(error)
            return
        for (_, answers), one in zip(batch, found, strict=True):
            if not answers.done():  # else its caller has gone away
                answers.set_result(one)

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
