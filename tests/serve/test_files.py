"""Files named by an application and sent by what is around Serve's proxy, or by itself."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve import files
from serve.errors import ApiError, response
from serve.files import EXTENSION, Files, file_answer

CONTENT = os.urandom(3 * files._PIECE_BYTES + 17)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(CONTENT)
    return tmp_path / "file"


def answering(path: Path, notes: list[Message]) -> ASGIApp:
    """An application that answers with a file, and notes what it sends itself."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def noted(message: Message) -> None:
            notes.append(dict(message))
            await send(message)

        try:
            answer = file_answer(path, name="v.pack", asked=Headers(scope=scope))
        except ApiError as error:
            answer = response(error)
        await answer(scope, receive, noted)

    return app


@pytest.fixture(params=["proxy", "ingress"])
def get(request: pytest.FixtureRequest, path: Path) -> Callable[..., httpx.Response]:
    """What asks for the file, where the proxy sends it and where the application does."""
    notes: list[Message] = []
    app = answering(path, notes)

    def call(**headers: str) -> httpx.Response:
        async def once() -> httpx.Response:
            transport = httpx.ASGITransport(app=Files(app) if request.param == "proxy" else app)
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                named = {name.replace("_", "-"): value for name, value in headers.items()}
                return await client.get("/v1/models/run:v/packed", headers=named)

        answer = asyncio.run(once())
        if request.param == "proxy":
            assert sum(len(message.get("body", b"")) for message in notes) < 1000
        return answer

    return call


def test_a_whole_file_comes_with_its_length_and_a_name(get: Callable[..., httpx.Response]) -> None:
    answer = get()
    assert answer.status_code == 200
    assert answer.content == CONTENT
    assert answer.headers["content-length"] == str(len(CONTENT))
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"] == 'attachment; filename="v.pack"'
    assert EXTENSION not in answer.headers


@pytest.mark.parametrize(
    ("asked", "begin", "end"),
    [("bytes=5-", 5, None), ("bytes=0-0", 0, 1), ("bytes=300000-900000000", 300_000, None)],
)
def test_a_range_goes_on_where_a_caller_was_cut_off(
    get: Callable[..., httpx.Response], asked: str, begin: int, end: int | None
) -> None:
    etag = get().headers["etag"]
    answer = get(Range=asked, If_Range=etag)
    assert answer.status_code == 206
    assert answer.content == CONTENT[begin:end]
    stop = (len(CONTENT) if end is None else end) - 1
    assert answer.headers["content-range"] == f"bytes {begin}-{stop}/{len(CONTENT)}"
    assert get(Range=asked, If_Range='"another"').content == CONTENT, "of a file that is gone"


@pytest.mark.parametrize("asked", ["bytes=9-5", "bytes=-5", "lines=1-2", "bytes=1-2,5-6", "x"])
def test_what_is_no_single_range_gives_the_whole(
    get: Callable[..., httpx.Response], asked: str
) -> None:
    answer = get(Range=asked)
    assert (answer.status_code, answer.content) == (200, CONTENT)


def test_a_range_behind_the_end_is_416_with_the_size(get: Callable[..., httpx.Response]) -> None:
    answer = get(Range=f"bytes={len(CONTENT)}-")
    assert answer.status_code == 416
    assert answer.json()["error"]["code"] == "range_not_satisfiable"
    assert answer.headers["content-range"] == f"bytes */{len(CONTENT)}"


def test_who_has_the_file_gets_it_not_again(get: Callable[..., httpx.Response], path: Path) -> None:
    etag = get().headers["etag"]
    again = get(If_None_Match=etag)
    assert (again.status_code, again.content) == (304, b"")
    path.unlink()
    path.write_bytes(CONTENT[:-1])
    assert get(If_None_Match=etag).status_code == 200


def scope() -> Scope:
    return {"type": "http", "method": "GET", "path": "/v1/models/run:v/packed", "headers": []}


def test_nothing_is_sent_to_a_caller_who_has_gone_away(path: Path) -> None:
    """And no more is read than was taken."""

    async def work() -> list[Message]:
        gone, sent = asyncio.Event(), []

        async def receive() -> Message:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)
            if len(sent) == 2:
                gone.set()
                await asyncio.sleep(0)

        inside = answering(path, [])

        async def listening(scope: Scope, receive: Receive, send: Send) -> None:
            listener = asyncio.create_task(receive())  # as Serve's proxy does
            await inside(scope, receive, send)
            await listener

        await Files(listening)(scope(), receive, send)
        return sent

    start, piece, *rest = asyncio.run(work())
    assert start["status"] == 200
    assert len(piece["body"]) == files._PIECE_BYTES
    assert sum(len(message["body"]) for message in rest) <= files._PIECE_BYTES


def test_files_are_sent_to_so_many_at_once_and_others_come_later(path: Path) -> None:
    async def work() -> list[list[Message]]:
        app = Files(answering(path, []))
        taken = asyncio.Event()

        async def receive() -> Message:
            return {"type": "http.request", "body": b""}

        async def call(sent: list[Message]) -> None:
            async def send(message: Message) -> None:
                sent.append(message)
                if message["type"] == "http.response.start" and message["status"] == 200:
                    await taken.wait()

            await app(scope(), receive, send)

        answers: list[list[Message]] = [[] for _ in range(files._MOST_OPEN)]
        running = [asyncio.create_task(call(sent)) for sent in answers]
        while not all(answers):
            await asyncio.sleep(0)
        refused: list[Message] = []
        await call(refused)
        taken.set()
        await asyncio.gather(*running)
        later: list[Message] = []
        await call(later)
        return [refused, later, *answers]

    refused, *others = asyncio.run(work())
    assert refused[0]["status"] == 503
    assert dict(refused[0]["headers"])[b"retry-after"] == b"5"
    assert b"overloaded" in refused[1]["body"]
    assert len(refused) == 2
    for sent in others:
        assert b"".join(message.get("body", b"") for message in sent) == CONTENT


def test_a_file_that_goes_away_before_it_is_opened_is_503(path: Path) -> None:
    answer = file_answer(path, name="v.pack", asked=Headers({}))
    path.unlink()

    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(app=Files(answer))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.get("/packed")

    refused = asyncio.run(once())
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert "can't be read" in refused.json()["error"]["message"]
    assert "\n" not in refused.json()["error"]["message"]
