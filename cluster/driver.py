"""`RayBackend`: evaluators and search as Ray actors, for `unicuco.pipeline.learn`.

The model's arrays are put into Ray's shared memory once; every node gets them once, and its
replicas read them in place. With shards a replica is a pipeline of actors in a placement group of
its own, which keeps them together where that goes; each is given the drop order of its own blocks
and reads its own weights from the model's folder or URL, or by ranges from the driver's node where
it does not see that folder. What this module does not know: what is learned, and where it is
recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.actors import (
    Arrays,
    BuildEvaluator,
    BuildSearch,
    BuildStage,
    EvaluatorActor,
    Handle,
    LevelActor,
    ShardActor,
    build_configured_search,
    build_local_evaluator,
    build_stage,
)
from cluster.head import CLIENT, HeadWatch
from cluster.learner import RaySearch, start_learner
from cluster.level_crew import LevelCrew
from cluster.local_ray import connected, named_address
from cluster.metrics import RayMeter
from cluster.pool import RayPool
from cluster.replicas import ActorReplica, PipelineReplica, Replica
from cluster.room import (
    Share,
    gpu_share,
    largest_memory_bytes,
    num_gpus,
    too_large,
    torch_knows_gpus,
)
from cluster.versions import SameVersions
from unicuco.errors import RequestError

if TYPE_CHECKING:
    from unicuco.evaluate import EvaluatorConfig
    from unicuco.models.weights import WeightSource


class RayBackend:
    """Evaluates on a Ray cluster. A context manager; leaving it ends all that it started.

    Args:
        address: "local" starts a Ray of one's own on this machine; "auto" joins the one that runs
            here or that RAY_ADDRESS names; "ray://HOST:10001" a remote one. A process that is
            connected already keeps its connection.
        replicas: evaluators; each holds a copy of the model. More than there are cores share them.
        threads: of each replica, or of each of its shards.
        shards: actors that a replica's model is spread over.
        gpus: of each replica, or of each of its shards: 0 none, up to 1 that much of one; none
            asks for what there is when it starts, shared by all. On GPUs weights are cut and
            blocks computed in bfloat16 (`unicuco.evaluate.device`).
        build_evaluator: makes a replica's evaluator from what `start` is given; must pickle.
        build_search: makes the search likewise.
        build_stage: makes a shard's stage from its `StageConfig` and arrays likewise.

    Raises:
        RequestError: replicas, threads or shards below 1, or GPUs not from 0 to 1.
    """

    def __init__(
        self,
        address: str = "local",
        replicas: int = 1,
        threads: int = 1,
        shards: int = 1,
        *,
        gpus: float | None = None,
        build_evaluator: BuildEvaluator = build_local_evaluator,
        build_search: BuildSearch = build_configured_search,
        build_stage: BuildStage = build_stage,
    ) -> None:
        for name, value in (("replicas", replicas), ("threads", threads), ("shards", shards)):
            if value < 1:
                raise RequestError(f"{name} must be at least 1, got {value}")
        if not 0 <= (gpus or 0) <= 1:
            raise RequestError(f"gpus must lie from 0 to 1, of every replica or shard, got {gpus}")
        self._address = address
        self._replicas = replicas
        self._threads = threads
        self._shards = shards
        self._gpus = gpus
        self._build_stage = SameVersions(build_stage)
        self._build_evaluator = SameVersions(build_evaluator)
        self._build_search = SameVersions(build_search)
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
            RequestError: GPUs are asked for that torch or this machine does not have.
        """
        pool = self.start_pool(evaluator, arrays)

        def start() -> Handle:
            return start_learner(self._build_search, search, runtime_env=self._environment())

        learner = RaySearch(start, self._meter)
        self._stack.callback(learner.close)
        return learner, pool

    # Any: as `start`
    def start_pool(self, evaluator: Any, arrays: Arrays) -> RayPool:
        """Do what `start` does without a learner, for searches that run in the caller's process.

        Raises:
            ClusterError: no Ray can be reached or started.
            RequestError: as `start`.
        """
        if self._shards > 1:
            start_replica = self._pipelines(evaluator, arrays)
        else:
            start_replica = self._actors(evaluator, arrays)
        self._meter = RayMeter()
        self._stack.callback(self._meter.close)
        pool = RayPool(
            start_replica,
            self._replicas,
            gives_back=self._address != "local",
            too_large=self._too_large,
            meter=self._meter,
        )
        self._stack.callback(pool.close)
        return pool

    # Any: as `start`
    def _actors(self, evaluator: Any, arrays: Arrays) -> Callable[[], Replica]:
        """Return what starts a replica of one actor."""
        self._connect(sum(array.nbytes for array in arrays.values()))
        shared = ray.put(dict(arrays))
        share = self._take_share()
        config = _placed(evaluator, share)
        # Memory bandwidth is shared by those on one node, and a node that dies takes all of them.
        actor = ray.remote(EvaluatorActor).options(
            num_cpus=share.cpus,
            num_gpus=share.gpus,
            runtime_env=self._environment(),
            scheduling_strategy="SPREAD",
        )
        return lambda: ActorReplica(actor.remote(self._build_evaluator, config, shared))

    def _pipelines(self, evaluator: EvaluatorConfig, arrays: Arrays) -> Callable[[], Replica]:
        """Return what starts a replica of several actors."""
        from unicuco.shards import evaluator as sharding
        from unicuco.shards.plan import plan_shards
        from unicuco.shards.timing import measured_costs

        # Several strategies are under way in each pipeline, and every stage keeps what it received
        # of each, a message about all tokens, until the way back.
        num_messages = self._replicas * (self._shards + 1) ** 2
        under_way = num_messages * sharding.relay_bytes(evaluator, arrays)
        self._connect(under_way + sum(array.nbytes for array in arrays.values()))
        costs = measured_costs(evaluator, context=arrays["text/ids"].shape[1])
        plan = plan_shards(costs, self._shards, memory_bytes=largest_memory_bytes())
        weights = self._reachable(evaluator.weights)
        share, environment = self._take_share(), self._environment()
        placed = _placed(replace(evaluator, weights=weights), share)
        configs = sharding.stage_configs(placed, plan)
        parts = [sharding.stage_arrays(config, arrays) for config in configs]
        shared = [ray.put(dict(part)) for part in parts]
        options = {
            "num_cpus": share.cpus,
            "num_gpus": share.gpus,
            "runtime_env": environment,
            "allow_out_of_order_execution": True,
        }

        def start_pipeline() -> Replica:
            group, places = self._group(share)
            handles = [
                ray.remote(ShardActor)
                .options(**options, **place)
                .remote(self._build_stage, config, own)
                for place, config, own in zip(places, configs, shared, strict=True)
            ]
            return PipelineReplica(handles, group)

        return start_pipeline

    def _reachable(self, weights: WeightSource | None) -> WeightSource | None:
        """Return a source that every node can read: a folder may be this node's alone."""
        from cluster.weights import NodeSource, start_range_server
        from unicuco.models.weights import FolderSource

        if self._address == "local" or not isinstance(weights, FolderSource):
            return weights
        server = start_range_server(weights, self._environment())
        self._stack.callback(ray.kill, server)
        return NodeSource(weights, server)

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
        actor = ray.remote(LevelActor).options(
            num_cpus=self._cpu_share(), runtime_env=self._environment()
        )

        def start_actor() -> Handle:
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
        joins = self._address != "local" and not ray.is_initialized()
        self._stack.enter_context(connected(self._address, array_bytes))
        if joins:
            address = named_address(self._address)
            is_outside = address.startswith(CLIENT)
            watch = HeadWatch(address if is_outside else ray.get_runtime_context().gcs_address)
            self._stack.callback(watch.stop)

    def _cpu_share(self) -> float:
        """Return the CPUs that each replica, or each of its shards, asks of Ray.

        On a cluster too small for all replicas the rest join when there is room, perhaps on nodes
        that come because they are wanted; on this machine nothing will come, so they share.
        """
        if self._address != "local":
            return float(self._threads)
        # What others of this process' replicas hold is not there; none left: all start regardless.
        free = ray.available_resources().get("CPU", 0.0)  # type: ignore[no-untyped-call]
        return min(float(self._threads), cpu_share(free, self._replicas * self._shards))

    def _take_share(self) -> Share:
        """Decide what each replica, or each of its shards, asks of Ray from now on.

        Raises:
            RequestError: GPUs that torch or this machine does not have.
        """
        actors = self._replicas * self._shards
        gpus = self._gpus
        if gpus and not torch_knows_gpus():
            raise RequestError(
                "this torch is built for CPUs alone: install one with CUDA on every node, or leave "
                "gpus out"
            )
        if gpus is None:
            gpus = gpu_share(num_gpus(), actors) if torch_knows_gpus() else 0.0
        elif self._address == "local" and gpus > gpu_share(num_gpus(), actors):
            raise RequestError(
                f"{actors} times {gpus:g} GPU have no room on the {num_gpus():g} GPUs of this "
                "machine: ask for less, or leave gpus out"
            )
        self._asked = Share(self._cpu_share(), gpus)
        return self._asked

    def _too_large(self) -> str | None:
        """Say in a line why no replica can ever start; none: one can."""
        if self._address == "local":
            return None  # they share what there is
        return too_large(self._asked, self._shards)

    # Any: Ray's types of groups and of what actors may be started with.
    def _group(self, share: Share) -> tuple[Any, list[dict[str, Any]]]:
        """Return a group for one pipeline, and each shard's place in it; this machine needs none.

        Ray keeps a group on one node where it fits on one, and spreads it where it does not.
        """
        if self._address == "local":
            return None, [{}] * self._shards
        group = placement_group([share.resources] * self._shards, strategy="PACK")
        numbers = range(self._shards)
        places = [PlacementGroupSchedulingStrategy(group, number) for number in numbers]
        return group, [{"scheduling_strategy": place} for place in places]

    def _environment(self) -> dict[str, dict[str, str]]:
        return {"env_vars": _process_settings(self._threads)}


# Any: as `RayBackend.start`; where there are GPUs it is an `EvaluatorConfig`.
def _placed(evaluator: Any, share: Share) -> Any:
    """Return an evaluator's configuration for where such a share is."""
    if not share.gpus:
        return evaluator
    from unicuco.evaluate.device import on_gpu

    return on_gpu(evaluator)


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
        # 50 to 100 MB less for the reference model, at the same speed.
        "MALLOC_ARENA_MAX": "1",
    }
