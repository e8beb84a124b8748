"""Callers are gathered, answered in order, and survive a replica that dies."""

from __future__ import annotations

import asyncio

import pytest
from ray.exceptions import RayActorError

from serve import planning
from serve.asks import Answer, Ask
from serve.errors import ApiError
from serve.planning import Arrivals, Planning
from serve.proxy import Arrival
from unicuco.types import Request, Target


class FakeHandle:
    """Answers each request with its value, some calls failing first."""

    def __init__(self, *, failures: int = 0, seconds: float = 0.01) -> None:
        self.calls: list[int] = []
        self._failures = failures
        self._seconds = seconds

    @property
    def answer(self) -> FakeHandle:
        """The method."""
        return self

    async def remote(self, asks: list[Ask]) -> list[list[Answer]]:
        """Answer after a while."""
        self.calls.append(len(asks))
        await asyncio.sleep(self._seconds)
        if self._failures:
            self._failures -= 1
            raise RayActorError
        return [[str(request.value).encode() for request in ask.requests] for ask in asks]


def make_ask(value: float) -> Ask:
    return Ask(run="run", requests=(Request(target=Target.SPARSITY, value=value),))


async def ask_all(asked: Planning, number: int) -> list[list[Answer]]:
    return await asyncio.gather(*(asked.ask(make_ask(k / 1000)) for k in range(number)))


def test_those_who_come_while_a_call_is_under_way_go_with_the_next() -> None:
    handle = FakeHandle()
    answers = asyncio.run(ask_all(Planning(handle, max_waiting=500), 256))
    assert answers == [[str(k / 1000).encode()] for k in range(256)]
    assert len(handle.calls) <= 3
    assert sum(handle.calls) == 256


def test_a_lost_call_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_RETRY_S", 0.01)
    handle = FakeHandle(failures=3)
    assert len(asyncio.run(ask_all(Planning(handle, max_waiting=500), 8))) == 8


def test_a_deployment_that_stays_away_is_told_to_every_caller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(planning, "_RETRY_S", 0.01)

    async def scene() -> list[object]:
        asked = Planning(FakeHandle(failures=1000), max_waiting=500)
        calls = (asked.ask(make_ask(k / 10)) for k in range(4))
        return list(await asyncio.gather(*calls, return_exceptions=True))

    assert all(isinstance(error, RayActorError) for error in asyncio.run(scene()))


def test_a_full_queue_refuses_with_the_time_to_come_back() -> None:
    async def scene() -> list[object]:
        asked = Planning(FakeHandle(seconds=0.2), max_waiting=2)
        calls = (asked.ask(make_ask(k / 10)) for k in range(9))
        return list(await asyncio.gather(*calls, return_exceptions=True))

    refused = [answer for answer in asyncio.run(scene()) if isinstance(answer, ApiError)]
    assert refused
    assert {(error.status, error.headers["Retry-After"]) for error in refused} == {(503, "1")}


def test_a_caller_that_goes_away_hinders_nobody() -> None:
    async def scene() -> list[list[Answer]]:
        asked = Planning(FakeHandle(), max_waiting=500)
        gone = asyncio.create_task(asked.ask(make_ask(0.5)))
        await asyncio.sleep(0.001)
        gone.cancel()
        return await ask_all(asked, 4)

    assert len(asyncio.run(scene())) == 4


def test_those_who_are_on_their_way_are_waited_for_and_a_lone_caller_waits_for_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Longer than any machine keeps a process waiting: only that all have come ends it.
    monkeypatch.setattr(planning, "_LONGEST_GAP_S", 60.0)
    monkeypatch.setattr(planning, "_LONGEST_WAIT_S", 60.0)

    async def run() -> list[int]:
        handle, arrivals = FakeHandle(seconds=0.0), Arrivals()
        asked = Planning(handle, max_waiting=500, arrivals=arrivals)
        arrivals.note(Arrival(proxy="p", num_come=1, body=b""))
        await asked.ask(make_ask(0.1))

        async def come(k: int) -> None:
            await asyncio.sleep(k / 1000)
            arrivals.note(Arrival(proxy="p", num_come=33, body=b""))
            await asked.ask(make_ask(k / 1000))

        await asyncio.gather(*(come(k) for k in range(32)))
        return handle.calls

    assert asyncio.run(run()) == [1, 32]


def test_those_who_never_arrive_are_not_waited_for_long_and_only_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> tuple[float, float]:
        loop, arrivals = asyncio.get_running_loop(), Arrivals()
        asked = Planning(FakeHandle(seconds=0.0), max_waiting=500, arrivals=arrivals)
        seconds = []
        for num_come, gap_s in ((10, 0.05), (11, 60.0)):
            monkeypatch.setattr(planning, "_LONGEST_GAP_S", gap_s)
            monkeypatch.setattr(planning, "_LONGEST_WAIT_S", 10 * gap_s)
            began_s = loop.time()
            arrivals.note(Arrival(proxy="p", num_come=num_come, body=b""))
            await asked.ask(make_ask(0.1))
            seconds.append(loop.time() - began_s)
        return seconds[0], seconds[1]

    first_s, second_s = asyncio.run(run())
    assert first_s >= 0.05
    assert second_s < 60.0
