"""A web server that serves ranges of a folder's files and notes who was given how many bytes."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil

_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


@dataclass
class RangeServer:
    """A running one.

    ``given`` are the bytes of each file's contents, by the process that asked. What tests change:
    ``has_ranges``, and ``spoil``, which takes a file's name and the bytes about to be sent.
    """

    folder: Path
    url: str = ""
    given: dict[int, Counter[str]] = field(default_factory=dict)
    has_ranges: bool = True
    spoil: Callable[[str, bytes], bytes] = lambda name, data: data

    def note(self, port: int, name: str, num_bytes: int) -> None:
        """Note what the process behind a port of this machine was given."""
        server = int(self.url.rpartition(":")[2])
        (pid,) = {
            connection.pid
            for connection in psutil.net_connections("tcp")
            if connection.pid
            and connection.raddr
            and (connection.laddr.port, connection.raddr.port) == (port, server)
        }
        self.given.setdefault(pid, Counter())[name] += num_bytes


@contextmanager
def range_server(folder: Path) -> Iterator[RangeServer]:
    """Serve a folder on a free port of this machine inside the block."""
    server = RangeServer(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

        def _answer(self, *, with_body: bool) -> None:
            path = server.folder / self.path.lstrip("/")
            if not path.is_file():
                self.send_error(404)
                return
            data = path.read_bytes()
            tag = f'"{path.stat().st_mtime_ns:x}"'
            asked = _RANGE.fullmatch(self.headers.get("Range", ""))
            if asked and server.has_ranges:
                first, last = map(int, asked.groups())
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
                data = data[first : last + 1]
            else:
                self.send_response(200)
            if with_body:
                data = server.spoil(path.name, data)
                server.note(self.client_address[1], path.name, len(data))
            self.send_header("ETag", tag)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if with_body:
                self.wfile.write(data)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        server.url = f"http://127.0.0.1:{http.server_address[1]}"
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()
