"""What ``serve deploy ray_configs/serve.yaml`` builds.

Where the service listens is said in the file's ``http_options``; keys come from the environment of
the cluster, never from the file.
"""

import os

from pydantic import BaseModel, ConfigDict, Field
from ray.serve import Application

from serve.app import build_app
from serve.config import (
    KEYS_VARIABLE,
    EngineOptions,
    PruningOptions,
    ServeConfig,
    StrategyOptions,
)


class ServeArguments(BaseModel):
    """The ``args`` of the application in the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    runs: list[str] = Field(min_length=1)
    data: str
    store: str = ""
    ingress_replicas: int = Field(default=1, ge=1)
    pruning_replicas: int = Field(default=PruningOptions().max_replicas, ge=1)
    check_latency: bool = PruningOptions().check_latency
    strategy_replicas: int = Field(default=StrategyOptions().max_replicas, ge=1)
    engines: int = Field(default=EngineOptions().max_engines, ge=0)
    min_engines: int = Field(default=EngineOptions().min_engines, ge=0)
    engine_idle_stop_s: float = Field(default=EngineOptions().idle_stop_s, gt=0)
    engine_scratch: str = ""

    def to_domain(self) -> ServeConfig:
        """Return the configuration.

        Raises:
            RequestError: see `ServeConfig`.
        """
        return ServeConfig.of_runs(
            self.runs,
            data=self.data,
            store=self.store,
            api_keys=os.environ.get(KEYS_VARIABLE, ""),
            ingress_replicas=self.ingress_replicas,
            pruning=PruningOptions(
                max_replicas=self.pruning_replicas, check_latency=self.check_latency
            ),
            strategies=StrategyOptions(max_replicas=self.strategy_replicas),
            engines=EngineOptions(
                min_engines=self.min_engines,
                max_engines=self.engines,
                idle_stop_s=self.engine_idle_stop_s,
                scratch=self.engine_scratch,
            ),
        )


def build(args: ServeArguments) -> Application:
    """Return the application; without keys it answers callers on the same machine only."""
    return build_app(args.to_domain())
