"""Evaluations of a run in SQL: an SQLite file by default, PostgreSQL by URL."""

from __future__ import annotations

from unicuco.store.schema import Measurement
from unicuco.store.store import EvaluationStore

__all__ = ["EvaluationStore", "Measurement"]
