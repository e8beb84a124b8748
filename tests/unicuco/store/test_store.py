"""The store on SQLite files: the contract, and what only files can do wrong."""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from unicuco.errors import RunError, StorageError
from unicuco.store import EvaluationStore
from unicuco.testing.store_contract import StoreContract, make_ask, make_outcome


class TestSqliteStore(StoreContract):
    @pytest.fixture
    def location(self, tmp_path: Path) -> str | Path:
        return tmp_path / "evaluations.db"


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    path = tmp_path / "evaluations.db"
    with EvaluationStore.open(path, create=True) as store:
        asks = [make_ask(0, position) for position in range(8)]
        store.record_asks(asks)
        store.append([(ask, make_outcome(ask)) for ask in asks])
    return path


def test_a_missing_file_is_refused_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no evaluations at"):
        EvaluationStore.open(tmp_path / "none.db", create=False)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="can't be opened"):
        EvaluationStore.open(tmp_path / "none" / "evaluations.db", create=True)


def test_a_file_that_is_no_database_is_one_line_and_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "evaluations.db"
    path.write_bytes(b"not a database" * 100)
    for create in (False, True):
        with pytest.raises(RunError, match="damaged or no evaluation store"):
            EvaluationStore.open(path, create=create)
    assert path.read_bytes() == b"not a database" * 100


def test_a_database_of_something_else_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "evaluations.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE songs (title TEXT)")
    connection.close()
    with pytest.raises(RunError, match="is no evaluation store"):
        EvaluationStore.open(path, create=False)


def test_a_store_of_a_later_version_is_one_line(filled: Path) -> None:
    with sqlite3.connect(filled) as connection:
        connection.execute("UPDATE meta SET value = '2' WHERE key = 'schema_version'")
    connection.close()
    with pytest.raises(RunError, match="has format 2, this program reads 1"):
        EvaluationStore.open(filled, create=False)


def test_a_truncated_file_is_one_line(filled: Path) -> None:
    filled.write_bytes(filled.read_bytes()[:5000])
    with (
        pytest.raises(RunError, match="damaged"),
        EvaluationStore.open(filled, create=False) as store,
    ):
        list(store.read())


@pytest.mark.parametrize("change", ["settings = '{}'", "kl = NULL", "settings = '['"])
def test_an_altered_record_is_one_line(filled: Path, change: str) -> None:
    with sqlite3.connect(filled) as connection:
        connection.execute(f"UPDATE evaluations SET {change} WHERE position = 3")
    connection.close()
    with (
        EvaluationStore.open(filled, create=False) as store,
        pytest.raises(RunError, match="was altered"),
    ):
        list(store.read())


def test_a_full_disk_is_one_line_and_loses_nothing_recorded(filled: Path) -> None:
    with EvaluationStore.open(filled, create=False) as store:
        with store._database.engine.connect() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
            connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
        more = [make_ask(round_, position) for round_ in range(1, 60) for position in range(16)]
        with pytest.raises(StorageError, match="no space left"):
            store.record_asks(more)
        assert len(store.asks()) == 8
    with EvaluationStore.open(filled, create=False) as store:
        store.record_asks(more)
        assert len(store.asks()) == 8 + len(more)


def test_a_file_locked_by_another_program_is_one_line(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unicuco.store.database._BUSY_TIMEOUT_S", 0.1)
    other = sqlite3.connect(filled, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with EvaluationStore.open(filled, create=False) as store:
        with pytest.raises(StorageError, match="locked by another program"):
            store.set_meta("a", 1)
        other.execute("ROLLBACK")
        store.set_meta("a", 1)
    other.close()


def test_a_run_on_a_read_only_medium_can_be_read(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The file system's answer is replaced, because root may write everywhere but there.
    monkeypatch.setattr("unicuco.store.database.os.access", lambda path, mode: mode != os.W_OK)
    filled.chmod(stat.S_IRUSR)
    with EvaluationStore.open(filled, create=False) as store:
        assert len(list(store.read())) == 8
        with pytest.raises(StorageError, match="can't be written"):
            store.set_meta("a", 1)
    assert [path.name for path in filled.parent.iterdir()] == ["evaluations.db"]


def test_a_closed_store_is_one_file(filled: Path) -> None:
    assert [path.name for path in filled.parent.iterdir()] == ["evaluations.db"]


def test_writing_survives_a_power_cut(filled: Path) -> None:
    with (
        EvaluationStore.open(filled, create=False) as store,
        store._database.engine.connect() as connection,
    ):
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar_one() == 2
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"


def test_table_evaluations_can_be_read_without_this_package(filled: Path) -> None:
    connection = sqlite3.connect(filled)
    columns = (
        "strategy_key, round, position, settings, kl, kept_fraction, tokens, seconds, status,"
        " gradient, cost_units, text_digest, error"
    )
    rows = connection.execute(f"SELECT {columns} FROM evaluations WHERE status = 'ok'").fetchall()
    connection.close()
    assert len({row[0] for row in rows}) == len(rows) == 8


def test_threads_may_share_a_store(filled: Path) -> None:
    def write(round_: int) -> None:
        for position in range(8):
            store.record_asks([make_ask(round_, position)])

    with EvaluationStore.open(filled, create=False) as store:
        store.acquire_lease("driver")
        threads = [threading.Thread(target=write, args=(round_,)) for round_ in (1, 2, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(store.asks()) == 32


def test_a_url_that_means_nothing_is_one_line_without_its_password() -> None:
    with pytest.raises(StorageError) as refused:
        EvaluationStore.open("nosuch://me:secret@somewhere/db", create=True)
    assert "secret" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_store_from_before_cheaper_fidelities_is_read_and_gets_their_tables_when_written(
    filled: Path,
) -> None:
    with sqlite3.connect(filled) as connection:
        connection.execute("DROP TABLE screening_asks")
        connection.execute("DROP TABLE screenings")
    connection.close()
    with EvaluationStore.open(filled, create=False) as store:
        assert len(store.asks()) == len(list(store.read())) == 8
    with EvaluationStore.open(filled, create=True) as store:
        cheap = replace(make_ask(1, 0), tokens=64)
        store.record_asks([cheap])
        assert store.asks()[-1] == cheap
