"""A helper process that answers many questions at once, each by a stream of JSON lines.

The same life as `ChildProcess` (own process group, gone with its owner); what is added are
identities: every question carries an ``id``, every line names the question it belongs to, and a
line with ``done`` follows the last. Everything here runs on one event loop. What it does not know:
what the questions mean.

A helper that dies ends every open stream with the same error, also when a process that it had
started still holds its end of the pipe: the death itself is watched, not only the pipe.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import threading
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Final

from unicuco.engines.child import ChildProcess
from unicuco.errors import EngineError

_LONGEST_LINE_BYTES: Final = 1 << 24

Line = dict[str, object]


class StreamingChild(ChildProcess):
    """One running helper; made and used inside a running event loop.

    Args:
        command: program and arguments.
        environment: the helper's whole environment.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        super().__init__(command, environment)
        self.died = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count(1)
        self._open: dict[int, asyncio.Queue[Line | EngineError]] = {}
        self._reason = ""
        self._pump = asyncio.create_task(self._read())
        threading.Thread(target=self._watch, daemon=True).start()

    async def stream(self, question: Mapping[str, object]) -> AsyncGenerator[Line, None]:
        """Yield the lines that answer one question; leaving early cancels it in the helper.

        Raises:
            EngineError: the helper died, before or in the middle.
        """
        if self.died.is_set():
            raise EngineError(self._reason)
        number = next(self._numbers)
        lines: asyncio.Queue[Line | EngineError] = asyncio.Queue()
        self._open[number] = lines
        finished = False
        try:
            self._send(json.dumps({**question, "id": number}).encode() + b"\n")
            while True:
                line = await lines.get()
                if isinstance(line, EngineError):
                    finished = True
                    raise line
                if "done" in line:
                    finished = True
                    return
                yield line
        finally:
            del self._open[number]
            if not finished and not self.died.is_set():
                with contextlib.suppress(EngineError):  # it died meanwhile: nothing to cancel
                    self._send(json.dumps({"op": "cancel", "id": number}).encode() + b"\n")

    async def request(self, question: Mapping[str, object], *, timeout_s: float) -> Line:
        """Return the one line that answers a question.

        Raises:
            EngineError: the helper died, or did not answer in time.
        """
        try:
            async with asyncio.timeout(timeout_s), contextlib.aclosing(self.stream(question)) as s:
                (answer,) = [line async for line in s]
        except TimeoutError:
            raise EngineError(f"the engine did not answer within {timeout_s:g} s") from None
        return answer

    async def aclose(self, *, grace_s: float = 0.0) -> None:
        """End the helper and all that it started; every open stream ends with an error."""
        self._lost("the engine was closed")
        self._pump.cancel()
        await asyncio.gather(self._pump, return_exceptions=True)
        await asyncio.to_thread(self.close, grace_s=grace_s)

    async def _read(self) -> None:
        assert self._process.stdout is not None
        reader = asyncio.StreamReader(limit=_LONGEST_LINE_BYTES)
        # A descriptor of its own: uvloop closes what it is given, whoever owns the file.
        pipe = os.fdopen(os.dup(self._process.stdout.fileno()), "rb", buffering=0)
        transport, _ = await self._loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), pipe
        )
        try:
            while data := await reader.readline():
                line: Line = json.loads(data)
                number = line.pop("id")
                assert isinstance(number, int)
                if number in self._open:
                    self._open[number].put_nowait(line)
        finally:
            transport.close()

    def _watch(self) -> None:
        """Wait, in a thread, for the end of the helper."""
        self._process.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._exited)

    def _exited(self) -> None:
        if not self.died.is_set():
            self._lost(f"the engine's process ended: {self._last_words()}")

    def _lost(self, reason: str) -> None:
        if self.died.is_set():
            return
        self._reason = reason
        self.died.set()
        for lines in self._open.values():
            lines.put_nowait(EngineError(reason))
