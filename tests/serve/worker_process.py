"""A worker in a process of its own, to be stopped and killed: writes, tells so, waits, commits.

It waits for a line on its standard input.
"""

# Arguments: run folder, data folder, lease in seconds.

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from serve.catalogue import Catalogue
from serve.config import PruningOptions, ServeConfig
from serve.worker import JobWorker, RunCutter
from unicuco.store import JobStore
from unicuco.types import Request


class Pausing(RunCutter):
    """Cuts, tells so on stdout, and waits to be told to go on."""

    def cut(self, run_id: str, request: Request, out: Path) -> Mapping[str, object]:
        """Cut, and wait for a line."""
        document = super().cut(run_id, request, out)
        print("written", flush=True)
        sys.stdin.readline()
        return document


def main(run: str, data: str, lease_s: str) -> None:
    """Do one job."""
    config = ServeConfig.of_runs([run], data=data)
    catalogue = Catalogue(config)
    options = replace(PruningOptions(), lease_s=float(lease_s))
    with JobStore.open(config.jobs_location) as store:
        worker = JobWorker(store, catalogue, Pausing(catalogue), options, owner="other")
        worker.run_one()
    print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
