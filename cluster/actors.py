"""What runs in Ray's processes: evaluators, a search, a builder, a server. Plain classes.

They are wrapped elsewhere and only delegate. Construction stores, `start` builds, so that whatever
goes wrong in building reaches the driver as the exception it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import psutil
from numpy.typing import NDArray

from cluster.pulse import thread_clock
from unicuco.memory import free_bytes, give_back_freed
from unicuco.types import Ask, FailedEvaluation, Outcome

if TYPE_CHECKING:  # at run time the package of searches would load GPyTorch into every replica
    from unicuco.search.drive import AskTell, Evaluator
    from unicuco.shards.evaluator import Relay, StageEvaluator

Arrays = Mapping[str, NDArray[np.generic]]

# Any: a configuration goes from whoever starts an actor to the builder given beside it, unread.
BuildEvaluator = Callable[[Any, Arrays], "Evaluator"]
BuildStage = Callable[[Any, Arrays], "StageEvaluator"]
BuildSearch = Callable[[Any], "AskTell"]
# What goes from stage to stage; none: to the first one.
Message: TypeAlias = "Relay | Outcome | None"

# Any: Ray's own handle types lose what class the actor is of.
Handle = Any

# Memory is short where less is free than so many times what a process takes before it builds: the
# model comes to that, and other replicas are beside it.
_ROOM: Final = 4


class EvaluatorActor:
    """One replica: judges one ask at a time on its own copy of the model.

    Args:
        build: makes the evaluator; runs here.
        config: the builder's configuration.
        arrays: weights, ranks, text: read-only views of the node's shared memory.
    """

    # Any: as `BuildEvaluator`
    def __init__(self, build: BuildEvaluator, config: Any, arrays: Arrays) -> None:
        self._build = build
        self._config = config
        self._arrays = arrays

    def start(self) -> None:
        """Build the evaluator."""
        _be_thrifty_where_memory_is_short()
        self._evaluator = self._build(self._config, self._arrays)

    def evaluate(self, ask: Ask) -> Outcome:
        """Judge a strategy; a failure is a value."""
        started = time.perf_counter()
        try:
            return self._evaluator.evaluate(
                ask.strategy, tokens=ask.tokens, derivatives=ask.derivatives
            )
        except Exception as error:  # whatever one strategy breaks, the others go on
            wall_s = time.perf_counter() - started
            return FailedEvaluation.from_error(ask.strategy.key, error, wall_s=wall_s)


class ShardActor:
    """One stage of a replica whose model is spread over several actors.

    Args:
        build: makes the stage; runs here.
        config: the builder's configuration.
        arrays: drop order and text: read-only views of the node's shared memory.
    """

    # Any: as `BuildEvaluator`
    def __init__(self, build: BuildStage, config: Any, arrays: Arrays) -> None:
        self._build = build
        self._config = config
        self._arrays = arrays

    def start(self) -> None:
        """Build the stage."""
        _be_thrifty_where_memory_is_short()
        self._stage = self._build(self._config, self._arrays)

    def confirm(self, *started: None) -> None:
        """Return when all stages have started: their own calls are what this one waits for."""

    def forward(self, ask: Ask, message: Message) -> Message:
        """Take a strategy forward."""
        return self._passed(self._stage.forward, ask, message)

    def backward(self, ask: Ask, message: Message) -> Message:
        """Take a strategy back."""
        return self._passed(self._stage.backward, ask, message)

    def _passed(self, step: Callable[[Ask, Any], Message], ask: Ask, message: Message) -> Message:
        """Make a step; a failure is a value, and what was one before stays it."""
        if isinstance(message, FailedEvaluation):
            self._stage.forget(ask)
            return message
        started = time.perf_counter()
        try:
            return step(ask, message)
        except Exception as error:  # whatever one strategy breaks, the others go on
            self._stage.forget(ask)
            wall_s = time.perf_counter() - started
            return FailedEvaluation.from_error(ask.strategy.key, error, wall_s=wall_s)


class LearnerActor:
    """Owns the search with its surrogate and network.

    Args:
        build: makes the search; runs here.
        config: the builder's configuration.
    """

    # Any: as `BuildSearch`
    def __init__(self, build: BuildSearch, config: Any) -> None:
        self._build = build
        self._config = config
        self._clock = thread_clock()

    def start(self) -> int:
        """Build the search and return its round size."""
        self._clock = thread_clock()
        self._search = self._build(self._config)
        return self._search.round_size

    def ask(self, round: int) -> list[Ask]:
        """Return the asks of a round."""
        self._clock = thread_clock()
        return self._search.ask(round)

    def tell(self, round: int, results: Sequence[tuple[Ask, Outcome]]) -> None:
        """Take a whole round in ask order."""
        self._clock = thread_clock()
        self._search.tell(round, results)

    def worked_s(self) -> float:
        """Return the CPU seconds used by the thread of the present call; beside that call."""
        return self._clock()


class LevelActor:
    """Builds the levels of blocks, one at a time, on its own copy of the model.

    Args:
        config: of `unicuco.evaluate.level_builder.LevelBuilder`.
        arrays: weights and calibration text: read-only views of the node's shared memory.
    """

    # Any: the core object's own type, imported only where it runs.
    def __init__(self, config: Any, arrays: Arrays) -> None:
        self._config = config
        self._arrays = arrays

    def start(self) -> None:
        """Build the builder."""
        from unicuco.evaluate.level_builder import LevelBuilder

        self._builder = LevelBuilder.from_arrays(self._config, self._arrays)

    def build(self, block: int) -> None:
        """Build the levels of one block."""
        self._builder.build(block)


class RangeServer:
    """Reads ranges of some files.

    Args:
        folder: of the files.
        names: of those that may be read.
    """

    def __init__(self, folder: str, names: Sequence[str]) -> None:
        self._paths = {name: Path(folder) / name for name in names}

    def num_bytes(self, name: str) -> int:
        """Return a file's size; -1 where it is not to be read."""
        path = self._paths[name]
        try:
            with path.open("rb") as stream:
                return stream.seek(0, 2)
        except OSError:
            return -1

    def read(self, name: str, begin: int, count: int) -> NDArray[np.uint8]:
        """Return so many bytes of a file, fewer where it ends before."""
        return np.fromfile(self._paths[name], dtype=np.uint8, count=count, offset=begin)


def _be_thrifty_where_memory_is_short() -> None:
    """Give freed tensors back to the system where this process could hardly grow.

    That takes page faults, an eighth of the time of an evaluation without derivatives.
    """
    if free_bytes() < _ROOM * psutil.Process().memory_info().rss:
        give_back_freed()


# Any: the builders' own types, imported only where they run.
def build_local_evaluator(config: Any, arrays: Arrays) -> Evaluator:
    """Build the evaluator that also runs without Ray."""
    from unicuco.evaluate import LocalEvaluator

    return LocalEvaluator.from_arrays(config, arrays)


def build_stage(config: Any, arrays: Arrays) -> StageEvaluator:
    """Build one stage of a sharded evaluator."""
    from unicuco.shards.evaluator import StageEvaluator

    return StageEvaluator(config, arrays)


def build_configured_search(config: Any) -> AskTell:
    """Build the search that a `SearchConfig` describes."""
    from unicuco.search import build_search

    # Optimisers import it at their first step, for seconds in which replicas would have to wait;
    # now they are starting themselves.
    import_module("torch._dynamo")
    return build_search(config)
