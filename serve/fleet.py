"""Engines and the requests that run on them: does what `serve.scheduler` decides, on one loop.

A request belongs to one variant from its first token to its last: an engine is only switched when
nothing runs on it. One whose engine dies before its first token is tried elsewhere, and after it is
ended with an error; it is never continued by another engine. An engine that died, or whose switch
failed, is started again, each time after a longer pause; one that was stopped because there was
nothing to do starts when it is needed. What this module does not know: Ray, HTTP,
vLLM, ids of models.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from serve.scheduler import Action, Scheduler, Start, Switch, Ticket
from unicuco.engines import Checked, Delta, StreamingEngine, StreamSampling
from unicuco.errors import ContainerError, EngineError, UnicucoError, VariantError

_log = logging.getLogger("ray.serve")

_LONGEST_PAUSE_S: Final = 60.0
_PING_EVERY_S: Final = 10.0


class AnswerError(Exception):
    """Why a request has no answer, or no more of it.

    ``kind``: "refused" = the variant can't be served; "lost" = its engine died, and trying again
    may help; "failed" = the engine lives and did not take this request.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A variant, by its contents: ``digest`` is what an engine must find in ``folder``.

    ``folder`` may be a container that holds it.
    ``family`` is what variants share that can be switched in place.
    """

    folder: Path
    digest: str
    family: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt to be continued: token ids, and how."""

    tokens: tuple[int, ...]
    sampling: StreamSampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The next piece of one sequence of a request."""

    index: int
    delta: Delta


_Item = Piece | AnswerError | None  # the last two end an answer


@dataclass(slots=True, kw_only=True)
class _Call:
    ticket: Ticket
    target: Target
    sequences: tuple[Prompt, ...]
    out: asyncio.Queue[_Item] = field(default_factory=asyncio.Queue)
    task: asyncio.Task[None] | None = None
    has_begun: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """What one engine does now: ``digest`` of what it serves, or none; ``pid`` of its process."""

    digest: str | None
    running: int
    pid: int | None


class Fleet:
    """Engines that share requests. Made and used inside a running event loop.

    Args:
        engines: nothing is loaded in them yet.
        slots: sequences at once on one engine.
        max_queued: sequences that may wait.
        patience_s: see `Scheduler`.
        min_engines: see `Scheduler`.
        idle_stop_s: see `Scheduler`.
        max_tries: engines that one request may lose before it is given up.
        first_pause_s: before a dead engine is started again; doubles with every failure.
    """

    def __init__(
        self,
        engines: Sequence[StreamingEngine],
        *,
        slots: int = 32,
        max_queued: int = 256,
        patience_s: float = 10.0,
        min_engines: int = 0,
        idle_stop_s: float = math.inf,
        max_tries: int = 3,
        first_pause_s: float = 1.0,
    ) -> None:
        self._engines = list(engines)
        self._scheduler = Scheduler(
            num_engines=len(engines),
            slots=slots,
            max_queued=max_queued,
            patience_s=patience_s,
            min_engines=min_engines,
            idle_stop_s=idle_stop_s,
        )
        self._min_engines = min(min_engines, len(engines))
        self._max_tries = max_tries
        self._first_pause_s = first_pause_s
        self._numbers = itertools.count()
        self._calls: dict[int, _Call] = {}
        self._targets: dict[str, Target] = {}
        self._failures = [0] * len(engines)
        self._last: list[Target | None] = [None] * len(engines)
        self._watchers: list[asyncio.Task[None] | None] = [None] * len(engines)
        self._tasks: set[asyncio.Task[None]] = set()
        self._alarm: asyncio.TimerHandle | None = None
        self._closed = False
        self.context: int | None = None
        self._spawn(self._ping())

    @property
    def status(self) -> list[EngineStatus]:
        """What every engine does now."""
        return [
            EngineStatus(
                digest=self._scheduler.variant_of(number),
                running=self._scheduler.load_of(number),
                pid=engine.pid,
            )
            for number, engine in enumerate(self._engines)
        ]

    @property
    def num_queued(self) -> int:
        """Sequences that wait."""
        return self._scheduler.num_queued

    def warm(self, target: Target) -> None:
        """Start the engines that always run on a variant, in the background."""
        for number in range(self._min_engines):
            self._warm(number, target)

    async def generate(
        self, target: Target, sequences: Sequence[Prompt]
    ) -> AsyncGenerator[list[Piece], None]:
        """Yield the pieces of all sequences, as they come; closing the generator aborts them.

        Pieces that are there together are yielded together, so that whoever takes them pays for
        each step of an engine, or for each time it comes round, and not for each token.

        Raises:
            QueueFullError: too many wait already.
            AnswerError: there is no answer, or no more of it.
        """
        number = next(self._numbers)
        ticket = Ticket(
            number=number,
            variant=target.digest,
            family=target.family,
            arrived_s=time.monotonic(),
            size=len(sequences),
        )
        self._scheduler.submit(ticket)
        self._targets[target.digest] = target
        call = _Call(ticket=ticket, target=target, sequences=tuple(sequences))
        self._calls[number] = call
        self._act()
        try:
            while True:
                pieces, last = _there_now(await call.out.get(), call.out)
                if pieces:
                    yield pieces
                if isinstance(last, AnswerError):
                    raise last
                if last is None:
                    return
        finally:
            del self._calls[number]
            self._scheduler.withdraw(number)
            if call.task is not None:
                call.task.cancel()
            self._act()

    async def close(self) -> None:
        """End every engine; what runs ends with an error."""
        self._closed = True
        for call in self._calls.values():
            call.out.put_nowait(AnswerError("lost", "the service is stopping"))
        if self._alarm is not None:
            self._alarm.cancel()
        for task in [*self._tasks]:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(engine.close() for engine in self._engines))

    def _act(self) -> None:
        """Do all that is to be done now, and set the alarm for what time alone will bring."""
        if self._closed:
            return
        now_s = time.monotonic()
        for action in self._scheduler.next(now_s):
            self._do(action)
        wake_s = self._scheduler.wake_at_s(now_s)
        if self._alarm is not None:
            self._alarm.cancel()
        loop = asyncio.get_running_loop()
        self._alarm = None if wake_s is None else loop.call_later(wake_s - now_s, self._act)

    def _do(self, action: Action) -> None:
        if isinstance(action, Start):
            call = self._calls[action.ticket.number]
            call.task = self._spawn(self._run(call, action.engine))
        elif isinstance(action, Switch):
            self._spawn(self._switch(action))
        else:
            self._spawn(self._stop(action.engine))

    async def _run(self, call: _Call, engine: int) -> None:
        """Run one request on one engine to its end."""
        try:
            async with asyncio.TaskGroup() as group:
                for index, sequence in enumerate(call.sequences):
                    group.create_task(self._continue(call, engine, index, sequence))
            call.out.put_nowait(None)
        except* EngineError as errors:
            reason = str(errors.exceptions[0])
            if await self._is_well(engine):
                call.out.put_nowait(AnswerError("failed", reason))
            else:
                self._retry_or_end(call, reason)
        finally:
            self._scheduler.finished(call.ticket.number, time.monotonic())
            self._act()

    async def _continue(self, call: _Call, engine: int, index: int, sequence: Prompt) -> None:
        answers = self._engines[engine].generate(sequence.tokens, sequence.sampling)
        async with contextlib.aclosing(answers):
            async for delta in answers:
                call.has_begun = True
                call.out.put_nowait(Piece(index=index, delta=delta))

    def _retry_or_end(self, call: _Call, reason: str) -> None:
        ticket = replace(call.ticket, tries=call.ticket.tries + 1)
        if call.has_begun:
            error = AnswerError("lost", f"the engine died in the middle of the answer: {reason}")
            call.out.put_nowait(error)
        elif ticket.tries >= self._max_tries:
            error = AnswerError("lost", f"{ticket.tries} engines died on this request: {reason}")
            call.out.put_nowait(error)
        elif ticket.number in self._calls:  # the caller still waits
            call.ticket, call.task = ticket, None
            self._scheduler.resubmit(ticket)

    async def _switch(self, action: Switch) -> None:
        """Bring an engine to a variant; whatever happens, the scheduler hears of it."""
        target, engine = self._targets[action.variant], self._engines[action.engine]
        before, serves = self._last[action.engine], None
        try:
            checked = await engine.serve(target.folder)
            serves = checked.digest
            self._note_success(action.engine, target, checked)
        except Exception as error:  # whatever it is, whoever waits must hear of it
            known = isinstance(error, UnicucoError | OSError)
            reason = error if known else EngineError(f"unexpected {type(error).__name__}")
            text = "engine %d could not serve %s: %s"
            _log.warning(text, action.engine, target.folder, reason, exc_info=not known)
            if engine.alive:
                serves = None if before is None else before.digest
            self._note_failure(action.engine, target, reason)
        finally:
            self._scheduler.switched(action.engine, serves, target.family, time.monotonic())
            self._act()

    async def _stop(self, engine: int) -> None:
        """End an engine that nobody needs; it is no death, so nothing starts it again by itself."""
        watcher, self._watchers[engine] = self._watchers[engine], None
        if watcher is not None:
            watcher.cancel()
        self._last[engine] = None
        await self._engines[engine].close()
        self._scheduler.stopped(engine)
        self._act()

    def _note_success(self, engine: int, target: Target, checked: Checked) -> None:
        self.context = checked.context
        self._failures[engine] = 0
        self._last[engine] = replace(target, digest=checked.digest)
        watcher = self._watchers[engine]
        if watcher is None or watcher.done():
            self._watchers[engine] = self._spawn(self._watch(engine))
        if checked.digest != target.digest:
            self._refuse(target, f"{target.folder.name} was replaced meanwhile")

    def _note_failure(self, engine: int, target: Target, error: Exception) -> None:
        """Decide whose fault a failed switch is: the folder's, or the engine's."""
        if self._engines[engine].alive or isinstance(
            error, VariantError | ContainerError | OSError
        ):
            self._refuse(target, str(error))
            return
        self._failures[engine] += 1
        for ticket in self._scheduler.withdraw_variant(target.digest):
            self._retry_or_end(self._calls[ticket.number], str(error))
        self._revive(engine)

    def _refuse(self, target: Target, reason: str) -> None:
        for ticket in self._scheduler.withdraw_variant(target.digest):
            self._calls[ticket.number].out.put_nowait(AnswerError("refused", reason))

    async def _watch(self, engine: int) -> None:
        """Wait for the end of an engine's process, and start it again."""
        await self._engines[engine].wait_dead()
        if self._scheduler.is_switching(engine):  # the switch itself will say what became of it
            return
        self._scheduler.lost(engine)
        await self._engines[engine].close()
        self._failures[engine] += 1
        _log.warning("engine %d died; it is started again", engine)
        self._revive(engine)
        self._act()

    def _revive(self, engine: int) -> None:
        pause_s = self._first_pause_s * 2 ** max(0, self._failures[engine] - 1)
        target = self._last[engine]
        if target is None or self._closed:
            return
        loop = asyncio.get_running_loop()
        loop.call_later(min(pause_s, _LONGEST_PAUSE_S), self._warm, engine, target)

    def _warm(self, engine: int, target: Target) -> None:
        if self._closed or not target.folder.exists():
            return
        self._targets[target.digest] = target
        for action in self._scheduler.warm(engine, target.digest, target.family):
            self._do(action)

    async def _is_well(self, engine: int) -> bool:
        """Return whether an engine still answers; one that does not is ended, and `_watch` sees."""
        try:
            await self._engines[engine].check_health()
        except EngineError:
            self._scheduler.lost(engine)
            await self._engines[engine].close()
            return False
        return True

    async def _ping(self) -> None:
        """See to it that an engine that hangs without work is found before somebody needs it."""
        while True:
            await asyncio.sleep(_PING_EVERY_S)
            for number, engine in enumerate(self._engines):
                if engine.alive and self._scheduler.variant_of(number) is not None:
                    await self._is_well(number)

    # Any: what a coroutine is sent and yields is asyncio's business.
    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _there_now(item: _Item, more: asyncio.Queue[_Item]) -> tuple[list[Piece], _Item]:
    """Return the pieces that are there, from ``item`` on, and what came last."""
    pieces: list[Piece] = []
    while isinstance(item, Piece):
        pieces.append(item)
        if more.empty():
            break
        item = more.get_nowait()
    return pieces, item
