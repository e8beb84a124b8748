"""Whether coding pays: the time that a link saves against the time that decoding takes.

What it does not know: how long anything takes; the link is stated, decoding is measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from unicuco.errors import RequestError

_LEAST_SAVED: Final = 0.01  # of an entry's bytes; less is not worth anybody's decoding


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The way from the container to memory.

    ``mbps``: megabits per second, > 0, or none: only size counts. ``threads`` decode on the other
    side, >= 1.

    Raises:
        RequestError: a speed that is none.
    """

    mbps: float | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        if self.mbps is not None and not (math.isfinite(self.mbps) and self.mbps > 0):
            raise RequestError(f"the link's speed must be above 0 Mbit/s, got {self.mbps:g}")

    def pays(self, whole_bytes: int, coded_bytes: int, decode_s: float) -> bool:
        """Return whether an entry should travel coded.

        Args:
            whole_bytes: as it is.
            coded_bytes: coded.
            decode_s: processor seconds that decoding takes.
        """
        saved = whole_bytes - coded_bytes
        if saved < _LEAST_SAVED * whole_bytes or saved <= 0:
            return False
        if self.mbps is None:
            return True
        return 8e-6 * saved / self.mbps > decode_s / self.threads
