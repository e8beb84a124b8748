"""The deployment that cuts variants: a `JobWorker` in one thread, a `Packer` in another.

The queue is the database, so nothing accepted is lost with a replica. Each replica reports the
queue's length, by which `serve.scaling` decides how many there are.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from concurrent.futures import Future, wait
from typing import Final

from serve.catalogue import Catalogue, ModelId
from serve.config import ServeConfig
from serve.packer import Packed, Packer
from serve.priority import step_back
from serve.scaling import QUEUE_METRIC, is_worth_warming
from serve.worker import Cutter, CutterFactory, JobWorker
from unicuco.errors import UnicucoError
from unicuco.store import JobStatus, JobStore

_LOG: Final = logging.getLogger("ray.serve")
_AFTER_TROUBLE_S: Final = 1.0
_WATCH_EVERY_S: Final = 0.5


class Pruning:
    """One replica. It is there at once, warms up, and takes jobs when it is warm.

    Warming up takes seconds of a core, several replicas do it at a time and just when there is most
    to do. So it is put off while the others get through the queue sooner than it would take, and
    then a thread of lower priority does it.

    Args:
        config: of the service.
        build_cutter: makes what cuts.
    """

    def __init__(self, config: ServeConfig, build_cutter: CutterFactory) -> None:
        self._config = config
        self._build_cutter = build_cutter
        self._catalogue = Catalogue(config)
        self._catalogue.make_folders()
        self._store = JobStore.open(config.jobs_location)
        self._packer = Packer(self._catalogue)
        self._stopping = threading.Event()
        self._cutter: Future[Cutter] = Future()
        threading.Thread(target=self._warm_up, name="unicuco-warming", daemon=True).start()
        self._thread = threading.Thread(target=self._work, name="unicuco-pruning", daemon=True)
        self._thread.start()

    async def drain(self) -> None:
        """Take no other job; return when the one at hand is finished."""
        self._stopping.set()
        await asyncio.to_thread(self._thread.join)

    def __del__(self) -> None:
        """Finish the job at hand and take no other: Serve calls this before it ends a replica."""
        self._stopping.set()
        self._packer.close()
        self._thread.join()
        self._store.close()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Report the queue's length; Serve asks."""
        return {QUEUE_METRIC: float(await asyncio.to_thread(self._store.num_active))}

    async def pack(self, variant: ModelId, link_mbps: float | None) -> Packed:
        """Return the file of a variant's packed form, or why there is none; see `Packer`."""
        return await self._packer.pack(variant, link_mbps)

    async def ping(self) -> bool:
        """Say whether jobs are taken."""
        return self._thread.is_alive()

    def check_health(self) -> None:
        """Raise if the worker has ended unasked; Serve then replaces this replica."""
        if not self._thread.is_alive() and not self._stopping.is_set():
            raise RuntimeError("the worker's thread has ended")

    def _work(self) -> None:
        while not self._stopping.is_set():
            if wait([self._cutter], timeout=self._config.pruning.poll_s).done:
                self._work_on(self._worker(self._cutter.result()))

    def _work_on(self, worker: JobWorker) -> None:
        while not self._stopping.is_set():
            try:
                if not worker.run_one():
                    self._stopping.wait(self._config.pruning.poll_s)
            except UnicucoError as error:  # the database is away: it comes back
                _LOG.warning("no jobs are taken: %s", error)
                self._stopping.wait(_AFTER_TROUBLE_S)

    def _warm_up(self) -> None:
        step_back()
        try:
            self._await_need()
            self._cutter.set_result(self._build_cutter(self._catalogue))
        except BaseException as error:
            self._cutter.set_exception(error)  # ends the worker; Serve then replaces the replica
            raise

    def _await_need(self) -> None:
        """Return when it is worth warming up, or when there is no more use in it."""
        began_s = idle_since_s = now_s = time.monotonic()
        finished_before: int | None = None
        while not self._stopping.is_set():
            try:
                counts = self._store.counts()
            except UnicucoError:  # the worker says so
                return
            num_running = counts[JobStatus.RUNNING]
            num_active = counts[JobStatus.QUEUED] + num_running
            num_finished = sum(counts.values()) - num_active
            finished_before = num_finished if finished_before is None else finished_before
            idle_since_s = idle_since_s if num_active == 0 else now_s
            if is_worth_warming(
                num_active,
                num_running,
                num_finished=num_finished - finished_before,
                seconds=now_s - began_s,
                idle_s=now_s - idle_since_s,
            ):
                return
            self._stopping.wait(_WATCH_EVERY_S)
            now_s = time.monotonic()

    def _worker(self, cutter: Cutter) -> JobWorker:
        return JobWorker(
            self._store,
            self._catalogue,
            cutter,
            self._config.pruning,
            owner="pruning",
        )
