from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop

from tests.unicuco.engines.test_child import gone
from unicuco.engines.streaming_child import StreamingChild
from unicuco.errors import EngineError

pytestmark = pytest.mark.slow  # every test starts a process that imports torch

SERVE = """
import asyncio, os, subprocess, sys
from unicuco.engines.serve_lines import serve_streams

cancelled = []

async def handle(question):
    op = question["op"]
    if op == "count":
        try:
            for number in range(question["to"]):
                yield {"number": number}
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            cancelled.append(question["to"])
            raise
    elif op == "cancelled":
        yield {"cancelled": cancelled}
    elif op == "sleep":
        await asyncio.sleep(60)
        yield {}
    elif op == "die":
        sys.stderr.write("last words\\n")
        sys.stderr.flush()
        os._exit(3)
    elif op == "fork":
        yield {"pid": subprocess.Popen(["sleep", "60"]).pid}
    else:
        print("noise on standard output")
        yield {"echo": question["text"]}

serve_streams(handle)
"""

Work = Callable[[StreamingChild], Awaitable[None]]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Work], None]:
    """Runs a test's work with a helper, on the loop of Python and on that of Ray Serve."""

    async def bounded(work: Work) -> None:
        child = StreamingChild([sys.executable, "-P", "-c", SERVE], os.environ)
        async with asyncio.timeout(60):
            await work(child)
        await child.aclose()
        assert not child.alive
        assert gone(child.pid)

    def started(work: Work) -> None:
        (uvloop.run if request.param == "uvloop" else asyncio.run)(bounded(work))

    return started


async def count(child: StreamingChild, to: int) -> list[object]:
    return [line["number"] async for line in child.stream({"op": "count", "to": to})]


def test_many_questions_are_answered_at_once_each_by_its_own_lines(
    run: Callable[[Work], None],
) -> None:
    async def work(child: StreamingChild) -> None:
        long = "ä" * 300_000  # more than a pipe holds
        echo = child.request({"op": "echo", "text": long}, timeout_s=30)
        answers = await asyncio.gather(count(child, 20), count(child, 5), echo)
        assert answers == [list(range(20)), list(range(5)), {"echo": long}]

    run(work)


def test_leaving_a_stream_cancels_its_question(run: Callable[[Work], None]) -> None:
    async def work(child: StreamingChild) -> None:
        stream = child.stream({"op": "count", "to": 10_000})
        assert await anext(stream) == {"number": 0}
        await stream.aclose()
        await asyncio.sleep(0.1)
        answer = await child.request({"op": "cancelled"}, timeout_s=30)
        assert answer == {"cancelled": [10_000]}

    run(work)


def test_a_death_ends_every_stream_with_the_last_words(run: Callable[[Work], None]) -> None:
    async def work(child: StreamingChild) -> None:
        running = asyncio.create_task(count(child, 10_000))
        await child.request({"op": "echo", "text": ""}, timeout_s=30)
        with pytest.raises(EngineError, match=r"ended: last words \(exit status 3\)"):
            await child.request({"op": "die"}, timeout_s=30)
        with pytest.raises(EngineError, match="last words"):
            await running
        assert child.died.is_set()
        with pytest.raises(EngineError, match="last words"):
            await count(child, 1)

    run(work)


def test_a_death_is_seen_though_a_process_of_the_helper_holds_the_pipe(
    run: Callable[[Work], None],
) -> None:
    async def work(child: StreamingChild) -> None:
        pid = (await child.request({"op": "fork"}, timeout_s=30))["pid"]
        os.kill(child.pid, signal.SIGKILL)
        await child.died.wait()
        await child.aclose()
        assert isinstance(pid, int)
        assert gone(pid)

    run(work)


def test_no_answer_in_time_is_an_error_and_the_helper_serves_on(
    run: Callable[[Work], None],
) -> None:
    async def work(child: StreamingChild) -> None:
        await child.request({"op": "echo", "text": ""}, timeout_s=30)
        with pytest.raises(EngineError, match=r"did not answer within 0\.1 s"):
            await child.request({"op": "sleep"}, timeout_s=0.1)
        assert await count(child, 3) == [0, 1, 2]

    run(work)


def test_a_helper_and_all_it_started_end_with_an_owner_that_is_killed_with_it() -> None:
    owner = f"""
        import asyncio, os, signal, sys
        from unicuco.engines.streaming_child import StreamingChild

        async def main():
            child = StreamingChild([sys.executable, "-P", "-c", {SERVE!r}], os.environ)
            pid = (await child.request({{"op": "fork"}}, timeout_s=30))["pid"]
            print(child.pid, pid, flush=True)
            os.kill(child.pid, signal.SIGKILL)  # as Ray does with the children of an actor
            os.kill(os.getpid(), signal.SIGKILL)

        asyncio.run(main())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(owner)], stdout=subprocess.PIPE, text=True
    )
    assert done.returncode == -signal.SIGKILL
    for pid in done.stdout.split():
        assert gone(int(pid)), Path(f"/proc/{pid}/cmdline").read_bytes()
