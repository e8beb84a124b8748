"""The deployment that answers requests with strategies; it holds every run, and no weights.

Calls that come within milliseconds are answered by one forward pass per run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from ray import serve as ray_serve

from serve.asks import Answer, Ask
from serve.catalogue import Catalogue
from serve.config import ServeConfig
from unicuco.errors import UnicucoError
from unicuco.pipeline import Run
from unicuco.types import Plan


class Strategies:
    """One replica; the runs are opened before it takes its first call.

    Args:
        config: of the service.
    """

    def __init__(self, config: ServeConfig) -> None:
        catalogue = Catalogue(config)
        self._runs = {
            run_id: Run.open(catalogue.run_folder(run_id)) for run_id in catalogue.run_ids
        }
        self._num_passes = 0
        for run in self._runs.values():  # the first plan of a process is slow
            run.planner.front(2)
        self.answer.set_max_batch_size(config.strategies.max_batch)  # type: ignore[attr-defined]
        self.answer.set_batch_wait_timeout_s(config.strategies.batch_wait_s)  # type: ignore[attr-defined]

    @ray_serve.batch
    async def answer(self, calls: list[Sequence[Ask]]) -> list[list[list[Answer]]]:
        """Answer every ask of every call, each request at its place."""
        asks = [ask for call in calls for ask in call]
        answers = iter(self.answer_all(asks))
        return [[next(answers) for _ in call] for call in calls]

    def answer_all(self, asks: Sequence[Ask]) -> list[list[Answer]]:
        """Answer asks with one pass per run."""
        found: dict[str, list[Answer]] = {}
        for run_id in {ask.run for ask in asks}:
            requests = [r for ask in asks if ask.run == run_id for r in ask.requests]
            self._num_passes += 1
            found[run_id] = [_written(answer) for answer in self._runs[run_id].plan(requests)]
        queues = {run_id: iter(answers) for run_id, answers in found.items()}
        return [[next(queues[ask.run]) for _ in ask.requests] for ask in asks]

    async def front(self, run_id: str) -> dict[str, object]:
        """Return a run's front, predicted and measured."""
        return self._runs[run_id].front_document()

    async def num_passes(self) -> int:
        """Return how many forward passes this replica has made."""
        return self._num_passes

    async def ping(self) -> bool:
        """Say that the runs are open."""
        return True


def _written(answer: Plan | UnicucoError) -> Answer:
    if isinstance(answer, UnicucoError):
        return answer
    return json.dumps(answer.to_dict(), separators=(",", ":"), allow_nan=False).encode()
