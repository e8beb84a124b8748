"""The service on a cluster that is there, in a process of its own, as ``unicuco serve`` runs it.

One pruning replica fits on the head beside the rest, and two on a node that is added.
"""

# Arguments: address of the cluster, run folder, data folder, port.

from __future__ import annotations

import sys

from cluster.local_ray import connect
from serve.config import EngineOptions, PruningOptions, ServeConfig, StrategyOptions
from serve.proxy import ENVIRONMENT
from serve.running import run_app
from tests.serve.cutters import NotingCutter


def main(address: str, run: str, data: str, port: str) -> None:
    """Serve until told to stop."""
    config = ServeConfig.of_runs(
        [run],
        data=data,
        port=int(port),
        strategies=StrategyOptions(max_replicas=1),
        pruning=PruningOptions(num_cpus=1.0, max_replicas=3, downscale_delay_s=3.0),
        engines=EngineOptions(max_engines=0),
    )
    connect(address=address, runtime_env={"env_vars": ENVIRONMENT})
    run_app(config, build_cutter=NotingCutter, on_ready=lambda url: print(url, flush=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
