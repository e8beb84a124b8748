"""The child's side of `unicuco.engines.child`: answers JSON lines until its input closes."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping

Handler = Callable[[Mapping[str, object]], Mapping[str, object]]


def serve_lines(handle: Handler) -> None:
    """Answer every line with ``handle``'s object, in order, and return when the input closes.

    Whatever a library prints on standard output goes to standard error, so answers stay clean. The
    input is read by a thread that ends the process as soon as the owner is gone, even in the middle
    of an import.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    questions: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(questions,), daemon=True).start()
    while True:
        answers.write(json.dumps(handle(json.loads(questions.get()))) + "\n")
        answers.flush()


def _read(questions: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        questions.put(line)
    # Not sys.exit: the main thread may be deep in native code and must not keep the process alive.
    os._exit(0)
