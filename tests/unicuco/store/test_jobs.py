"""Jobs on SQLite files and on PostgreSQL: one contract, and what only files can do wrong."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from unicuco.errors import RunError, StorageError
from unicuco.store import JobStore
from unicuco.testing.job_contract import JobStoreContract, make_new


class TestSqliteJobs(JobStoreContract):
    @pytest.fixture
    def location(self, tmp_path: Path) -> str | Path:
        return tmp_path / "jobs.db"


class TestPostgresJobs(JobStoreContract):
    @pytest.fixture
    def location(self, new_postgres_database: Callable[[], str]) -> str | Path:
        return new_postgres_database()


def test_jobs_of_a_later_version_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    JobStore.open(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE jobs_meta SET value = 2")
    connection.close()
    with pytest.raises(RunError, match="has jobs of format 2, this program reads 1"):
        JobStore.open(path)


def test_a_missing_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="can't be opened"):
        JobStore.open(tmp_path / "none" / "jobs.db")


def test_an_altered_record_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    with JobStore.open(path) as store:
        job = store.submit(make_new(), max_active=1)
        with sqlite3.connect(path) as connection:
            connection.execute("UPDATE jobs SET request = '['")
        connection.close()
        with pytest.raises(RunError, match=f"job {job.id} was altered"):
            store.get(job.id)


def test_a_closed_store_is_one_file(tmp_path: Path) -> None:
    with JobStore.open(tmp_path / "jobs.db") as store:
        store.submit(make_new(), max_active=1)
    assert [path.name for path in tmp_path.iterdir()] == ["jobs.db"]
