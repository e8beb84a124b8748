"""The steps that the transactions on jobs are made of; each takes a connection inside one.

Whoever changes a job locks its row first, so its events have gapless ids. What this module does not
know: when a transaction begins and ends.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

from sqlalchemy import (
    Connection,
    RowMapping,
    func,
    insert,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from unicuco.store.errors import JobConflictError, UnknownJobError
from unicuco.store.job_schema import (
    JOB_EVENTS,
    JOB_METADATA,
    JOBS,
    JOBS_FORMAT,
    JOBS_META,
    Claim,
    Job,
    JobFailure,
    JobStatus,
    LeaseState,
    NewJob,
    holder_row,
    read_holder,
    read_job,
)
from unicuco.store.lease import Holder, clock

_ACTIVE: Final = (JobStatus.QUEUED.value, JobStatus.RUNNING.value)
_FORMAT_KEY: Final = "format"
_SETUP_LOCK: Final = 0x756E6963  # any number that nothing else in the database locks by


def prepare(connection: Connection) -> int:
    """Make the tables where they are missing; return the format of those that are there."""
    if connection.dialect.name == "postgresql":  # a service's processes all start at once
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _SETUP_LOCK})
    if JOBS_META.name not in inspect(connection).get_table_names():
        JOB_METADATA.create_all(connection)
        connection.execute(insert(JOBS_META).values(key=_FORMAT_KEY, value=JOBS_FORMAT))
    query = select(JOBS_META.c.value).where(JOBS_META.c.key == _FORMAT_KEY)
    return int(connection.execute(query).scalar_one())


def count_active(connection: Connection) -> int:
    """Return how many jobs are queued or running."""
    query = select(func.count()).select_from(JOBS).where(JOBS.c.status.in_(_ACTIVE))
    return int(connection.execute(query).scalar_one())


def known_job(connection: Connection, new: NewJob) -> Job | None:
    """Return the job that an idempotency key stands for, or none.

    Raises:
        JobConflictError: the key was used with another body, or the name is taken.
    """
    # The name is looked up before the key, for another caller may commit in between: whoever finds
    # the name taken then finds the key that took it.
    taken = connection.execute(select(JOBS.c.id).where(JOBS.c.name_held == new.compressed_model))
    owner = taken.scalar_one_or_none()
    if new.idempotency_key is not None:
        query = select(JOBS).where(JOBS.c.idempotency_key == new.idempotency_key)
        row = connection.execute(query).mappings().one_or_none()
        if row is not None:
            if row["body_digest"] != new.body_digest:
                raise JobConflictError(
                    "idempotency_key_reused",
                    "this Idempotency-Key was used with another body; use a new one",
                )
            return read_job(row)
    if owner is not None:
        raise JobConflictError(
            "name_taken",
            f"{new.compressed_model} is or will be made by job {owner}; choose another suffix, "
            "or delete that variant first",
        )
    return None


def insert_new(connection: Connection, row: Mapping[str, object]) -> bool:
    """Insert a job unless its key or name was taken meanwhile; say whether it was inserted."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(JOBS).values(row).on_conflict_do_nothing().returning(JOBS.c.id)
    return connection.execute(statement).scalar_one_or_none() is not None


def locked(connection: Connection, job_id: str) -> RowMapping:
    """Return a job's row, locked until the transaction ends.

    Raises:
        UnknownJobError: there is none of that id.
    """
    query = select(JOBS).where(JOBS.c.id == job_id).with_for_update()
    row = connection.execute(query).mappings().one_or_none()
    if row is None:
        raise UnknownJobError(f"no job is called {job_id[:80]!r}")
    return row


def change(connection: Connection, job_id: str, **values: object) -> None:
    """Change columns of a locked job."""
    connection.execute(update(JOBS).where(JOBS.c.id == job_id).values(**values))


def add_event(
    connection: Connection, row: RowMapping, kind: str, data: Mapping[str, object]
) -> None:
    """Append an event to a locked job."""
    number = int(row["last_event"]) + 1
    change(connection, row["id"], last_event=number)
    connection.execute(
        insert(JOB_EVENTS).values(
            job_id=row["id"],
            id=number,
            type=kind,
            created_at=clock(connection),
            data=json.dumps(dict(data), allow_nan=False),
        )
    )


def finish(
    connection: Connection, row: RowMapping, status: JobStatus, *, error: JobFailure | None = None
) -> Job:
    """Bring a locked job to a final state, with the event that says so."""
    document = (
        None
        if error is None
        else {"code": error.code, "message": error.message, "param": error.param}
    )
    change(
        connection,
        row["id"],
        status=status.value,
        finished_at=clock(connection),
        error=None if document is None else json.dumps(document),
        name_held=row["name_held"] if status is JobStatus.SUCCEEDED else None,
        expires_at=0.0,
        **({"stage": "done", "done": row["total"]} if status is JobStatus.SUCCEEDED else {}),
    )
    add_event(connection, row, status.value, {} if document is None else {"error": document})
    return read_job(locked(connection, row["id"]))


def next_row(connection: Connection, now: float) -> RowMapping | None:
    """Return the row of the job to take next, locked: an abandoned one, else the oldest queued."""
    running = (
        select(JOBS)
        .where(JOBS.c.status == JobStatus.RUNNING.value)
        .order_by(JOBS.c.number)
        .with_for_update(skip_locked=True)
    )
    for row in connection.execute(running).mappings().all():
        if row["expires_at"] <= now or read_holder(row).is_gone():
            return row
    queued = (
        select(JOBS)
        .where(JOBS.c.status == JobStatus.QUEUED.value)
        .order_by(JOBS.c.number)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    return connection.execute(queued).mappings().one_or_none()


def take(
    connection: Connection,
    row: RowMapping,
    holder: Holder,
    *,
    expires_at: float,
    stage: str | None,
) -> Claim:
    """Give a locked job to a holder, under a token that no other claim of it had.

    ``stage``: what the work begins with, unless only publishing is left.
    """
    token, attempt = int(row["token"]) + 1, int(row["attempts"]) + 1
    change(
        connection,
        row["id"],
        status=JobStatus.RUNNING.value,
        started_at=clock(connection) if row["started_at"] is None else row["started_at"],
        token=token,
        attempts=attempt,
        expires_at=expires_at,
        **holder_row(holder),
    )
    add_event(connection, row, JobStatus.RUNNING.value, {"attempt": attempt})
    if stage is not None and row["staged"] is None:
        note_progress(connection, locked(connection, row["id"]), stage, 0, 1)
    job = read_job(locked(connection, row["id"]))
    return Claim(job=job, token=token, staged=row["staged"])


def note_progress(
    connection: Connection, row: RowMapping, stage: str, done: int, total: int
) -> None:
    """Note how far the work on a locked job is, with the event that says so."""
    change(connection, row["id"], stage=stage, done=done, total=total)
    add_event(connection, row, "progress", {"stage": stage, "done": done, "total": total})


def state_of(row: RowMapping, claim: Claim) -> LeaseState:
    """Say what a claim is still worth."""
    if row["status"] != JobStatus.RUNNING.value or row["token"] != claim.token:
        return LeaseState.LOST
    return LeaseState.CANCELLED if row["cancel_requested"] else LeaseState.HELD
