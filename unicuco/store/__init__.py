"""What is kept in SQL (SQLite by default, PostgreSQL by URL): a run's evaluations, and jobs."""

from __future__ import annotations

from unicuco.store.errors import JobConflictError, QueueFullError, UnknownJobError
from unicuco.store.job_schema import (
    Claim,
    Job,
    JobEvent,
    JobFailure,
    JobStatus,
    LeaseState,
    NewJob,
)
from unicuco.store.jobs import JobStore
from unicuco.store.schema import Measurement
from unicuco.store.store import EvaluationStore

__all__ = [
    "Claim",
    "EvaluationStore",
    "Job",
    "JobConflictError",
    "JobEvent",
    "JobFailure",
    "JobStatus",
    "JobStore",
    "LeaseState",
    "Measurement",
    "NewJob",
    "QueueFullError",
    "UnknownJobError",
]
