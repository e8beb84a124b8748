"""`RaySearch`: the search in the learner actor, as the loop sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Final

import ray
from ray.exceptions import RayActorError, RayTaskError

from cluster.actors import BuildSearch, Handle, LearnerActor
from cluster.metrics import Meter, NoMeter
from cluster.pulse import GivenUpError, Pulse, Stillness
from unicuco.errors import ClusterError, UnicucoError
from unicuco.types import Ask, Outcome

_MAX_DEATHS: Final = 3
_THREADS: Final = 2  # of a learner: one for calls, one that says how its call goes


# Any: as `LearnerActor`; Ray's own types of options
def start_learner(build: BuildSearch, config: Any, **options: Any) -> Handle:
    """Start a learner actor that needs no CPU of its own, and return its handle at once."""
    actor = ray.remote(LearnerActor).options(num_cpus=0, max_concurrency=_THREADS, **options)
    return actor.remote(build, config)


class RaySearch:
    """A `unicuco.search.drive.AskTell` in an actor, started again when that dies or hangs.

    A new learner is told all rounds anew; since asks depend on nothing else, it goes on as the
    old one would have.

    Args:
        start: starts a learner as `start_learner` does.
        meter: told what the search is told.
        pulse: says when a learner hangs.
    """

    def __init__(
        self,
        start: Callable[[], Handle],
        meter: Meter | None = None,
        pulse: Pulse | None = None,
    ) -> None:
        self._start = start
        self._meter = meter or NoMeter()
        self._pulse = pulse or Pulse()
        self._told: list[tuple[int, Sequence[tuple[Ask, Outcome]]]] = []
        self._is_closed = False
        self._is_lost = False
        self._take(start())
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
        self._is_closed = True
        self._pulse.close()
        ray.kill(self._learner)

    # Any: what the actor's method takes and returns; the three methods above name the types.
    def _call(self, method: str, *args: Any) -> Any:
        for _ in range(_MAX_DEATHS):
            try:
                if self._is_lost:
                    self._replace()
                return self._result(method, args)
            except (RayActorError, GivenUpError):
                if self._is_closed:
                    raise ClusterError("learning was ended: go on with --resume") from None
                self._is_lost = True
        raise ClusterError(
            f"{_MAX_DEATHS} learners died or hung: look for a lack of memory, then --resume"
        )

    def _replace(self) -> None:
        ray.kill(self._learner)
        self._take(self._start())
        self._result("start", ())
        for results in self._told:
            self._result("tell", results)
        self._is_lost = False

    def _take(self, learner: Handle) -> None:
        def beat() -> Future[float]:
            future: Future[float] = learner.worked_s.remote().future()
            return future

        self._learner = learner
        self._stillness = Stillness(beat)

    # Any: as `_call`
    def _result(self, method: str, args: tuple[Any, ...]) -> Any:
        call: Future[Any] = getattr(self._learner, method).remote(*args).future()
        self._pulse.wait(method, call, self._stillness)
        try:
            return call.result()
        except RayTaskError as error:
            if isinstance(error.cause, UnicucoError):
                raise error.cause from None
            reason = " ".join(str(error.cause).split())[:300]
            raise ClusterError(
                f"the learner failed: {type(error.cause).__name__}: {reason}"
            ) from error
