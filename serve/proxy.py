"""What Ray Serve's HTTP proxy does for this service, beyond passing requests on.

Serve calls `middlewares` in each proxy process whose environment has `ENVIRONMENT`. They
- hand a strategy request's body on with its head: by itself a replica fetches the body by calls of
  its own, which cost as much as all the rest;
- tell with it how many such requests have come so far, so that whoever answers knows whether more
  are on their way, and can answer them together;
- send the files that an ingress names (`serve.files`);
- give the proxy's own failures the error envelope: no such path (404), all queues full or no
  replica (503), a replica that died with the request (no answer at all, which Serve leaves to the
  HTTP server as a bare 500).
`ENVIRONMENT` also gives a proxy more time to start and to answer than Serve does, for machines that
are busy.

What stays without the envelope is what is answered below the proxy's application: a line that is no
HTTP (400, uvicorn), and a connection that is closed because the proxy itself died. Where Serve was
started by others without `ENVIRONMENT`, everything works, at Serve's own cost and with its own
words. What this module does not know: any other route, the applications.
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import time
from collections import Counter
from dataclasses import dataclass
from typing import Final

from ray.serve._private.common import RequestMetadata
from ray.serve._private.http_util import ASGIReceiveProxy
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import envelope
from serve.files import Files

ENVIRONMENT: Final = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.proxy:middlewares",
    # Serve ends a proxy that took longer than 5 s to start, and with it the start of the service;
    # and one that is silent for three times 10 s, with every call in it. On a machine on which
    # engines are being started both happen to proxies that are well.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30",
}
STRATEGIES_PATH: Final = "/v1/strategies"

_EXTENSION: Final = "unicuco"
_MOST_BODY_BYTES: Final = 1 << 16  # more is fetched as ever
_QUIET_S: Final = 0.002
_LONGEST_WAIT_S: Final = 0.01
_RETRY_AFTER_S: Final = b"1"
_CODES: Final = {404: "not_found", 408: "timeout", 429: "overloaded", 503: "overloaded"}
_LOST: Final = (
    "the process that answered was lost, and whether it did what was asked is not known: ask again,"
    " with the same Idempotency-Key if there was one"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """What the proxy says of a request: its body, and that so many like it have come until now."""

    proxy: str
    num_come: int
    body: bytes


def middlewares() -> list[Middleware]:
    """Return what Serve's proxy is to put around its application, the innermost first."""
    return [Middleware(HandOn), Middleware(Files), Middleware(Envelopes)]


def arrival_of(scope: Scope) -> Arrival | None:
    """Return what the proxy said of a request; none where it says nothing."""
    told = scope.get("extensions", {}).get(_EXTENSION)
    return None if told is None else Arrival(**told)


def body_receiver(arrival: Arrival, receive: Receive) -> Receive:
    """Return what receives the body that came with the head, and spare the replica fetching it.

    Nothing comes after the body: Serve's proxy ends a call whose caller goes away by itself.

    Args:
        arrival: what the proxy said of the request.
        receive: as Serve gave it; it has fetched nothing yet.
    """
    if isinstance(receive, ASGIReceiveProxy):
        # Serve fetches by a task that begins when the application first waits; each fetch is a call
        # of the proxy, and costs both of them as much as the rest of a strategy request.
        receive._receive_asgi_messages = _nothing
    body: Message | None = {"type": "http.request", "body": arrival.body, "more_body": False}

    async def receive_body() -> Message:
        nonlocal body
        message, body = body, None
        return await receive() if message is None else message

    return receive_body


async def _nothing(metadata: RequestMetadata) -> bytes:
    await asyncio.Event().wait()
    raise AssertionError("nobody sets it")


class HandOn:
    """Hands strategy requests on with their bodies.

    Args:
        app: the proxy.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._name = secrets.token_hex(8)
        self._num_come: Counter[str] = Counter()  # by path: applications may share a proxy
        self._newest_s = -math.inf

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request."""
        if not _is_small_strategies_call(scope):
            await self._app(scope, receive, send)
            return
        body = b""
        more = True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return  # whoever asked has gone away
            body += message.get("body", b"")
            more = message.get("more_body", False)
        path = scope["path"]
        self._num_come[path] += 1
        await self._wait_for_others()
        told = {"proxy": self._name, "num_come": self._num_come[path], "body": body}
        scope["extensions"] = {**scope.get("extensions", {}), _EXTENSION: told}
        await self._app(scope, receive, send)

    async def _wait_for_others(self) -> None:
        """Return at once if nobody else has just come, else when nobody comes any more.

        Passing a call on takes as long as hearing of twenty others.
        """
        now_s = mine_s = time.monotonic()
        is_alone = now_s - self._newest_s > _QUIET_S
        self._newest_s = now_s
        while not is_alone and now_s < min(self._newest_s + _QUIET_S, mine_s + _LONGEST_WAIT_S):
            await asyncio.sleep(self._newest_s + _QUIET_S - now_s)
            now_s = time.monotonic()


def _is_small_strategies_call(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    if not scope["path"].endswith(STRATEGIES_PATH):
        return False
    length = Headers(scope=scope).get("content-length", "")
    return length.isdecimal() and int(length[:20]) <= _MOST_BODY_BYTES


class Envelopes:
    """Gives failures that are the proxy's own the error envelope.

    Args:
        app: the proxy.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start: Message | None = None  # of a failure, until its text is there
        has_begun = False
        text = b""

        async def rewritten(message: Message) -> None:
            nonlocal start, has_begun, text
            if message["type"] == "http.response.start":
                has_begun = True
                if _is_the_proxys_failure(message):
                    start = message
                    return
            elif start is not None and message["type"] == "http.response.body":
                text += message.get("body", b"")
                if not message.get("more_body", False):
                    for part in _failure(start, text.decode("utf-8", "replace")):
                        await send(part)
                return
            await send(message)

        await self._app(scope, receive, rewritten)
        if not has_begun:
            request_id = Headers(scope=scope).get("x-request-id", "unknown").encode("latin-1")
            headers = [(b"x-request-id", request_id)]
            lost: Message = {"type": "http.response.start", "status": 503, "headers": headers}
            for part in _failure(lost, _LOST, code="replica_lost"):
                await send(part)


def _is_the_proxys_failure(start: Message) -> bool:
    """Tell it from an application's: the proxy's are plain text whose length is not told."""
    headers = {bytes(name).lower(): bytes(value) for name, value in start["headers"]}
    is_plain = headers.get(b"content-type", b"").startswith(b"text/plain")
    return start["status"] >= 400 and is_plain and b"content-length" not in headers


def _failure(start: Message, text: str, code: str | None = None) -> tuple[Message, Message]:
    status = int(start["status"])
    content = envelope(status, code or _CODES.get(status, "internal_error"), text)
    body = json.dumps(content, separators=(",", ":")).encode()
    left_out = (b"content-type", b"content-length")
    headers = [(name, value) for name, value in start["headers"] if name.lower() not in left_out]
    headers += [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    if status in (429, 503) and b"retry-after" not in {name.lower() for name, _ in headers}:
        headers.append((b"retry-after", _RETRY_AFTER_S))
    return (
        {**start, "status": status, "headers": headers},
        {"type": "http.response.body", "body": body},
    )
