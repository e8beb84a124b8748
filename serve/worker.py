"""`JobWorker`: takes one job after the other, cuts its variant, commits it, publishes it.

The variant is written under a staging name that holds job and token, so two workers never write to
one place; it is committed under the token, and only then renamed to where it is seen. A worker may
be killed at any point: what was not committed is cut again by another, what was is published by
whoever takes the job next. What this module does not know: Ray and HTTP.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from serve.catalogue import Catalogue, ModelId, UnknownModelError
from serve.config import PruningOptions
from unicuco.errors import InfeasibleRequestError, RequestError, StorageError, UnicucoError
from unicuco.files import alone_in
from unicuco.store import Claim, JobFailure, JobStore, LeaseState
from unicuco.types import Plan, Request, Target

if TYPE_CHECKING:  # at run time only where something is cut
    from unicuco.pipeline import Run

_LOG: Final = logging.getLogger("ray.serve")


class Cutter(Protocol):
    """Makes a variant."""

    def cut(self, run_id: str, request: Request, out: Path) -> Mapping[str, object]:
        """Write the variant to ``out`` and return its plan document.

        Raises:
            UnicucoError: it can't be made; nothing is left at ``out``.
        """
        ...


CutterFactory = Callable[[Catalogue], Cutter]


class RunCutter:
    """Cuts from runs that are opened once and kept, with their base's files and rank stores.

    Args:
        catalogue: where the runs are.
        check_latency: time what was asked for by its latency, see `PruningOptions`.
    """

    def __init__(self, catalogue: Catalogue, *, check_latency: bool = True) -> None:
        self._catalogue = catalogue
        self._check_latency = check_latency
        self._runs: dict[str, Run] = {}
        for run_id in catalogue.run_ids:
            with contextlib.suppress(UnicucoError):  # told to whoever asks for a cut of it
                run = self._opened(run_id)
                _ = run.ranks, run.base_folder

    def cut(self, run_id: str, request: Request, out: Path) -> Mapping[str, object]:
        """Cut exactly what ``unicuco prune`` cuts, and time what it times."""
        from unicuco.pipeline import prune

        run = self._opened(run_id)
        plan = prune(run, request, out)
        if self._check_latency and request.target is Target.MAX_LATENCY_MS:
            return {**plan.to_dict(), "measured": {"latency": _latency(run, plan, out)}}
        return plan.to_dict()

    def _opened(self, run_id: str) -> Run:
        from unicuco.pipeline import Run

        folder = self._catalogue.run_folder(run_id)
        if run_id not in self._runs:
            self._runs[run_id] = Run.open(folder)
        return self._runs[run_id]


def _latency(run: Run, plan: Plan, variant: Path) -> dict[str, object]:
    """Time a variant beside its base, one at a time of all that are staged; or say why not."""
    from unicuco.pipeline import check_cut

    try:
        with alone_in(variant.parent):
            check = check_cut(run, plan, variant)
    except UnicucoError as error:  # the variant is there all the same
        return {"error": str(error)}
    assert check is not None, "of a request of latency"
    return {**check.to_dict()}


class JobWorker:
    """Works on jobs, one at a time.

    Args:
        store: where the jobs are.
        catalogue: where variants go.
        cutter: makes them.
        options: lease and attempts.
        owner: what the worker calls itself in the store.
    """

    def __init__(
        self,
        store: JobStore,
        catalogue: Catalogue,
        cutter: Cutter,
        options: PruningOptions,
        *,
        owner: str,
    ) -> None:
        self._store = store
        self._catalogue = catalogue
        self._cutter = cutter
        self._options = options
        self._owner = owner

    def run_one(self) -> bool:
        """Take one job and bring it to its end; say whether there was one."""
        options = self._options
        claim = self._store.claim(
            self._owner,
            lease_s=options.lease_s,
            max_attempts=options.max_attempts,
            stage="cutting",
        )
        if claim is None:
            return False
        with self._heartbeat(claim):
            try:
                self._do(claim)
            except Exception as error:  # one job must not end the worker; the next may be well
                if not isinstance(error, UnicucoError):
                    _LOG.exception("job %s failed", claim.job.id)
                self._store.fail(claim, describe(error))
        return True

    def _do(self, claim: Claim) -> None:
        variant = ModelId.parse(claim.job.compressed_model)
        if claim.staged is None:
            staged = self._cut(claim)
            if staged is None:
                return
        else:
            staged = claim.staged
        self._catalogue.publish(staged, variant)
        self._store.succeed(claim.job.id)

    def _cut(self, claim: Claim) -> str | None:
        """Cut and commit; return the staging name, or none if the job is another's or cancelled."""
        job, started = claim.job, time.perf_counter()
        if claim.token > 1:
            self._catalogue.clear_staging(f"{job.id}.")
        staged = f"{job.id}.{claim.token}"
        out = self._catalogue.staging_place(staged)
        document = self._cutter.cut(job.model, job.request, out)
        result = {**document, "seconds": time.perf_counter() - started}
        if self._store.commit(claim, staged=staged, result=result) is LeaseState.HELD:
            return staged
        self._catalogue.clear_staging(staged)
        self._store.stop(claim)
        return None

    @contextmanager
    def _heartbeat(self, claim: Claim) -> Iterator[None]:
        """Renew the lease while the block runs; a lost one is found out by whatever is sent."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(self._options.lease_s / 4):
                try:
                    if self._store.renew(claim, lease_s=self._options.lease_s) is LeaseState.LOST:
                        return
                except StorageError:  # tried again at the next beat
                    continue

        thread = threading.Thread(target=beat, name="unicuco-heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def describe(error: Exception) -> JobFailure:
    """Return what a job says of the error that ended it."""
    match error:
        case InfeasibleRequestError():
            return JobFailure(code="infeasible_request", message=str(error), param="request")
        case RequestError():
            return JobFailure(code="invalid_request", message=str(error), param="request")
        case UnknownModelError():
            return JobFailure(code="model_not_found", message=str(error), param="model")
        case StorageError():
            return JobFailure(code="storage_unavailable", message=str(error))
        case UnicucoError():
            return JobFailure(code="cutting_failed", message=str(error))
        case _:
            return JobFailure(code="internal_error", message=f"unexpected {type(error).__name__}")
