"""`EvaluationStore`: everything a run has asked, measured and noted, in one SQL database.

Append-only: what is recorded is never changed, and recording it again changes nothing. Every
method is one transaction, durable when it returns. What the store does not know: what a strategy
means.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from sqlalchemy import (
    Connection,
    RowMapping,
    Select,
    Table,
    delete,
    insert,
    inspect,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite

from unicuco.errors import RunError, UnicucoError
from unicuco.store import lease
from unicuco.store.database import Database, display_name, open_engine
from unicuco.store.schema import (
    ASKS,
    EVALUATIONS,
    MEASUREMENTS,
    META,
    METADATA,
    SCHEMA_VERSION,
    SCREENING_ASKS,
    SCREENINGS,
    TASK_VALUES,
    Measurement,
    ask_row,
    outcome_row,
    row_ask,
    row_outcome,
    row_task,
    task_rows,
)
from unicuco.store.snapshot import copy_store
from unicuco.types import Ask, Outcome, TaskValue

_RENEW_EVERY_S: Final = lease.LEASE_S / 4
_VERSION_KEY: Final = "schema_version"
# Stores of the same format that were made before these tables came hold nothing for them.
_ADDED_LATER: Final = frozenset({SCREENING_ASKS.name, SCREENINGS.name, TASK_VALUES.name})


class EvaluationStore:
    """The database of one run. Usable from several threads; close it, or use it in a ``with``."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._tables: set[str] = set()
        self._token: int | None = None
        self._heart: _Heart | None = None

    @classmethod
    def open(cls, path_or_url: str | Path, *, create: bool) -> Self:
        """Open a run's database: a path (an SQLite file) or a URL (e.g. ``postgresql://…``).

        Args:
            path_or_url: where it is; the folder of a file must exist.
            create: make the file and its tables where they are missing.

        Raises:
            RunError: no such file, a damaged one, another kind of database, or a later version's.
            StorageError: it can't be opened or written.
        """
        engine = open_engine(path_or_url, create=create)
        store = cls(Database(engine, display_name(path_or_url)))
        try:
            store._prepare(create=create)
        except BaseException:
            store._database.close()
            raise
        return store

    def close(self) -> None:
        """Release the lease, if held, and close every connection."""
        try:
            self.release_lease()
        finally:
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

    def copy_to(self, path: Path) -> None:
        """Write all that is recorded at this moment into a new SQLite file; see `copy_store`.

        Raises:
            StorageError: the database or the disk refused.
        """
        copy_store(self._database, path)

    # --- the lease ------------------------------------------------------------------------------

    def acquire_lease(self, owner: str) -> None:
        """Become the one driver that writes; the lease renews itself until it is released.

        A dead driver's lease is taken over: at once where its process is gone from this host,
        else when it has expired.

        Args:
            owner: what the driver calls itself, for the message that a second driver gets.

        Raises:
            StorageError: a live driver holds the lease, this store included.
        """
        holder = lease.Holder.this_process(owner)

        def take(connection: Connection) -> None:
            self._token = lease.take(connection, holder, self._database.name)

        self._database.run(take)
        self._heart = _Heart(self.renew_lease)

    def renew_lease(self) -> bool:
        """Extend the lease; false, once and for all, if another driver has taken over."""
        token = self._token
        if token is None:
            return False
        return self._database.run(lambda connection: lease.renew(connection, token))

    def release_lease(self) -> None:
        """End the lease, if this store holds it."""
        if self._heart is not None:
            self._heart.stop()
            self._heart = None
        token, self._token = self._token, None
        if token is not None:
            self._database.run(lambda connection: lease.release(connection, token))

    # --- asked evaluations ----------------------------------------------------------------------

    def record_asks(self, asks: Sequence[Ask]) -> None:
        """Record asks, before any is submitted; those already recorded are left as they are.

        Raises:
            StorageError: the disk or database refused, or another driver has taken over.
        """
        self._insert_by_fidelity(ASKS, SCREENING_ASKS, [ask_row(ask) for ask in asks])

    def asks(self) -> list[Ask]:
        """Return every recorded ask by round and position, those on part of the text first."""
        return [row_ask(row) for row in self._ordered_rows(ASKS, SCREENING_ASKS)]

    def append(self, results: Sequence[tuple[Ask, Outcome]]) -> None:
        """Record outcomes in one transaction; a strategy that has one keeps its first.

        Those of asks on part of the text go to a table of their own, one per strategy and tokens.

        Raises:
            StorageError: the disk or database refused, or another driver has taken over.
        """
        now = time.time()
        rows = [outcome_row(ask, outcome, finished_at=now) for ask, outcome in results]
        values = [
            row for ask, outcome in results if ask.tokens is None for row in task_rows(outcome)
        ]
        self._insert_by_fidelity(EVALUATIONS, SCREENINGS, rows, (TASK_VALUES, values))

    def read(self) -> Iterator[tuple[Ask, Outcome]]:
        """Return every recorded outcome with its ask, in the order of `asks`."""
        rows = self._ordered_rows(EVALUATIONS, SCREENINGS)
        values: dict[str, list[TaskValue]] = {}
        if TASK_VALUES.name in self._tables:
            for row in self._rows(select(TASK_VALUES).order_by(TASK_VALUES.c.position)):
                values.setdefault(row["strategy_key"], []).append(row_task(row))
        return ((row_ask(row), row_outcome(row, self._tasks_of(row, values))) for row in rows)

    # --- everything else ------------------------------------------------------------------------

    def record_measurements(self, measurements: Sequence[Measurement]) -> None:
        """Record measurements; one of equal purpose, strategy, text and tokens is kept as it is.

        Raises:
            StorageError: the disk or database refused, or another driver has taken over.
        """
        now = time.time()
        rows = [
            {field: getattr(item, field) for field in _MEASUREMENT_FIELDS} | {"finished_at": now}
            for item in measurements
        ]
        self._insert((MEASUREMENTS, rows))

    def measurements(self, purpose: str | None = None) -> list[Measurement]:
        """Return the measurements in the order they were recorded, all or those of one purpose."""
        query = select(MEASUREMENTS).order_by(MEASUREMENTS.c.id)
        if purpose is not None:
            query = query.where(MEASUREMENTS.c.purpose == purpose)
        rows = self._rows(query)
        return [Measurement(**{field: row[field] for field in _MEASUREMENT_FIELDS}) for row in rows]

    # Any: a value is whatever JSON holds; its writer knows what it wrote.
    def get_meta(self, key: str) -> Any:
        """Return the JSON value noted under ``key``, or none."""
        rows = self._rows(select(META.c.value).where(META.c.key == key))
        return json.loads(rows[0]["value"]) if rows else None

    def set_meta(self, key: str, value: Any) -> None:
        """Note a JSON value under ``key``, in place of any that was there.

        Raises:
            ValueError: the value is no JSON, or holds NaN or an infinity.
            StorageError: the disk or database refused, or another driver has taken over.
        """
        text = json.dumps(value, allow_nan=False)

        def replace(connection: Connection) -> None:
            lease.check_may_write(connection, self._token, self._database.name)
            connection.execute(delete(META).where(META.c.key == key))
            connection.execute(insert(META).values(key=key, value=text))

        self._database.run(replace)

    # --- inside ---------------------------------------------------------------------------------

    # Any: a query of any columns
    def _rows(self, query: Select[Any]) -> Sequence[RowMapping]:
        return self._database.run(
            lambda connection: connection.execute(query).mappings().all(), writes=False
        )

    @staticmethod
    def _tasks_of(row: RowMapping, values: Mapping[str, list[TaskValue]]) -> tuple[TaskValue, ...]:
        return () if "asked_tokens" in row else tuple(values.get(row["strategy_key"], ()))

    def _ordered_rows(self, whole: Table, partial: Table) -> list[RowMapping]:
        """Return the rows of both tables by round, in each those on part of the text first."""
        rows = [
            row
            for table in (whole, partial)
            if table.name in self._tables
            for row in self._rows(select(table).order_by(table.c.round, table.c.position))
        ]
        return sorted(
            rows, key=lambda row: (row["round"], "asked_tokens" not in row, row["position"])
        )

    def _insert_by_fidelity(
        self,
        whole: Table,
        partial: Table,
        rows: Sequence[dict[str, object]],
        *others: tuple[Table, Sequence[dict[str, object]]],
    ) -> None:
        cheap = [row for row in rows if "asked_tokens" in row]
        costly = [row for row in rows if "asked_tokens" not in row]
        self._insert((whole, costly), (partial, cheap), *others)

    def _insert(self, *parts: tuple[Table, Sequence[dict[str, object]]]) -> None:
        """Add rows to tables in one transaction; those that are there stay as they are."""
        if not any(rows for _, rows in parts):
            return
        is_server = self._database.engine.dialect.name == "postgresql"
        dialect = postgresql if is_server else sqlite

        def add(connection: Connection) -> None:
            lease.check_may_write(connection, self._token, self._database.name)
            for table, rows in parts:
                if rows:
                    connection.execute(dialect.insert(table).on_conflict_do_nothing(), list(rows))

        self._database.run(add)

    def _prepare(self, *, create: bool) -> None:
        name = self._database.name
        tables = self._database.run(_create_tables if create else _table_names, writes=create)
        self._tables = tables
        if not set(METADATA.tables) - _ADDED_LATER <= tables:
            raise RunError(f"{name} is no evaluation store: name the database of a run")
        version = self.get_meta(_VERSION_KEY)
        if version != SCHEMA_VERSION:
            raise RunError(
                f"{name} has format {version}, this program reads {SCHEMA_VERSION}:"
                " use the version of unicuco that made it"
            )


def _create_tables(connection: Connection) -> set[str]:
    names = _table_names(connection)
    if names & set(METADATA.tables):
        if set(METADATA.tables) - _ADDED_LATER <= names:
            METADATA.create_all(connection)
        return _table_names(connection)
    METADATA.create_all(connection)
    version = json.dumps(SCHEMA_VERSION)
    connection.execute(insert(META).values(key=_VERSION_KEY, value=version))
    return set(METADATA.tables)


def _table_names(connection: Connection) -> set[str]:
    return set(inspect(connection).get_table_names())


_MEASUREMENT_FIELDS: Final = (
    "purpose",
    "strategy_key",
    "kl",
    "tokens",
    "cost_units",
    "seconds",
    "text_digest",
)


class _Heart:
    """Renews a lease in a thread until it is stopped or the lease is lost.

    A renewal that the database refuses is tried again at the next beat: writes report the trouble
    themselves.
    """

    def __init__(self, renew: Callable[[], bool]) -> None:
        self._stopped = threading.Event()
        self._renew = renew
        self._thread = threading.Thread(target=self._beat, name="unicuco-lease", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._stopped.wait(_RENEW_EVERY_S):
            try:
                if not self._renew():
                    return
            except UnicucoError:
                continue
