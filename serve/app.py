"""The Serve application: which deployments there are, and how they are bound together."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from ray import serve as ray_serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from serve.config import PruningOptions, ServeConfig
from serve.ingress import Ingress
from serve.models import bind_models
from serve.pruning import Pruning
from serve.strategies import Strategies
from serve.worker import CutterFactory, RunCutter

_REPORT_S: Final = 0.5  # how often a replica tells the queue's length; only the newest counts
_LOOK_BACK_S: Final = 5 * _REPORT_S
_DRAIN_S: Final = 30.0


def build_app(config: ServeConfig, *, build_cutter: CutterFactory | None = None) -> Application:
    """Return the application that a configuration describes.

    Args:
        config: travels whole to every replica.
        build_cutter: makes what cuts variants, in each pruning replica; none: a `RunCutter`.
    """
    if build_cutter is None:
        build_cutter = partial(RunCutter, check_latency=config.pruning.check_latency)
    handles = {
        "strategies": ray_serve.deployment(**_strategies(config))(Strategies).bind(config),
        "pruning": ray_serve.deployment(**_pruning(config))(Pruning).bind(config, build_cutter),
    }
    models = bind_models(config)
    if models is not None:
        handles["models"] = models
    ingress = ray_serve.deployment(**_ingress(config))(ray_serve.ingress()(Ingress))
    return ingress.bind(config, handles)


# Any: options as Serve takes them.
def _strategies(config: ServeConfig) -> dict[str, Any]:
    options = config.strategies
    return {
        "name": "strategies",
        "ray_actor_options": {"num_cpus": options.num_cpus},
        "max_ongoing_requests": 2 * options.max_batch,
        "max_queued_requests": config.bounds.max_in_flight,
        "autoscaling_config": AutoscalingConfig(
            min_replicas=1,
            max_replicas=options.max_replicas,
            target_ongoing_requests=options.max_batch,
            upscale_delay_s=2.0,
            downscale_delay_s=30.0,
        ),
        "graceful_shutdown_timeout_s": _DRAIN_S,
        "health_check_period_s": 5.0,
    }


def _pruning(config: ServeConfig) -> dict[str, Any]:
    options = config.pruning
    return {
        "name": "pruning",
        "ray_actor_options": {"num_cpus": options.num_cpus},
        "max_ongoing_requests": 100,  # who waits for a packing must not hold up a ping
        "autoscaling_config": _by_queue(options),
        "graceful_shutdown_timeout_s": _DRAIN_S,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": 5.0,
    }


def _by_queue(options: PruningOptions) -> AutoscalingConfig:
    policy = AutoscalingPolicy(  # type: ignore[no-untyped-call]  # Serve's
        policy_function="serve.scaling:QueuePolicy",
        policy_kwargs={"jobs_per_replica": options.jobs_per_replica},
    )
    return AutoscalingConfig(
        min_replicas=options.min_replicas,
        max_replicas=options.max_replicas,
        # Deprecated for variables of the environment, which Ray 2.60 defines and nowhere reads.
        metrics_interval_s=_REPORT_S,
        look_back_period_s=_LOOK_BACK_S,
        upscale_delay_s=0.0,
        downscale_delay_s=options.downscale_delay_s,
        policy=policy,
    )


def _ingress(config: ServeConfig) -> dict[str, Any]:
    return {
        "name": "ingress",
        "num_replicas": config.ingress_replicas,
        # The gate refuses with an envelope long before Serve would refuse without one.
        "max_ongoing_requests": 2 * config.bounds.max_in_flight,
        "max_queued_requests": 2 * config.bounds.max_in_flight,
        "ray_actor_options": {"num_cpus": 0.1},
        "graceful_shutdown_timeout_s": _DRAIN_S,
        "health_check_period_s": 5.0,
    }
