"""Level building by actors: every block goes to whichever actor is free.

An actor that dies is replaced and its block built again: what is finished of it stays. What this
module does not know: what a level is.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import ray
from ray.exceptions import RayActorError, RayTaskError

from cluster.actors import Handle
from unicuco.errors import ClusterError, UnicucoError

_MAX_DEATHS: Final = 3
_LOOK_S: Final = 5.0


class LevelCrew:
    """Actors that build blocks.

    Args:
        start_actor: starts one `cluster.actors.LevelActor` and returns its handle at once.
        num_actors: how many to hold at most.
        start_timeout_s: how long to wait while no actor at all has started.
    """

    def __init__(
        self, start_actor: Callable[[], Handle], num_actors: int, *, start_timeout_s: float = 600.0
    ) -> None:
        self._start_actor = start_actor
        self._num_actors = num_actors
        self._start_timeout_s = start_timeout_s
        # Any: Ray's object references, whose type depends on the connection.
        self._running: dict[Any, tuple[Handle, int | None]] = {}
        self._waiting: deque[int] = deque()
        self._has_started = False
        self._num_deaths = 0

    def build(self, blocks: Sequence[int], on_done: Callable[[int], None]) -> None:
        """Build blocks; ``on_done`` is told each that is finished.

        Raises:
            ClusterError: no actor can be started, or three died.
            UnicucoError: what a builder raised.
        """
        self._waiting = deque(blocks)
        try:
            for _ in range(min(self._num_actors, len(blocks))):
                self._add_actor()
            while self._running:
                self._settle(self._next(), on_done)
        finally:
            for handle, _ in self._running.values():
                ray.kill(handle)

    def _add_actor(self) -> None:
        handle = self._start_actor()
        self._running[handle.start.remote()] = (handle, None)

    # Any: as `_running`
    def _next(self) -> Any:
        deadline = time.monotonic() + self._start_timeout_s
        while True:
            done, _ = ray.wait(list(self._running), num_returns=1, timeout=_LOOK_S)
            if done:
                return done[0]
            if not self._has_started and time.monotonic() > deadline:
                raise ClusterError(
                    f"no builder of levels could be started in {self._start_timeout_s:.0f} s: the "
                    "cluster has no free CPU for one; free some, or add nodes"
                )

    # Any: as `_running`
    def _settle(self, ref: Any, on_done: Callable[[int], None]) -> None:
        handle, block = self._running.pop(ref)
        try:
            ray.get(ref)
        except RayActorError as error:
            self._replace(handle, block, error)
            return
        except RayTaskError as error:
            ray.kill(handle)
            if isinstance(error.cause, UnicucoError):
                raise error.cause from None
            reason = " ".join(str(error.cause).split())[:300]
            raise ClusterError(
                f"building levels failed: {type(error.cause).__name__}: {reason}"
            ) from error
        self._has_started = True
        if block is not None:
            on_done(block)
        if self._waiting:
            block = self._waiting.popleft()
            self._running[handle.build.remote(block)] = (handle, block)
        else:
            ray.kill(handle)

    def _replace(self, handle: Handle, block: int | None, error: RayActorError) -> None:
        ray.kill(handle)  # where it is merely out of reach
        self._num_deaths += 1
        if self._num_deaths >= _MAX_DEATHS:
            raise ClusterError(
                f"{_MAX_DEATHS} builders of levels died: look for a lack of memory, then --resume"
            ) from error
        if block is not None:
            self._waiting.appendleft(block)
        self._add_actor()
