"""`Lateness`: how long evaluations usually take, when one is late, and when its replica hangs.

What is late is given to another replica too, which costs one evaluation and is done early. A
replica that has had one for much longer is given up, which costs a start; so what all replicas are
slow at, for whatever reason, is waited for longer every time. What this module does not know:
replicas, and what else becomes of them.
"""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from typing import Final

from unicuco.types import Ask

_LATE: Final = 4.0  # times the usual
_HUNG: Final = 16.0
# Short evaluations vary by more than their length on a machine that does something else too.
_LEAST_LATE_S: Final = 3.0
_LEAST_HUNG_S: Final = 15.0
_MORE_PATIENCE: Final = 4.0
_MEASURED: Final = 32  # the latest ones say what is usual

# What evaluations of one length have in common.
_Kind = tuple[int | None, bool]


class Lateness:
    """Learns from what finishes; until something of a kind has, nothing of it is late."""

    def __init__(self) -> None:
        self._seconds: defaultdict[_Kind, deque[float]] = defaultdict(
            lambda: deque(maxlen=_MEASURED)
        )
        self._patience = 1.0

    def finished(self, ask: Ask, seconds: float) -> None:
        """Note how long an ask was out."""
        self._seconds[_kind(ask)].append(seconds)
        self._patience = 1.0

    def gave_up(self) -> None:
        """Wait longer next time, unless something finishes before."""
        self._patience *= _MORE_PATIENCE

    def is_late(self, ask: Ask, seconds: float) -> bool:
        """Say whether an ask that has been out for so long deserves a second replica."""
        return seconds > max(_LEAST_LATE_S, _LATE * self._usual(ask))

    def is_hung(self, ask: Ask, seconds: float) -> bool:
        """Say whether whoever has had an ask for so long hangs."""
        return seconds > self._patience * max(_LEAST_HUNG_S, _HUNG * self._usual(ask))

    def _usual(self, ask: Ask) -> float:
        measured = self._seconds.get(_kind(ask))
        return statistics.median(measured) if measured else float("inf")


def _kind(ask: Ask) -> _Kind:
    return ask.tokens, ask.derivatives
