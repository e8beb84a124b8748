"""What is put around Serve's proxy, on a stand-in for it: bodies handed on, one form of failure."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from serve.files import Files
from serve.proxy import STRATEGIES_PATH, Arrival, Envelopes, HandOn, arrival_of, middlewares


class FakeProxy:
    """Notes what it is handed, and answers with the body that it was told of or has received."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.told: list[Arrival | None] = []
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        arrival = arrival_of(scope)
        self.told.append(arrival)
        await asyncio.sleep(self._seconds)
        body = (await receive())["body"] if arrival is None else arrival.body
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})


def post(app: HandOn, path: str = STRATEGIES_PATH, number: int = 1, **body: object) -> list[bytes]:
    async def all_of_them() -> list[bytes]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            answers = [client.post(path, **body) for _ in range(number)]  # type: ignore[arg-type]
            return [answer.content for answer in await asyncio.gather(*answers)]

    return asyncio.run(all_of_them())


@pytest.mark.parametrize("path", [STRATEGIES_PATH, f"/prefix{STRATEGIES_PATH}"])
def test_a_strategy_request_is_handed_on_with_its_body(path: str) -> None:
    proxy = FakeProxy()
    assert post(HandOn(proxy), path, content=b"body") == [b"body"]
    (arrival,) = proxy.told
    assert arrival is not None
    assert (arrival.num_come, arrival.body) == (1, b"body")


def test_any_other_body_is_left_where_it_is() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"bo"
        yield b"dy"

    proxy = FakeProxy()
    app = HandOn(proxy)
    assert post(app, "/v1/completions", content=b"body") == [b"body"]
    assert post(app, content=b"x" * 100_000) == [b"x" * 100_000]
    assert post(app, content=pieces()) == [b"bo"], "no length is told: the replica fetches it"
    assert proxy.told == [None] * 3


def strategies_scope() -> dict[str, object]:
    headers = [(b"content-length", b"4")]
    return {"type": "http", "method": "POST", "path": STRATEGIES_PATH, "headers": headers}


def test_of_many_at_once_all_but_the_first_are_told_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = FakeProxy()
    num_here = 0
    # Until all are here no time passes, however busy the machine is.
    clock = SimpleNamespace(monotonic=lambda: 0.0 if num_here < 64 else 1.0)
    monkeypatch.setattr("serve.proxy.time", clock)

    async def body() -> dict[str, object]:
        nonlocal num_here
        num_here += 1
        return {"type": "http.request", "body": b"body"}

    async def ignore(message: object) -> None:
        return

    async def all_of_them() -> None:
        app = HandOn(proxy)
        await asyncio.gather(*(app(strategies_scope(), body, ignore) for _ in range(64)))

    asyncio.run(all_of_them())
    assert [arrival and arrival.num_come for arrival in proxy.told] == [1] + [64] * 63


def test_a_caller_who_goes_away_before_the_body_is_not_handed_on() -> None:
    proxy = FakeProxy()

    async def gone() -> dict[str, object]:
        return {"type": "http.disconnect"}

    async def nobody(message: object) -> None:
        raise AssertionError(message)

    asyncio.run(HandOn(proxy)(strategies_scope(), gone, nobody))
    assert proxy.told == []


def answer_of(app: object) -> httpx.Response:
    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(app=Envelopes(app))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.get("/", headers={"X-Request-Id": "mine"})

    return asyncio.run(once())


@pytest.mark.parametrize(
    ("status", "code", "retry"),
    [(404, "not_found", None), (408, "timeout", None), (503, "overloaded", "1")],
)
def test_what_the_proxy_itself_says_gets_the_envelope(
    status: int, code: str, retry: str | None
) -> None:
    from ray.serve._private.http_util import convert_object_to_asgi_messages

    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        for message in convert_object_to_asgi_messages("its\nwords", status_code=status):
            await send(message)

    answer = answer_of(proxy)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert answer.json()["error"]["message"] == "its words"
    assert answer.headers.get("Retry-After") == retry
    assert answer.headers["content-type"] == "application/json"


def test_what_an_application_says_stays_as_it_is() -> None:
    answer = answer_of(PlainTextResponse("mine", status_code=404))
    assert (answer.status_code, answer.text) == (404, "mine")


def test_no_answer_at_all_becomes_one_that_says_so() -> None:
    async def died(scope: Scope, receive: Receive, send: Send) -> None:
        return

    answer = answer_of(died)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "replica_lost"
    assert answer.headers["x-request-id"] == "mine"
    assert answer.headers["Retry-After"] == "1"


def test_serve_takes_what_is_named_in_the_environment() -> None:
    from ray._common.utils import import_attr
    from ray.serve._private.http_util import validate_http_proxy_callback_return

    from serve.proxy import ENVIRONMENT

    path = ENVIRONMENT["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"]
    made = validate_http_proxy_callback_return(import_attr(path)())
    assert (
        [one.cls for one in made]
        == [one.cls for one in middlewares()]
        == [HandOn, Files, Envelopes]
    )
