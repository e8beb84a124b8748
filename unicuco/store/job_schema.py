"""Jobs, their events and the lease of whoever works on one: value objects, tables, rows.

Timestamps are seconds since 1970 (UTC). JSON is text. What this module does not know: transactions
and files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    RowMapping,
    String,
    Table,
    Text,
)

from unicuco.errors import RunError
from unicuco.store.lease import Holder
from unicuco.types import Request

JOBS_FORMAT: Final = 1

JOB_METADATA: Final = MetaData()

JOBS: Final = Table(
    "jobs",
    JOB_METADATA,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("status", String(16), nullable=False),
    Column("model", String(128), nullable=False),
    Column("compressed_model", String(256), nullable=False),
    # The name while the job may still make or has made it; none afterwards: two may not have one.
    Column("name_held", String(256), unique=True),
    Column("request", Text, nullable=False),
    Column("prediction", Text, nullable=False),
    Column("result", Text),
    Column("error", Text),
    Column("idempotency_key", String(400), unique=True),
    Column("body_digest", String(64), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("started_at", Double),
    Column("finished_at", Double),
    Column("stage", String(32), nullable=False),
    Column("done", Integer, nullable=False),
    Column("total", Integer, nullable=False),
    Column("cancel_requested", Boolean, nullable=False),
    Column("last_event", Integer, nullable=False),
    # The variant that was written and committed, by its staging name; publishing is what is left.
    Column("staged", String(256)),
    Column("attempts", Integer, nullable=False),
    Column("token", BigInteger, nullable=False),
    Column("owner", Text, nullable=False),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("process_mark", Text, nullable=False),
    Column("expires_at", Double, nullable=False),
    Index("jobs_status_number", "status", "number"),
)

JOB_EVENTS: Final = Table(
    "job_events",
    JOB_METADATA,
    Column("job_id", String(64), ForeignKey("jobs.id"), primary_key=True),
    Column("id", Integer, primary_key=True),
    Column("type", String(16), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("data", Text, nullable=False),
)

JOBS_META: Final = Table(
    "jobs_meta",
    JOB_METADATA,
    Column("key", String(32), primary_key=True),
    Column("value", Integer, nullable=False),
)


class JobStatus(StrEnum):
    """Where a job stands; the last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether nothing will change any more."""
        return self in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)


class LeaseState(Enum):
    """What a worker hears when it renews: go on, drop it, or stop because the job was cancelled."""

    HELD = auto()
    LOST = auto()
    CANCELLED = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFailure:
    """Why a job failed: a word for programs, a sentence for people, the field at fault or none."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """What is asked for.

    ``prediction`` is JSON. ``body_digest`` tells equal bodies: the same ``idempotency_key`` with
    another digest is refused.
    """

    model: str
    compressed_model: str
    request: Request
    prediction: Mapping[str, object]
    idempotency_key: str | None
    body_digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job as it stands; ``prediction`` and ``result`` are JSON."""

    id: str
    status: JobStatus
    model: str
    compressed_model: str
    request: Request
    prediction: Mapping[str, Any]  # Any: JSON, handed through
    result: Mapping[str, Any] | None
    error: JobFailure | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    stage: str
    done: int
    total: int
    cancel_requested: bool
    last_event: int

    def to_dict(self) -> dict[str, object]:
        """Return the job object of HTTP."""
        error = self.error
        return {
            "id": self.id,
            "object": "compression.job",
            "created_at": self.created_at,
            "started_at": self.started_at,
            "finished_at": self.finished_at,
            "status": self.status.value,
            "model": self.model,
            "compressed_model": self.compressed_model,
            "request": self.request.to_dict(),
            "prediction": dict(self.prediction),
            "result": None if self.result is None else dict(self.result),
            "error": None
            if error is None
            else {"code": error.code, "message": error.message, "param": error.param},
            "progress": {"stage": self.stage, "done": self.done, "total": self.total},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEvent:
    """Something that happened to a job; ids count from 1, and the last one's type is final."""

    id: int
    type: str
    created_at: float
    data: Mapping[str, Any]  # Any: JSON, handed through

    def to_dict(self) -> dict[str, object]:
        """Return the event object of HTTP."""
        return {
            "id": self.id,
            "object": "compression.job.event",
            "type": self.type,
            "created_at": self.created_at,
            "data": dict(self.data),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A job taken under a lease.

    ``token`` fences: once another has claimed the job, nothing is accepted under this one. Where
    ``staged`` is given, the variant was written and committed, and only publishing is left.
    """

    job: Job
    token: int
    staged: str | None


def read_job(row: RowMapping) -> Job:
    """Read a job back from its row.

    Raises:
        RunError: the row was altered.
    """
    try:
        error = None if row["error"] is None else JobFailure(**json.loads(row["error"]))
        return Job(
            id=row["id"],
            status=JobStatus(row["status"]),
            model=row["model"],
            compressed_model=row["compressed_model"],
            request=Request.from_dict(json.loads(row["request"])),
            prediction=json.loads(row["prediction"]),
            result=None if row["result"] is None else json.loads(row["result"]),
            error=error,
            created_at=row["created_at"],
            started_at=row["started_at"],
            finished_at=row["finished_at"],
            stage=row["stage"],
            done=row["done"],
            total=row["total"],
            cancel_requested=bool(row["cancel_requested"]),
            last_event=row["last_event"],
        )
    except (TypeError, ValueError) as error:
        raise RunError(f"the record of job {row['id']} was altered: {error}") from error


def read_event(row: RowMapping) -> JobEvent:
    """Read an event back from its row."""
    return JobEvent(
        id=row["id"], type=row["type"], created_at=row["created_at"], data=json.loads(row["data"])
    )


def new_row(job_id: str, new: NewJob, now: float) -> dict[str, object]:
    """Return the row of a job that was just asked for."""
    return {
        "id": job_id,
        "status": JobStatus.QUEUED.value,
        "model": new.model,
        "compressed_model": new.compressed_model,
        "name_held": new.compressed_model,
        "request": json.dumps(new.request.to_dict(), allow_nan=False),
        "prediction": json.dumps(dict(new.prediction), allow_nan=False),
        "idempotency_key": new.idempotency_key,
        "body_digest": new.body_digest,
        "created_at": now,
        "stage": JobStatus.QUEUED.value,
        "done": 0,
        "total": 0,
        "cancel_requested": False,
        "last_event": 0,
        "attempts": 0,
        "token": 0,
        "expires_at": 0.0,
        **holder_row(Holder(owner="", host="", pid=0, process_mark="")),
    }


def holder_row(holder: Holder) -> dict[str, object]:
    """Return the columns that name a lease's holder."""
    return {
        "owner": holder.owner,
        "host": holder.host,
        "pid": holder.pid,
        "process_mark": holder.process_mark,
    }


def read_holder(row: RowMapping) -> Holder:
    """Read the holder of a job's lease."""
    return Holder(
        owner=row["owner"], host=row["host"], pid=row["pid"], process_mark=row["process_mark"]
    )
