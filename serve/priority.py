"""Threads that step back for others. What it does not know: what they do."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Final

_NICENESS: Final = 19  # Ray's own processes have 15


def step_back() -> None:
    """Give the calling thread, and those that it starts, the least share of a busy processor.

    On Linux a priority is a thread's; elsewhere nothing happens.
    """
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
