"""What asking for a job can go wrong with, besides the database."""

from __future__ import annotations

from unicuco.errors import UnicucoError


class JobConflictError(UnicucoError):
    """What was asked contradicts what is recorded; ``code`` is the word for programs."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class QueueFullError(UnicucoError):
    """As many jobs are queued and running as may be."""


class UnknownJobError(UnicucoError):
    """No job has that id."""
