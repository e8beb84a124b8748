"""A driver to be killed: a synthetic run on a Ray of its own."""

# Arguments: database, evaluations, seconds each.

from __future__ import annotations

import signal
import sys

from cluster.driver import RayBackend
from tests.cluster.synthetic import ARRAYS, Bowl, BowlConfig, DigestSearch
from unicuco.search.drive import drive
from unicuco.store import EvaluationStore


def main(path: str, num_evaluations: str, seconds: str) -> None:
    with EvaluationStore.open(path, create=True) as store:
        store.acquire_lease("driver")
        with RayBackend("local", 2, build_evaluator=Bowl, build_search=DigestSearch) as backend:
            search, pool = backend.start(BowlConfig(seconds=float(seconds)), ARRAYS, 4)
            drive(
                search,
                pool,
                store,
                num_evaluations=int(num_evaluations),
                on_progress=lambda progress: None,
            )


if __name__ == "__main__":
    # A shell starts what runs in the background with SIGINT ignored, and that is inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main(*sys.argv[1:])
