"""What an engine that streams offers, and what it is asked. What it does not know: vLLM, HTTP.

`TextEngine` answers one caller at a time and blocks; this one answers many at once on an event
loop, and says of every switch what it checked.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

from unicuco.errors import RequestError

CANARY_PROMPT: Final = "def main(argument):\n    import os\n    return"
CANARY_TOKENS: Final = 4  # that weights are right is not theirs to show: memory is compared
MOST_STOPS: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSampling:
    """How to continue a prompt.

    ``max_tokens``: new tokens at most, >= 1. ``temperature``: in [0, 100], 0 = greedy. ``top_p`` in
    (0, 1]. ``seed`` decides what is drawn at temperatures above 0, none draws anew. ``stop``: at
    most four non-empty texts, each of which ends the answer and is not part of it. Penalties lie in
    [-2, 2].

    Raises:
        RequestError: a value outside its range.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise RequestError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not 0 <= self.temperature <= 100:  # also refuses NaN
            raise RequestError(f"temperature must be in [0, 100], got {self.temperature:g}")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p must be in (0, 1], got {self.top_p:g}")
        if len(self.stop) > MOST_STOPS or not all(self.stop):
            raise RequestError(f"stop must be at most {MOST_STOPS} texts, none of them empty")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if not (math.isfinite(value) and -2 <= value <= 2):
                raise RequestError(f"{name} must be in [-2, 2], got {value:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """The next piece of one answer; the last piece has a ``finish_reason``: "stop" or "length"."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A model folder that was read and compared with its own digests.

    ``digest`` names its contents, so that two folders of one name are never taken for each other;
    ``context`` in tokens; ``num_bytes`` of its weight files.
    """

    path: Path
    digest: str
    context: int
    num_bytes: int


@runtime_checkable
class StreamingEngine(Protocol):
    """Serves one model folder at a time to many callers on one event loop."""

    name: str

    @property
    def alive(self) -> bool:
        """Whether something is loaded and its process runs."""
        ...

    @property
    def pid(self) -> int | None:
        """The id of its process, none without one."""
        ...

    async def serve(self, folder: Path) -> Checked:
        """Serve a folder, or the one that a container holds.

        It is switched to in place where shapes allow it, else loaded anew.
        Returns when the switch was checked; what runs is waited for, and what comes meanwhile
        waits.

        Raises:
            VariantError, ContainerError, EngineError: the folder itself is refused, nothing has
                changed, and `alive` says whether something is still served; or the switch failed,
                and then the engine is closed.
        """
        ...

    def generate(
        self, prompt: tuple[int, ...], sampling: StreamSampling
    ) -> AsyncGenerator[Delta, None]:
        """Continue one prompt of token ids; closing the iterator aborts the request.

        Raises:
            EngineError: nothing is loaded, or the engine died.
        """
        ...

    async def check_health(self) -> None:
        """Return when the engine can answer now.

        Raises:
            EngineError: it can't.
        """
        ...

    async def wait_dead(self) -> None:
        """Return when the engine's process is gone."""
        ...

    async def close(self) -> None:
        """Give back every process and byte; closing twice is allowed, and serving again too."""
        ...
