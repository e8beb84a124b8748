"""The deployment that takes jobs and cuts variants: a `JobWorker` in a thread.

The queue is the database, so nothing accepted is lost with a replica. Each replica reports the
queue's length, by which `serve.scaling` decides how many there are.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Final

from serve.catalogue import Catalogue
from serve.config import ServeConfig
from serve.scaling import QUEUE_METRIC
from serve.worker import CutterFactory, JobWorker
from unicuco.errors import UnicucoError
from unicuco.store import JobStore

_LOG: Final = logging.getLogger("ray.serve")
_AFTER_TROUBLE_S: Final = 1.0


class Pruning:
    """One replica. The runs are opened by the first job, so a new replica is there at once.

    Args:
        config: of the service.
        build_cutter: makes what cuts; called in the worker's thread.
    """

    def __init__(self, config: ServeConfig, build_cutter: CutterFactory) -> None:
        self._config = config
        self._build_cutter = build_cutter
        self._catalogue = Catalogue(config)
        self._catalogue.make_folders()
        self._store = JobStore.open(config.jobs_location)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="unicuco-pruning", daemon=True)
        self._thread.start()

    def __del__(self) -> None:
        """Finish the job at hand and take no other: Serve calls this before it ends a replica."""
        self._stopping.set()
        self._thread.join()
        self._store.close()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Report the queue's length; Serve asks."""
        return {QUEUE_METRIC: float(await asyncio.to_thread(self._store.num_active))}

    async def ping(self) -> bool:
        """Say whether jobs are taken."""
        return self._thread.is_alive()

    def check_health(self) -> None:
        """Raise if the worker has ended; Serve then replaces this replica."""
        if not self._thread.is_alive():
            raise RuntimeError("the worker's thread has ended")

    def _work(self) -> None:
        worker: JobWorker | None = None
        while not self._stopping.is_set():
            try:
                if worker is None:
                    worker = self._worker()
                if not worker.run_one():
                    self._stopping.wait(self._config.pruning.poll_s)
            except UnicucoError as error:  # the database is away: it comes back
                _LOG.warning("no jobs are taken: %s", error)
                self._stopping.wait(_AFTER_TROUBLE_S)

    def _worker(self) -> JobWorker:
        return JobWorker(
            self._store,
            self._catalogue,
            self._build_cutter(self._catalogue),
            self._config.pruning,
            owner="pruning",
        )
