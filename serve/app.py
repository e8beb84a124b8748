"""The Serve application: which deployments there are, and how they are bound together."""

from __future__ import annotations

from ray import serve as ray_serve
from ray.serve import Application

from serve.config import ServeConfig
from serve.ingress import Ingress
from serve.models import bind_models
from serve.pruning import Pruning
from serve.strategies import Strategies


def build_app(config: ServeConfig) -> Application:
    """Return the application that a configuration describes.

    Args:
        config: travels whole to every replica.
    """
    strategies = ray_serve.deployment(
        name="strategies", ray_actor_options={"num_cpus": config.strategies.num_cpus}
    )(Strategies)
    pruning = ray_serve.deployment(
        name="pruning", ray_actor_options={"num_cpus": config.pruning.num_cpus}
    )(Pruning)
    handles = {"strategies": strategies.bind(config), "pruning": pruning.bind(config)}
    models = bind_models(config)
    if models is not None:
        handles["models"] = models
    ingress = ray_serve.deployment(
        name="ingress",
        num_replicas=config.ingress_replicas,
        max_ongoing_requests=2 * config.bounds.max_in_flight,
        ray_actor_options={"num_cpus": 0.1},
    )(ray_serve.ingress()(Ingress))
    return ingress.bind(config, handles)
