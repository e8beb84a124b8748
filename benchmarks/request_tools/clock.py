"""What the processes of `benchmarks.requests` measure; needs the standard library alone."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Clock:
    """Times learning and requests; made after everything was imported."""

    def __init__(self) -> None:
        self.learning_s = 0.0
        self.seconds: list[float] = []
        self.cpu_s: list[float] = []
        self.imported_bytes = _peak_bytes()

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Time what comes before the first request."""
        started = time.perf_counter()
        yield
        self.learning_s = time.perf_counter() - started

    @contextmanager
    def request(self) -> Iterator[None]:
        """Time one request."""
        started, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds.append(time.perf_counter() - started)
        self.cpu_s.append(time.process_time() - cpu)

    def report(self, path: Path) -> None:
        """Write what was measured."""
        path.write_text(json.dumps({**vars(self), "peak_bytes": _peak_bytes()}))


def _peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
