"""`RaySearch`: the search in the learner actor, as the loop sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import ray
from ray.exceptions import RayActorError, RayTaskError

from cluster.actors import Handle
from cluster.metrics import Meter, NoMeter
from unicuco.errors import ClusterError, UnicucoError
from unicuco.types import Ask, Outcome

_MAX_DEATHS: Final = 3


class RaySearch:
    """A `unicuco.search.drive.AskTell` that runs in an actor, started again when it dies.

    A new learner is told all rounds anew; since asks depend on nothing else, it goes on as the
    old one would have.

    Args:
        start_learner: starts a learner actor and returns its handle at once.
        meter: told what the search is told.
    """

    def __init__(self, start_learner: Callable[[], Handle], meter: Meter | None = None) -> None:
        self._start_learner = start_learner
        self._meter = meter or NoMeter()
        self._told: list[tuple[int, Sequence[tuple[Ask, Outcome]]]] = []
        self._learner = start_learner()
        self._is_lost = False
        self.round_size: int = self._call("start")

    def ask(self, round: int) -> list[Ask]:
        """Return the asks of a round."""
        asks: list[Ask] = self._call("ask", round)
        return asks

    def tell(self, round: int, results: Sequence[tuple[Ask, Outcome]]) -> None:
        """Take a whole round in ask order."""
        self._call("tell", round, results)
        self._told.append((round, results))
        self._meter.told(results)

    def close(self) -> None:
        """End the learner."""
        ray.kill(self._learner)

    # Any: what the actor's method takes and returns; the three methods above name the types.
    def _call(self, method: str, *args: Any) -> Any:
        for _ in range(_MAX_DEATHS):
            try:
                if self._is_lost:
                    self._replace()
                return _result(self._learner, method, args)
            except RayActorError:
                self._is_lost = True
        raise ClusterError(f"{_MAX_DEATHS} learners died: look for a lack of memory, then --resume")

    def _replace(self) -> None:
        ray.kill(self._learner)
        self._learner = self._start_learner()
        _result(self._learner, "start", ())
        for results in self._told:
            _result(self._learner, "tell", results)
        self._is_lost = False


# Any: as `RaySearch._call`
def _result(learner: Handle, method: str, args: tuple[Any, ...]) -> Any:
    try:
        return ray.get(getattr(learner, method).remote(*args))
    except RayTaskError as error:
        if isinstance(error.cause, UnicucoError):
            raise error.cause from None
        reason = " ".join(str(error.cause).split())[:300]
        raise ClusterError(f"the learner failed: {type(error.cause).__name__}: {reason}") from error
