"""Keys, bounds and the last net, on the gate alone."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.config import Bounds, ServeConfig
from serve.errors import ApiError
from serve.gate import Gate
from serve.metrics import Metrics

KEY = "a-secret-key"


async def fine(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"fine"})


async def broken(scope: Scope, receive: Receive, send: Send) -> None:
    raise RuntimeError(f"the secret is {KEY}")


async def refusing(scope: Scope, receive: Receive, send: Send) -> None:
    raise ApiError(409, "conflict", "no")


def gate(app: ASGIApp = fine, *, keys: str = "", bounds: Bounds | None = None) -> Gate:
    config = ServeConfig.of_runs(
        [Path("run")], data=Path("data"), api_keys=keys, bounds=bounds or Bounds()
    )
    return Gate(app, config, Metrics())


def call(
    app: Gate, path: str = "/v1/models", client: str = "127.0.0.1", **headers: str
) -> httpx.Response:
    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, client=(client, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as caller:
            return await caller.get(path, headers=headers)

    return asyncio.run(once())


def code(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["code"])


@pytest.mark.parametrize(
    "given",
    [None, "", "Bearer", "Bearer ", "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY}x"],
)
def test_without_a_valid_key_nothing_but_health_and_ready_answers(given: str | None) -> None:
    headers = {} if given is None else {"Authorization": given}
    guarded = gate(keys=f"another-key,{KEY}")
    for path in ("/v1/models", "/", "/docs", "/openapi.json", "/metrics", "/health/"):
        answer = call(guarded, path, **headers)
        assert answer.status_code == 401
        assert code(answer) == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
        assert KEY not in answer.text
    for path in ("/health", "/ready"):
        assert call(guarded, path, **headers).status_code == 200


def test_each_valid_key_opens(caplog: pytest.LogCaptureFixture) -> None:
    guarded = gate(keys=f"another-key,{KEY}")
    for word in (f"Bearer {KEY}", "bearer another-key"):
        assert call(guarded, Authorization=word, client="10.0.0.1").status_code == 200
    assert KEY not in caplog.text


def test_without_keys_only_this_machine_may_call() -> None:
    assert call(gate()).status_code == 200
    assert call(gate(), client="::1").status_code == 200
    answer = call(gate(), client="10.0.0.1")
    assert (answer.status_code, code(answer)) == (403, "keys_needed")


def test_a_full_house_is_503_with_the_time_to_come_back() -> None:
    entered, leave = asyncio.Event(), asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        entered.set()
        await leave.wait()
        await fine(scope, receive, send)

    async def scene() -> tuple[httpx.Response, httpx.Response, httpx.Response]:
        transport = httpx.ASGITransport(app=gate(slow, bounds=Bounds(max_in_flight=1)))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as caller:
            first = asyncio.create_task(caller.get("/a"))
            await entered.wait()
            refused = await caller.get("/b")
            leave.set()
            return await first, refused, await caller.get("/c")

    first, refused, later = asyncio.run(scene())
    assert (first.status_code, later.status_code) == (200, 200)
    assert (refused.status_code, code(refused)) == (503, "overloaded")
    assert int(refused.headers["retry-after"]) >= 1


def test_a_bug_is_500_in_the_envelope_and_tells_no_secret() -> None:
    answer = call(gate(broken))
    assert (answer.status_code, code(answer)) == (500, "internal_error")
    assert KEY not in answer.text


def test_an_error_of_the_service_passes_as_it_is() -> None:
    answer = call(gate(refusing))
    assert (answer.status_code, code(answer)) == (409, "conflict")


@pytest.mark.parametrize("length", ["-1", "many", "9" * 30, "1048577"])
def test_a_wrong_or_large_length_is_413_before_the_body_is_read(length: str) -> None:
    answer = call(gate(), **{"Content-Length": length})
    assert (answer.status_code, code(answer)) == (413, "body_too_large")


def test_a_gate_that_is_draining_waits_for_those_inside_and_sends_the_others_away() -> None:
    release = asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await release.wait()
        await fine(scope, receive, send)

    async def story() -> list[httpx.Response]:
        app = gate(slow)
        transport = httpx.ASGITransport(app=app, client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as caller:
            inside = asyncio.create_task(caller.get("/v1/models"))
            await asyncio.sleep(0)
            draining = asyncio.create_task(app.drain())
            await asyncio.sleep(0.01)
            refused = [await caller.get(path) for path in ("/v1/models", "/ready")]
            assert not draining.done()
            release.set()
            alive = await caller.get("/health")
            await asyncio.wait_for(draining, 30)
            return [await inside, alive, *refused]

    inside, alive, *refused = asyncio.run(story())
    assert inside.status_code == alive.status_code == 200
    for answer in refused:
        assert (answer.status_code, code(answer)) == (503, "stopping")
        assert int(answer.headers["Retry-After"]) > 0
