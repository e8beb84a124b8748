"""`RayBackend`: evaluators and search as Ray actors, for `unicuco.pipeline.learn`.

The model's arrays are put into Ray's shared memory once; every node gets them once, and its
replicas read them in place. What this module does not know: what is learned, and where it is
recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import ray

from cluster.actors import (
    Arrays,
    BuildEvaluator,
    BuildSearch,
    EvaluatorActor,
    Handle,
    LearnerActor,
    LevelActor,
    build_configured_search,
    build_local_evaluator,
)
from cluster.learner import RaySearch
from cluster.level_crew import LevelCrew
from cluster.local_ray import connect, local_ray
from cluster.pool import RayPool
from unicuco.errors import RequestError


class RayBackend:
    """Evaluates on a Ray cluster. A context manager; leaving it ends all that it started.

    Args:
        address: "local" starts a Ray of one's own on this machine; "auto" joins the one that runs
            here or that RAY_ADDRESS names; "ray://HOST:10001" a remote one. A process that is
            connected already keeps its connection.
        replicas: evaluators; each holds a copy of the model. More than there are cores share them.
        threads: of each replica.
        build_evaluator: makes a replica's evaluator from what `start` is given; must pickle.
        build_search: makes the search likewise.

    Raises:
        RequestError: replicas or threads below 1.
    """

    def __init__(
        self,
        address: str = "local",
        replicas: int = 1,
        threads: int = 1,
        *,
        build_evaluator: BuildEvaluator = build_local_evaluator,
        build_search: BuildSearch = build_configured_search,
    ) -> None:
        for name, value in (("replicas", replicas), ("threads", threads)):
            if value < 1:
                raise RequestError(f"{name} must be at least 1, got {value}")
        self._address = address
        self._replicas = replicas
        self._threads = threads
        self._build_evaluator = build_evaluator
        self._build_search = build_search
        self._stack = ExitStack()

    # Any: both configurations go to the builders unread.
    def start(self, evaluator: Any, arrays: Arrays, search: Any) -> tuple[RaySearch, RayPool]:
        """Connect, share the arrays, and start the actors; replicas go on starting meanwhile.

        Args:
            evaluator: the evaluators' configuration, small.
            arrays: weights, ranks and text, by name.
            search: the search's configuration, small.

        Raises:
            ClusterError: no Ray can be reached or started, or the learner can't be placed.
        """
        pool = self.start_pool(evaluator, arrays)

        def start_learner() -> Handle:
            environment = {"env_vars": _process_settings(self._threads)}
            actor = ray.remote(LearnerActor).options(num_cpus=0, runtime_env=environment)
            return actor.remote(self._build_search, search)

        learner = RaySearch(start_learner)
        self._stack.callback(learner.close)
        return learner, pool

    # Any: as `start`
    def start_pool(self, evaluator: Any, arrays: Arrays) -> RayPool:
        """Do what `start` does without a learner, for searches that run in the caller's process.

        Raises:
            ClusterError: no Ray can be reached or started.
        """
        self._connect(sum(array.nbytes for array in arrays.values()))
        shared = ray.put(dict(arrays))
        share = self._cpu_share()

        def start_replica() -> Handle:
            actor = ray.remote(EvaluatorActor).options(num_cpus=share, runtime_env=environment)
            return actor.remote(self._build_evaluator, evaluator, shared)

        environment = {"env_vars": _process_settings(self._threads)}
        pool = RayPool(start_replica, self._replicas)
        self._stack.callback(pool.close)
        return pool

    # Any: as `start`
    def build_levels(
        self, config: Any, arrays: Arrays, blocks: Sequence[int], on_done: Callable[[int], None]
    ) -> None:
        """Build the levels of blocks, as many at a time as there are replicas.

        Args:
            config: the builders' configuration, small.
            arrays: weights and calibration text, by name; every node gets them once.
            blocks: which.
            on_done: told of each that is finished.

        Raises:
            ClusterError: no Ray can be reached or started, no actor placed, or three died.
            UnicucoError: what a builder raised.
        """
        # A Ray of one's own has its size from the start: the evaluators' arrays, larger by the drop
        # order and the dense predictions, come into the same.
        self._connect(2 * sum(array.nbytes for array in arrays.values()))
        shared = ray.put(dict(arrays))
        share = self._cpu_share()
        environment = {"env_vars": _process_settings(self._threads)}

        def start_actor() -> Handle:
            actor = ray.remote(LevelActor).options(num_cpus=share, runtime_env=environment)
            return actor.remote(config, shared)

        LevelCrew(start_actor, self._replicas).build(blocks, on_done)

    def close(self) -> None:
        """End the actors, and Ray if it was started here."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _connect(self, array_bytes: int) -> None:
        if ray.is_initialized():
            return
        if self._address == "local":
            self._stack.enter_context(local_ray(array_bytes))
        else:
            connect(address=self._address)
            self._stack.callback(ray.shutdown)

    def _cpu_share(self) -> float:
        """Return the CPUs that each replica asks of Ray.

        On a cluster too small for all replicas the rest join when there is room, perhaps on nodes
        that come because they are wanted; on this machine nothing will come, so they share.
        """
        if self._address != "local":
            return float(self._threads)
        # What others of this process' replicas hold is not there; none left: all start regardless.
        free = ray.available_resources().get("CPU", 0.0)  # type: ignore[no-untyped-call]
        return min(float(self._threads), cpu_share(free, self._replicas))


def cpu_share(cpus: float, replicas: int) -> float:
    """Return the largest share of a node's ``cpus`` that all ``replicas`` can have, in 1/1000."""
    share = math.floor(1000 * cpus / replicas) / 1000
    # Above one Ray takes whole CPUs only.
    return float(math.floor(share)) if share >= 1 else share


def _process_settings(threads: int) -> dict[str, str]:
    return {
        # Spinning threads of several processes on few cores stand in each other's way.
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
        "TOKENIZERS_PARALLELISM": "false",
        # Activations of a backward pass go back to the system: 60 MB less for the reference model,
        # at the same speed.
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(16 << 20),
    }
