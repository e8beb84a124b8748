"""`Pulse`: whether an actor that has long been at a call works at it, or hangs.

Beside the call the actor is asked now and then how much CPU time the call's thread has used. One
that works says more every time, on however busy a machine; one that is stopped, or waits for what
never comes, does not. It hangs when that has gone on for many times as long as such a call usually
takes as a whole, and for a minute at least. Looks are counted, not seconds, for while this process
is stopped itself it sees nothing. An actor that never answered has no node yet, and is waited for.

What this module does not know: what calls do, and what becomes of an actor that hangs.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, Final

_LEAST_STILL_S: Final = 60.0
_HUNG: Final = 16.0  # times what the call usually takes
_MORE_PATIENCE: Final = 4.0
_MEASURED: Final = 32  # the latest calls say what is usual
_LOOKS: Final = 20  # in the least time
_LEAST_WORK_S: Final = 0.001

Beat = Callable[[], Future[float]]


class GivenUpError(Exception):
    """A call is waited for no more: its actor hangs, or nobody wants the result."""


class Pulse:
    """Waits for calls of an actor and its successors, one at a time, and tells when one hangs.

    Args:
        least_still_s: for how long an actor must do nothing, at least.
    """

    def __init__(self, least_still_s: float = _LEAST_STILL_S) -> None:
        self._least_still_s = least_still_s
        self._look_s = least_still_s / _LOOKS
        self._patience = 1.0
        self._is_closed = False
        self._seconds: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_MEASURED))

    # Any: what the call returns; its caller knows.
    def wait(self, name: str, call: Future[Any], stillness: Stillness) -> None:
        """Return when a call is done, well or not.

        Args:
            name: of the method; calls of one name take about as long.
            call: what is waited for.
            stillness: of the actor.

        Raises:
            GivenUpError: the actor hangs, and the next one is given more time until a call is done
                again; or this was closed.
        """
        started = time.monotonic()
        while not wait([call], self._look_s).done:
            if self._is_closed:
                raise GivenUpError(name)
            if stillness.num_looks() * self._look_s > self.limit_s(name):
                self._patience *= _MORE_PATIENCE
                raise GivenUpError(name)
        self.finished(name, time.monotonic() - started)

    def close(self) -> None:
        """Wait for nothing any more."""
        self._is_closed = True

    def finished(self, name: str, seconds: float) -> None:
        """Note how long a call took."""
        self._seconds[name].append(seconds)
        self._patience = 1.0

    def limit_s(self, name: str) -> float:
        """Return for how long an actor may do nothing in a call."""
        usual_s = statistics.median(self._seconds[name]) if self._seconds[name] else 0.0
        return self._patience * max(self._least_still_s, _HUNG * usual_s)


class Stillness:
    """Counts the looks since an actor was last seen to work.

    Args:
        beat: asks it for the CPU seconds of the thread that its calls run in.
    """

    def __init__(self, beat: Beat) -> None:
        self._beat = beat
        self._answer: Future[float] | None = None
        self._worked_s: float | None = None  # none: it never answered
        self._num_still = 0

    def num_looks(self) -> int:
        """Look once more; return how many looks in a row saw nothing done."""
        if self._answer is None:
            self._answer = self._beat()
        if self._worked_s is not None:
            self._num_still += 1
        if self._answer.done():
            self._take(self._answer)
            self._answer = None
        return self._num_still

    def _take(self, answer: Future[float]) -> None:
        if answer.exception() is not None:
            return  # it died: so will the call
        if self._worked_s is None or answer.result() > self._worked_s + _LEAST_WORK_S:
            self._worked_s = answer.result()
            self._num_still = 0


def thread_clock() -> Callable[[], float]:
    """Return what says, in any thread, how many CPU seconds the calling thread has used.

    Where the system can't tell, those of the process: then one that hangs may be taken to work.
    """
    if sys.platform == "darwin":
        return time.process_time
    clock = time.pthread_getcpuclockid(threading.get_ident())
    return lambda: time.clock_gettime(clock)
