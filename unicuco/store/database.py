"""Opening the database of a run, and its faults as one clear line.

A path means an SQLite file, anything with ``://`` a database server. What this module does not
know: tables.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Final, TypeVar, cast
from weakref import finalize

from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.pool import QueuePool

from unicuco.errors import RunError, StorageError, UnicucoError

T = TypeVar("T")

_BUSY_TIMEOUT_S: Final = 15.0
_RETRY_S: Final = 0.01
_DAMAGED: Final = ("SQLITE_CORRUPT", "SQLITE_NOTADB")


class Database:
    """Runs transactions, one after the other, in a thread of its own.

    An interrupt (Ctrl-C, a signal's handler that raises) reaches the main thread only, so none
    can cut a transaction in half and leave its locks behind. The two threads meet in queues
    written in C: one of Python's own conditions (``Future``, ``queue.Queue``) stays locked for ever
    when an interrupt falls between taking its lock and entering its ``with``.

    Args:
        engine: of the database.
        name: what errors call it.
    """

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine = engine
        self.name = name
        self._orders: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._ended: SimpleQueue[None] = SimpleQueue()
        # As a daemon: a store that nobody closed keeps no process alive.
        Thread(
            target=_work_off, args=(self._orders, self._ended), name="unicuco-store", daemon=True
        ).start()
        self._end = finalize(self, self._orders.put, None)

    def run(self, work: Callable[[Connection], T], *, writes: bool = True) -> T:
        """Do ``work`` in one transaction, durable when this returns; undone if it raises.

        Raises:
            RunError: the file is damaged or is no database.
            StorageError: the disk or server refused.
        """
        answers: SimpleQueue[tuple[T, None] | tuple[None, BaseException]] = SimpleQueue()

        def order() -> None:
            try:
                answers.put((self._run(work, writes), None))
            except BaseException as error:
                answers.put((None, error))

        if not self._end.alive:
            raise StorageError(f"{self.name} was closed")
        self._orders.put(order)
        result, error = answers.get()
        if error is not None:
            raise error
        return cast("T", result)

    def close(self) -> None:
        """Close every connection, after the transactions that were begun. May be repeated."""
        if self._end.alive:
            self._end()
            self._ended.get()
        self.engine.dispose()

    def _run(self, work: Callable[[Connection], T], writes: bool) -> T:
        with (
            translated(self.name),
            self.engine.connect().execution_options(writes=writes) as connection,
            connection.begin(),
        ):
            return work(connection)


def _work_off(orders: SimpleQueue[Callable[[], None] | None], ended: SimpleQueue[None]) -> None:
    while (order := orders.get()) is not None:
        order()
        del order  # or it would hold its caller's objects until the next one comes
    ended.put(None)


def is_url(location: str | Path) -> bool:
    """Say whether a location is a database URL rather than a path."""
    return isinstance(location, str) and "://" in location


def display_name(location: str | Path) -> str:
    """Return the location as errors show it, a URL without its password."""
    if not is_url(location):
        return str(location)
    try:
        return make_url(str(location)).render_as_string(hide_password=True)
    except ArgumentError:
        return "the database URL"


def open_engine(location: str | Path, *, create: bool) -> Engine:
    """Return an engine on the database; an SQLite file is made if ``create`` and there is none.

    Raises:
        RunError: there is no file and ``create`` is false.
        StorageError: the URL is malformed, or its driver is not installed.
    """
    if is_url(location):
        return _open_server(str(location))
    path = Path(location)
    if not create and not path.is_file():
        raise RunError(f"no evaluations at {path}: learn a run first, or name another folder")
    return _open_file(path)


@contextmanager
def translated(name: str) -> Iterator[None]:
    """Turn a database's exceptions into one clear line about the database called ``name``.

    Raises:
        RunError: the file is damaged or is no database.
        StorageError: anything else that the disk or the server refuses.
    """
    try:
        yield
    except DBAPIError as error:
        raise _explained(name, error.orig) from error
    except sqlite3.Error as error:
        raise _explained(name, error) from error


def _explained(name: str, error: BaseException | None) -> UnicucoError:
    code = str(getattr(error, "sqlite_errorname", ""))
    if code.startswith(_DAMAGED):
        return RunError(f"{name} is damaged or no evaluation store: restore it from a copy")
    if code.startswith("SQLITE_FULL"):
        return StorageError(f"no space left for {name}: free some, then run again with --resume")
    if code.startswith("SQLITE_READONLY"):
        return StorageError(f"{name} can't be written: make it and its folder writable")
    if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return StorageError(f"{name} is locked by another program: close it, then try again")
    if code.startswith("SQLITE_CANTOPEN"):
        return StorageError(f"{name} can't be opened: check that its folder exists and is writable")
    if code.startswith("SQLITE_IOERR"):
        return StorageError(f"the disk failed on {name} ({code}): check its space and its health")
    reason = " ".join(str(error).split())
    return StorageError(f"the database {name} refused: {reason[:200]}")


def _open_server(url: str) -> Engine:
    try:
        return create_engine(url, pool_pre_ping=True)
    except (ArgumentError, NoSuchModuleError) as error:
        raise StorageError(f"{display_name(url)} is no database URL: {error}") from error
    except ModuleNotFoundError as error:
        raise StorageError(
            f"{display_name(url)} needs the Python package {error.name}: install it"
        ) from error


def _open_file(path: Path) -> Engine:
    engine = create_engine("sqlite://", creator=lambda: _connect(path), poolclass=QueuePool)
    event.listen(engine, "begin", _begin)
    return engine


def _connect(path: Path) -> sqlite3.Connection:
    # A journal can't be made on a read-only medium, and nobody writes there: `immutable` needs
    # none.
    query = "?mode=ro&immutable=1" if _is_on_read_only_medium(path) else ""
    connection = sqlite3.connect(
        path.absolute().as_uri() + query,
        uri=True,
        timeout=_BUSY_TIMEOUT_S,
        isolation_level=None,  # transactions begin where _begin says, not where the driver guesses
        check_same_thread=False,  # the pool hands a connection to one thread at a time
    )
    if not query:
        # Where the file system has no shared memory, WAL is refused silently and the old journal
        # stays.
        _wait_for_wal(connection)
        connection.execute("PRAGMA synchronous=FULL")
    return connection


def _wait_for_wal(connection: sqlite3.Connection) -> None:
    # Two that change the journal of a new file at once would wait for each other, so SQLite lets
    # one of them fail at once, whatever its timeout.
    deadline = time.monotonic() + _BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if not error.sqlite_errorname.startswith("SQLITE_BUSY") or time.monotonic() > deadline:
                raise
            time.sleep(_RETRY_S)
        else:
            return


def _begin(connection: Connection) -> None:
    # A writer takes the write lock at once: upgrading a read lock later can't wait for other
    # writers.
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _is_on_read_only_medium(path: Path) -> bool:
    nearest = path if path.exists() else path.parent
    return nearest.exists() and not (
        os.access(nearest, os.W_OK) and os.access(path.parent, os.W_OK)
    )
