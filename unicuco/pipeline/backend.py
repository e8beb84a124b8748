"""Where learning runs: a backend makes the search and the pool of evaluators.

Here: this process, without Ray.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol, Self

from unicuco.evaluate import EvaluatorConfig, LocalEvaluator
from unicuco.evaluate.arrays import Arrays
from unicuco.evaluate.level_builder import LevelBuilder, LevelConfig
from unicuco.search import Search, SearchConfig, build_search
from unicuco.search.drive import AskTell, Pool, outcome_of
from unicuco.types import Ask, Outcome


class Backend(Protocol):
    """A place to learn, entered for the time of learning."""

    def __enter__(self) -> Self:
        """Start it."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop everything it started."""

    def start(
        self, evaluator: EvaluatorConfig, arrays: Arrays, search: SearchConfig
    ) -> tuple[AskTell, Pool]:
        """Return the search and the pool of evaluators."""

    def start_pool(self, evaluator: EvaluatorConfig, arrays: Arrays) -> Pool:
        """Return a pool of evaluators alone, for searches that run in the caller's process."""

    def build_levels(
        self,
        config: LevelConfig,
        arrays: Arrays,
        blocks: Sequence[int],
        on_done: Callable[[int], None],
    ) -> None:
        """Build the levels of blocks; ``on_done`` is told each one that is finished."""


class LocalBackend:
    """One evaluator and the search in this process."""

    def __enter__(self) -> Self:
        """Start nothing."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop nothing."""

    def start(
        self, evaluator: EvaluatorConfig, arrays: Arrays, search: SearchConfig
    ) -> tuple[Search, Pool]:
        """Return the search and a pool of one."""
        return build_search(search), self.start_pool(evaluator, arrays)

    def start_pool(self, evaluator: EvaluatorConfig, arrays: Arrays) -> Pool:
        """Return a pool of one."""
        return _LocalPool(LocalEvaluator.from_arrays(evaluator, arrays))

    def build_levels(
        self,
        config: LevelConfig,
        arrays: Arrays,
        blocks: Sequence[int],
        on_done: Callable[[int], None],
    ) -> None:
        """Build one block after the other."""
        builder = LevelBuilder.from_arrays(config, arrays)
        for block in blocks:
            builder.build(block)
            on_done(block)


class _LocalPool:
    """Evaluates in the thread that waits for outcomes."""

    max_pending = 1

    def __init__(self, evaluator: LocalEvaluator) -> None:
        self._evaluator = evaluator
        self._asks: queue.SimpleQueue[Ask] = queue.SimpleQueue()

    def submit(self, ask: Ask) -> None:
        self._asks.put(ask)

    def next_outcome(self) -> tuple[Ask, Outcome]:
        ask = self._asks.get()
        return ask, outcome_of(self._evaluator, ask)
