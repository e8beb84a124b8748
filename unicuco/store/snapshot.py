"""A copy of a live store as one SQLite file: what a run folder elsewhere carries.

What this module does not know: where the copy goes.
"""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Connection, delete, insert, inspect, select

from unicuco.store.database import Database, open_engine
from unicuco.store.schema import LEASE, METADATA


def copy_store(source: Database, path: Path) -> None:
    """Write all that is recorded, at one moment, into a new file; nobody holds its lease.

    Raises:
        StorageError: the database or the disk refused.
    """
    tables = [table for table in METADATA.sorted_tables if table.name != LEASE.name]

    def read(connection: Connection) -> dict[str, list[dict[str, object]]]:
        present = set(inspect(connection).get_table_names())
        return {
            table.name: [dict(row) for row in connection.execute(select(table)).mappings()]
            for table in tables
            if table.name in present
        }

    rows = source.run(read, writes=False)

    def write(connection: Connection) -> None:
        METADATA.create_all(connection)
        for table in tables:
            connection.execute(delete(table))
            if rows.get(table.name):
                connection.execute(insert(table), rows[table.name])

    target = Database(open_engine(path, create=True), str(path))
    try:
        target.run(write)
    finally:
        target.close()
