"""`JobStore`: compression jobs in SQL: asked for once, worked on by one at a time, finished once.

Every method is one transaction, durable when it returns; so any process may be killed anywhere. A
worker takes a job under a lease and renews it; the lease's token fences: what a worker that was
taken for dead still sends is refused. A finished variant is first *committed* under the token, by
its staging name, then published by whoever comes to it (a rename, which can happen but once), then
the job has *succeeded*. What this module does not know: files, models, HTTP.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from sqlalchemy import Connection, RowMapping, Select, func, select, update

from unicuco.errors import RunError
from unicuco.store import job_steps as steps
from unicuco.store.database import Database, display_name, open_engine
from unicuco.store.errors import JobConflictError, QueueFullError, UnknownJobError
from unicuco.store.job_schema import (
    JOB_EVENTS,
    JOBS,
    JOBS_FORMAT,
    Claim,
    Job,
    JobEvent,
    JobFailure,
    JobStatus,
    LeaseState,
    NewJob,
    new_row,
    read_event,
    read_job,
)
from unicuco.store.lease import Holder, clock

_SUBMIT_ATTEMPTS: Final = 3


class JobStore:
    """The jobs of one service. Usable from several threads; close it, or use it in a ``with``."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @classmethod
    def open(cls, path_or_url: str | Path) -> Self:
        """Open the jobs' database, made where it is missing.

        Args:
            path_or_url: a path (an SQLite file; its folder must exist) or a URL.

        Raises:
            RunError: a damaged file, or a later version's.
            StorageError: it can't be opened or written.
        """
        engine = open_engine(path_or_url, create=True)
        store = cls(Database(engine, display_name(path_or_url)))
        try:
            found = store._database.run(steps.prepare)
            if found != JOBS_FORMAT:
                raise RunError(
                    f"{store._database.name} has jobs of format {found}, this program reads "
                    f"{JOBS_FORMAT}: use the version of unicuco that made it"
                )
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Close every connection."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- for those who ask ----------------------------------------------------------------------

    def submit(self, new: NewJob, *, max_active: int) -> Job:
        """Record a job, or return the one that the same idempotency key made with the same body.

        Raises:
            JobConflictError: the key was used with another body, or the name is taken.
            QueueFullError: ``max_active`` jobs are queued and running.
        """

        def work(connection: Connection) -> Job:
            for _ in range(_SUBMIT_ATTEMPTS):
                known = steps.known_job(connection, new)
                if known is not None:
                    return known
                active = steps.count_active(connection)
                if active >= max_active:
                    raise QueueFullError(f"{active} jobs are queued or running; try again later")
                row = new_row(f"cjob-{secrets.token_hex(12)}", new, clock(connection))
                if steps.insert_new(connection, row):
                    job_id = str(row["id"])
                    steps.add_event(connection, steps.locked(connection, job_id), "queued", {})
                    return read_job(steps.locked(connection, job_id))
            raise JobConflictError("conflict", f"{new.compressed_model} is asked for elsewhere")

        return self._database.run(work)

    def get(self, job_id: str) -> Job:
        """Return a job.

        Raises:
            UnknownJobError: there is none of that id.
        """
        return read_job(self._row(job_id))

    def page(self, *, after: str | None, limit: int) -> list[Job]:
        """Return at most ``limit`` jobs, newest first, those older than ``after`` if given.

        Raises:
            UnknownJobError: there is no job ``after``.
        """
        query = select(JOBS).order_by(JOBS.c.number.desc()).limit(limit)
        if after is not None:
            query = query.where(JOBS.c.number < self._row(after)["number"])
        return [read_job(row) for row in self._rows(query)]

    def events(self, job_id: str, *, after: int = 0, limit: int | None = None) -> list[JobEvent]:
        """Return a job's events with ids above ``after``, in order."""
        query = (
            select(JOB_EVENTS)
            .where(JOB_EVENTS.c.job_id == job_id, JOB_EVENTS.c.id > after)
            .order_by(JOB_EVENTS.c.id)
            .limit(limit)
        )
        return [read_event(row) for row in self._rows(query)]

    def num_active(self) -> int:
        """Return how many jobs are queued or running."""
        return self._database.run(steps.count_active, writes=False)

    def counts(self) -> dict[JobStatus, int]:
        """Return how many jobs stand where."""
        query = select(JOBS.c.status, func.count()).group_by(JOBS.c.status)
        rows = self._database.run(lambda c: c.execute(query).all(), writes=False)
        found = {status: count for status, count in rows}
        return {status: int(found.get(status.value, 0)) for status in JobStatus}

    def cancel(self, job_id: str) -> Job:
        """Cancel a job: at once if it is queued, else as soon as its worker hears of it.

        Raises:
            UnknownJobError: there is none of that id.
            JobConflictError: it is finished, or its variant is already committed.
        """

        def work(connection: Connection) -> Job:
            row = steps.locked(connection, job_id)
            job = read_job(row)
            if job.status is JobStatus.CANCELLED:
                return job
            if job.status.is_final or row["staged"] is not None:
                raise JobConflictError("job_finished", f"job {job_id} is already finished")
            if job.status is JobStatus.QUEUED:
                return steps.finish(connection, row, JobStatus.CANCELLED)
            steps.change(connection, job_id, cancel_requested=True)
            return read_job(steps.locked(connection, job_id))

        return self._database.run(work)

    def job_of_name(self, compressed_model: str) -> Job | None:
        """Return the job that makes or has made the variant of that name, if it holds the name."""
        rows = self._rows(select(JOBS).where(JOBS.c.name_held == compressed_model))
        return read_job(rows[0]) if rows else None

    def free_name(self, compressed_model: str) -> None:
        """Let the name of a deleted variant be used again; one still being made keeps its name."""
        statement = (
            update(JOBS)
            .where(JOBS.c.name_held == compressed_model, JOBS.c.status == JobStatus.SUCCEEDED.value)
            .values(name_held=None)
        )
        self._database.run(lambda connection: connection.execute(statement))

    # --- for those who work ---------------------------------------------------------------------

    def claim(
        self, owner: str, *, lease_s: float, max_attempts: int, stage: str | None = None
    ) -> Claim | None:
        """Take a job: one whose worker is gone or silent, else the oldest queued one, else none.

        A job that has used up ``max_attempts`` workers has failed. ``stage`` is noted as the
        progress that the work begins with.
        """
        if not self.num_active():  # asked often: a reader hinders nobody
            return None
        holder = Holder.this_process(owner)

        def work(connection: Connection) -> Claim | None:
            now = clock(connection)
            while (row := steps.next_row(connection, now)) is not None:
                if row["staged"] is None and row["cancel_requested"]:
                    steps.finish(connection, row, JobStatus.CANCELLED)
                elif row["staged"] is None and row["attempts"] >= max_attempts:
                    died = JobFailure(
                        code="worker_died", message=f"{max_attempts} workers died while cutting it"
                    )
                    steps.finish(connection, row, JobStatus.FAILED, error=died)
                else:
                    return steps.take(
                        connection, row, holder, expires_at=now + lease_s, stage=stage
                    )
            return None

        return self._database.run(work)

    def renew(self, claim: Claim, *, lease_s: float) -> LeaseState:
        """Extend a lease, and hear whether to go on."""

        def work(connection: Connection) -> LeaseState:
            row = steps.locked(connection, claim.job.id)
            state = steps.state_of(row, claim)
            if state is LeaseState.HELD:
                steps.change(connection, claim.job.id, expires_at=clock(connection) + lease_s)
            return state

        return self._database.run(work)

    def progress(self, claim: Claim, stage: str, done: int, total: int) -> LeaseState:
        """Note how far the work is, and hear whether to go on."""

        def work(connection: Connection) -> LeaseState:
            row = steps.locked(connection, claim.job.id)
            state = steps.state_of(row, claim)
            if state is LeaseState.HELD:
                steps.note_progress(connection, row, stage, done, total)
            return state

        return self._database.run(work)

    def commit(self, claim: Claim, *, staged: str, result: Mapping[str, object]) -> LeaseState:
        """Accept a written variant under its claim; from here on only publishing is left.

        Args:
            claim: whose token must still be the job's.
            staged: the staging name that the variant was written to.
            result: JSON.

        Returns:
            HELD when it was accepted; otherwise nothing may be published.
        """

        def work(connection: Connection) -> LeaseState:
            row = steps.locked(connection, claim.job.id)
            state = steps.state_of(row, claim)
            if state is LeaseState.HELD and row["staged"] is None:
                result_text = json.dumps(dict(result), allow_nan=False)
                steps.change(connection, claim.job.id, staged=staged, result=result_text)
            return state

        return self._database.run(work)

    def succeed(self, job_id: str) -> Job:
        """Record that the committed variant is published; repeated, it changes nothing."""

        def work(connection: Connection) -> Job:
            row = steps.locked(connection, job_id)
            if row["staged"] is None or row["status"] != JobStatus.RUNNING.value:
                return read_job(row)
            return steps.finish(connection, row, JobStatus.SUCCEEDED)

        return self._database.run(work)

    def fail(self, claim: Claim, error: JobFailure) -> LeaseState:
        """Record that the work can't be done."""
        return self._end(claim, JobStatus.FAILED, error)

    def stop(self, claim: Claim) -> LeaseState:
        """Record that the work was stopped because the job was cancelled."""
        return self._end(claim, JobStatus.CANCELLED, None)

    def give_back(self, claim: Claim) -> None:
        """Let another worker have the job, at once and without counting this attempt."""

        def work(connection: Connection) -> None:
            row = steps.locked(connection, claim.job.id)
            if steps.state_of(row, claim) is not LeaseState.LOST:
                steps.change(
                    connection, claim.job.id, expires_at=0.0, attempts=max(0, row["attempts"] - 1)
                )

        self._database.run(work)

    # --- inside ---------------------------------------------------------------------------------

    def _end(self, claim: Claim, status: JobStatus, error: JobFailure | None) -> LeaseState:
        def work(connection: Connection) -> LeaseState:
            row = steps.locked(connection, claim.job.id)
            state = steps.state_of(row, claim)
            if state is not LeaseState.LOST:
                cancelled = state is LeaseState.CANCELLED
                steps.finish(
                    connection, row, JobStatus.CANCELLED if cancelled else status, error=error
                )
            return state

        return self._database.run(work)

    def _row(self, job_id: str) -> RowMapping:
        rows = self._rows(select(JOBS).where(JOBS.c.id == job_id))
        if not rows:
            raise UnknownJobError(f"no job is called {job_id[:80]!r}")
        return rows[0]

    # Any: a query of any columns
    def _rows(self, query: Select[Any]) -> Sequence[RowMapping]:
        return self._database.run(
            lambda connection: connection.execute(query).mappings().all(), writes=False
        )
