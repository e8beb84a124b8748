"""The child's side of `unicuco.engines.child`: answers JSON lines until its input closes."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from typing import IO

Handler = Callable[[Mapping[str, object]], Mapping[str, object]]
StreamHandler = Callable[[Mapping[str, object]], AsyncIterator[Mapping[str, object]]]


def serve_lines(handle: Handler) -> None:
    """Answer every line with ``handle``'s object, in order, and return when the input closes.

    Whatever a library prints on standard output goes to standard error, so answers stay clean. The
    input is read by a thread that ends the process, and all that it started, as soon as the owner
    is gone, even in the middle of an import.
    """
    answers = _own_output()
    questions: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(questions.put,), daemon=True).start()
    while True:
        answers.write(json.dumps(handle(json.loads(questions.get()))) + "\n")
        answers.flush()


def serve_streams(handle: StreamHandler) -> None:
    """Answer every line with the objects that ``handle`` yields, many questions at once.

    A question has an ``id``, which its answers carry; a line with ``done`` follows the last. The
    question ``{"op": "cancel", "id": N}`` cancels question N, which then is not answered further.
    """
    _guard_group()
    asyncio.run(_serve_streams(handle, _own_output()))


async def _serve_streams(handle: StreamHandler, answers: IO[str]) -> None:
    loop = asyncio.get_running_loop()
    tasks: dict[int, asyncio.Task[None]] = {}

    def take(line: str) -> None:
        question = json.loads(line)
        number = question.pop("id")
        if question["op"] == "cancel":
            if number in tasks:
                tasks[number].cancel()
            return
        tasks[number] = asyncio.create_task(_answer(handle, question, number, answers))
        tasks[number].add_done_callback(lambda task: tasks.pop(number, None))

    def put(line: str) -> None:
        loop.call_soon_threadsafe(take, line)

    threading.Thread(target=_read, args=(put,), daemon=True).start()
    await asyncio.Event().wait()


async def _answer(
    handle: StreamHandler, question: Mapping[str, object], number: int, answers: IO[str]
) -> None:
    async for answer in handle(question):
        _write(answers, {**answer, "id": number})
    _write(answers, {"id": number, "done": True})


def _guard_group() -> None:
    """See to it that what was started here ends with this process, also when that is killed.

    Ray kills an actor's own children when the actor ends, but not theirs, so a process outside the
    group watches this one and then ends the group.
    """
    own = os.getpid()
    if os.getpgrp() == own:
        watch = f"while kill -0 {own} 2>/dev/null; do sleep 1; done; kill -9 -{own} 2>/dev/null"
        quiet = subprocess.DEVNULL
        subprocess.Popen(
            ["/bin/sh", "-c", watch],
            stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True, cwd="/",
        )  # fmt: skip


def _write(answers: IO[str], line: Mapping[str, object]) -> None:
    answers.write(json.dumps(line) + "\n")
    answers.flush()


def _own_output() -> IO[str]:
    """Return the standard output, and let whatever libraries print go to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _read(put: Callable[[str], None]) -> None:
    for line in sys.stdin:
        put(line)
    # Not sys.exit: the main thread may be deep in native code and must not keep the process alive.
    if os.getpgrp() == os.getpid():  # a group of its own: what was started here goes along
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(0)
