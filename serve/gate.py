"""What every request passes: its key, the bounds, and a last net under everything.

A plain ASGI application around the routes. What it does not know: any route.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from fastapi import HTTPException
from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.config import KEYS_VARIABLE, ServeConfig, is_loopback
from serve.errors import ApiError, overloaded, response
from serve.metrics import Metrics
from serve.proxy import Arrival, arrival_of, body_receiver

_LOG: Final = logging.getLogger("ray.serve")
_OPEN: Final = frozenset({"/health", "/ready"})
_STOPPED_FOR_S: Final = 10  # what a new start takes, about
_POLL_S: Final = 0.05
_METHODS: Final = frozenset({"GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS"})


@dataclass(slots=True, kw_only=True)
class _Passage:
    """One request on its way through."""

    request_id: str
    started: float = field(default_factory=time.perf_counter)
    status: int = 0
    num_body_bytes: int = 0


class Gate:
    """The application inside, guarded.

    Args:
        app: the routes.
        config: of the service.
        metrics: told of every answer.
        on_arrival: told what Serve's proxy says of a request, if it does.
    """

    def __init__(
        self,
        app: ASGIApp,
        config: ServeConfig,
        metrics: Metrics,
        on_arrival: Callable[[Arrival], None] = lambda arrival: None,
    ) -> None:
        self._app = app
        self._bounds = config.bounds
        self._digests = tuple(digest.encode() for digest in config.key_digests)
        self._metrics = metrics
        self._on_arrival = on_arrival
        self._in_flight = 0
        self._is_draining = False

    async def drain(self) -> None:
        """Refuse whoever comes from now on; return when all the others are answered."""
        self._is_draining = True
        while self._in_flight:
            await asyncio.sleep(_POLL_S)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        arrival = arrival_of(scope)
        if arrival is not None:
            self._on_arrival(arrival)
            receive = body_receiver(arrival, receive)
        # Serve's proxy echoes the caller's id or makes one, and hands it on.
        passage = _Passage(request_id=headers.get("x-request-id", "unknown"))

        async def send_out(message: Message) -> None:
            if message["type"] == "http.response.start":
                passage.status = message["status"]
            await send(message)

        self._in_flight += 1
        self._metrics.begin()
        try:
            await self._answer(scope, headers, receive, send_out, passage)
        finally:
            self._in_flight -= 1
            route = getattr(scope.get("route"), "path", "none")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            seconds = time.perf_counter() - passage.started
            self._metrics.end(route=route, method=method, status=passage.status, seconds=seconds)

    async def _answer(
        self, scope: Scope, headers: Headers, receive: Receive, send: Send, passage: _Passage
    ) -> None:
        async def counted() -> Message:
            message = await receive()
            passage.num_body_bytes += len(message.get("body", b""))
            if passage.num_body_bytes > self._bounds.max_body_bytes:
                # FastAPI takes any other exception from here for a body that can't be parsed.
                raise HTTPException(413, self._too_large().message)
            return message

        try:
            self._check(scope, headers)
            await self._app(scope, counted, send)
        except ApiError as error:
            if passage.status:
                raise
            await response(error)(scope, receive, send)
        except Exception:
            _LOG.exception("request %s failed", passage.request_id)
            if passage.status:
                raise
            failure = ApiError(500, "internal_error", f"internal error, id {passage.request_id}")
            await response(failure)(scope, receive, send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        if get_route_path(scope) not in _OPEN:
            self._check_caller(scope, headers)
        if self._is_draining and get_route_path(scope) != "/health":
            raise ApiError(
                503, "stopping", "the service is being stopped", retry_after_s=_STOPPED_FOR_S
            )
        if self._in_flight > self._bounds.max_in_flight:
            raise overloaded(f"{self._bounds.max_in_flight} requests are being answered")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self._bounds.max_body_bytes:
            raise self._too_large()

    def _check_caller(self, scope: Scope, headers: Headers) -> None:
        if not self._digests:
            client = scope.get("client")
            if client is not None and not is_loopback(client[0]):
                raise ApiError(
                    403, "keys_needed", f"only this machine may call until {KEYS_VARIABLE} is set"
                )
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).hexdigest().encode()
        # All are compared, each in constant time: how long it takes tells nothing of any key.
        fits = [hmac.compare_digest(digest, known) for known in self._digests]
        if kind.lower() != "bearer" or True not in fits:
            raise ApiError(
                401,
                "invalid_api_key",
                "give a valid key as: Authorization: Bearer KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _too_large(self) -> ApiError:
        limit = self._bounds.max_body_bytes
        return ApiError(413, "body_too_large", f"a body may have {limit:,} bytes at most")
