"""Files that are too large to pass through Ray: the ingress says which, Serve's proxy reads them.

Nothing holds up a stream of Ray's: what a slow caller has not taken yet piles up in the proxy's
memory, up to the whole file. So an ingress that is behind `Files` sends the head of its answer
only, which says where the file is, and `Files`, which Serve puts around its proxy (`serve.proxy`),
reads it piece by piece as the caller takes them. That needs the service's data folder on the
proxy's node, as on all others. Where Serve was started without `Files`, the ingress sends the
pieces itself, through Ray.

What this module does not know: what is in the files.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import ApiError, overloaded, response

EXTENSION: Final = "unicuco.files"
PACKED: Final = "/packed"  # how paths end whose answers may be files

_MEDIA_TYPE: Final = "application/octet-stream"
_PIECE_BYTES: Final = 1 << 18
_MOST_OPEN: Final = 64  # files that one proxy sends at once
_PATIENCE_S: Final = 60.0  # with a caller who takes no piece at all
_RANGE: Final = re.compile(r"bytes=(\d{1,18})-(\d{0,18})")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRange:
    """Bytes ``[begin, end)`` of a file."""

    path: str
    begin: int
    end: int

    def open(self) -> int:
        """Return a descriptor of the file; it can be read whatever becomes of the file's name.

        Raises:
            ApiError: 503, the file went away in between.
        """
        try:
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise overloaded(f"the file can't be read: {error.strerror}; ask again") from None

    async def pieces(self, descriptor: int) -> AsyncIterator[Message]:
        """Yield the bytes as parts of a body, each read when the one before was taken."""
        begin = self.begin
        while begin < self.end:
            count = min(_PIECE_BYTES, self.end - begin)
            piece = await asyncio.to_thread(os.pread, descriptor, count, begin)
            if not piece:
                raise OSError(f"{self.path} was cut short while it was sent")
            begin += len(piece)
            yield {"type": "http.response.body", "body": piece, "more_body": True}


def file_answer(path: Path, *, name: str, asked: Headers) -> Response:
    """Return the answer with a whole file, or with the one range of it that the caller wants.

    So a caller whose connection broke can go on, and one who has the file gets it not again.

    Args:
        path: a file that is never altered, only replaced or removed.
        name: that the caller is to save it under.
        asked: the caller's headers.

    Raises:
        FileNotFoundError: it is not there.
        ApiError: 416, the range begins behind the file's end.
    """
    found = path.stat()
    size = found.st_size
    etag = f'"{found.st_ino:x}-{found.st_mtime_ns:x}-{size:x}"'
    headers = {"Accept-Ranges": "bytes", "ETag": etag}
    if etag in asked.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    headers["Content-Disposition"] = f'attachment; filename="{name}"'
    begin, end = _range(asked.get("range", ""), size) if _is_wanted(asked, etag) else (0, size)
    if end - begin < size:
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
    part = FileRange(path=str(path), begin=begin, end=end)
    return FileAnswer(part, status_code=200 if end - begin == size else 206, headers=headers)


def _is_wanted(asked: Headers, etag: str) -> bool:
    """Say whether a range is of the file as it is now."""
    return asked.get("if-range", etag) == etag


def _range(text: str, size: int) -> tuple[int, int]:
    found = _RANGE.fullmatch(text)
    if found is None:
        return 0, size
    begin, end = int(found[1]), min(int(found[2]) + 1 if found[2] else size, size)
    if begin >= size:
        raise ApiError(
            416,
            "range_not_satisfiable",
            f"the file has {size:,} bytes",
            param="Range",
            headers={"Content-Range": f"bytes */{size}"},
        )
    return (begin, end) if begin < end else (0, size)  # RFC 9110: no range at all


class FileAnswer(Response):
    """A file; its head alone where the proxy sends the rest."""

    def __init__(self, part: FileRange, *, status_code: int, headers: Mapping[str, str]) -> None:
        length = {"Content-Length": str(part.end - part.begin)}
        super().__init__(None, status_code, {**headers, **length}, _MEDIA_TYPE)
        self._part = part

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        head: Message = {
            "type": "http.response.start", "status": self.status_code, "headers": self.raw_headers
        }  # fmt: skip
        if EXTENSION in scope.get("extensions", {}):
            await send({**head, EXTENSION: asdict(self._part)})
        else:
            descriptor = self._part.open()
            try:
                await send(head)
                async for piece in self._part.pieces(descriptor):
                    await send(piece)
            finally:
                os.close(descriptor)
        await send({"type": "http.response.body", "body": b""})


class Files:
    """Sends the files that an ingress names.

    Args:
        app: the proxy.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request."""
        if scope["type"] != "http" or not scope["path"].endswith(PACKED):
            await self._app(scope, receive, send)
            return
        scope["extensions"] = {**scope.get("extensions", {}), EXTENSION: {}}
        is_gone = is_refused = False

        async def watched() -> Message:
            nonlocal is_gone
            message = await receive()
            is_gone |= message["type"] == "http.disconnect"
            return message

        async def put(message: Message) -> None:
            nonlocal is_refused
            told = message.pop(EXTENSION, None)
            if told is None:
                if not is_refused:
                    await send(message)
                return
            try:
                await self._send(message, FileRange(**told), send, lambda: is_gone)
            except ApiError as error:  # before anything was sent
                is_refused = True
                kept = Headers(raw=message["headers"]).get("x-request-id", "unknown")
                error.headers["X-Request-Id"] = kept
                await response(error)(scope, receive, send)

        await self._app(scope, watched, put)

    async def _send(
        self, head: Message, part: FileRange, send: Send, is_gone: Callable[[], bool]
    ) -> None:
        """Send head and file; the end of the body is the application's to send.

        Raises:
            ApiError: it can't be sent; nothing was.
        """
        if self._num_open >= _MOST_OPEN:
            raise overloaded(f"{_MOST_OPEN} files are being sent", retry_after_s=5)
        descriptor = part.open()
        self._num_open += 1
        try:
            await send(head)
            async for piece in part.pieces(descriptor):
                if is_gone():  # servers take what is sent to nobody without a word
                    return
                async with asyncio.timeout(_PATIENCE_S):
                    await send(piece)
        finally:
            self._num_open -= 1
            os.close(descriptor)
