"""The driver's lease: one row that says who may write, with a fencing token.

Whoever takes the lease raises its token by one; a write by a holder whose token is no longer the
row's is refused in the same transaction, so a driver that was paused and replaced can't spoil the
run. A lease ends by release, by expiry, or when its process is gone from this host. What this
module does not know: what is written under the lease.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, insert, select, text, update

from unicuco.errors import StorageError
from unicuco.store.schema import LEASE

LEASE_S: Final = 60.0
_NAME: Final = "driver"


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """The process that a lease row names. ``host`` also tells containers of one host name apart."""

    owner: str
    host: str
    pid: int
    process_mark: str

    @classmethod
    def this_process(cls, owner: str) -> Holder:
        """Return the calling process as a holder called ``owner``."""
        pid = os.getpid()
        return cls(owner=owner, host=_host(), pid=pid, process_mark=_process_mark(pid) or "")

    def is_gone(self) -> bool:
        """Say whether the process surely runs no more; false where that can't be told from here."""
        if self.host != _host():
            return False
        mark = _process_mark(self.pid)
        return mark is None or mark != self.process_mark

    def __str__(self) -> str:
        return f"{self.owner} (process {self.pid} on {self.host.split('/')[0]})"


def take(connection: Connection, holder: Holder, name: str) -> int:
    """Take the lease on the database called ``name``; return its new token.

    Raises:
        StorageError: a live driver holds it; the line says who, and until when.
    """
    now = clock(connection)
    row = (
        connection.execute(select(LEASE).where(LEASE.c.name == _NAME).with_for_update())
        .mappings()
        .one_or_none()
    )
    values = {
        "owner": holder.owner,
        "host": holder.host,
        "pid": holder.pid,
        "process_mark": holder.process_mark,
        "expires_at": now + LEASE_S,
    }
    if row is None:
        connection.execute(insert(LEASE).values(name=_NAME, token=1, **values))
        return 1
    seen = Holder(**{field: row[field] for field in ("owner", "host", "pid", "process_mark")})
    left_s = row["expires_at"] - now
    if left_s > 0 and not seen.is_gone():
        raise StorageError(
            f"{name} is in use by {seen}: wait for it or stop it"
            f" (a driver that died elsewhere is replaced after {left_s:.0f} s)"
        )
    token = int(row["token"]) + 1
    connection.execute(update(LEASE).where(LEASE.c.name == _NAME).values(token=token, **values))
    return token


def renew(connection: Connection, token: int) -> bool:
    """Extend the lease if its token is still ``token``; say whether it is."""
    renewed = connection.execute(
        update(LEASE)
        .where(LEASE.c.name == _NAME, LEASE.c.token == token)
        .values(expires_at=clock(connection) + LEASE_S)
    )
    return renewed.rowcount == 1


def release(connection: Connection, token: int) -> None:
    """End the lease if its token is still ``token``; its row stays, so no token comes twice."""
    connection.execute(
        update(LEASE).where(LEASE.c.name == _NAME, LEASE.c.token == token).values(expires_at=0.0)
    )


def check_may_write(connection: Connection, token: int | None, name: str) -> None:
    """Refuse a write without the lease while somebody holds it, or with a lease that was lost.

    Raises:
        StorageError: another driver has taken over, or holds the lease.
    """
    row = (
        connection.execute(select(LEASE).where(LEASE.c.name == _NAME).with_for_update(read=True))
        .mappings()
        .one_or_none()
    )
    if row is None or row["token"] == token:
        return
    seen = Holder(**{field: row[field] for field in ("owner", "host", "pid", "process_mark")})
    if token is not None:
        raise StorageError(f"{name} was taken over by {seen}: this driver stops writing")
    if row["expires_at"] > clock(connection) and not seen.is_gone():
        raise StorageError(f"{name} is in use by {seen}: wait for it or stop it")


def clock(connection: Connection) -> float:
    """Return the seconds since 1970 by the clock that all who use the database share."""
    # Drivers on several hosts share a server's clock; those of an SQLite file share a host's.
    if connection.dialect.name == "postgresql":
        return float(
            connection.execute(text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one()
        )
    return time.time()


def _host() -> str:
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{socket.gethostname()}/{namespace}"


def _process_mark(pid: int) -> str | None:
    """Return a mark that no later process with the same number has; none if the process is gone."""
    try:
        # proc(5): the name in parentheses may hold spaces; then state (field 3) … start time
        # (field 22).
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except FileNotFoundError:
        return None if Path("/proc/self/stat").exists() else _signalled(pid)
    except ProcessLookupError:
        return None
    return None if fields[0] in "ZX" else f"{_boot_id()}/{fields[19]}"


def _boot_id() -> str:
    # Start times count from the boot, so a mark of before it must not equal one of after it.
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""


def _signalled(pid: int) -> str | None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""
