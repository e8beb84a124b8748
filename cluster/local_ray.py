"""A Ray of one's own on this machine: small, quiet, private, and gone afterwards.

Ray 2.60 would otherwise write an access token into the home folder and from then on ask every other
cluster of this user for it, keep its files in a folder that other Rays share, and take a third of
the memory for objects. What this module does not know: what Ray is used for.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import ray
from ray._private import worker as ray_worker
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # compiled

from unicuco.errors import ClusterError

# Ray refuses less than 75 MiB. Memory is taken as it fills: twice the arrays leaves room for a
# second backend beside the first; what is not arrays is asks and outcomes.
_LEAST_OBJECTS_BYTES: Final = 80 * 2**20
_SLACK_BYTES: Final = 64 * 2**20
# A socket's path may have 107 characters; Ray and the folder's own name add 80 to the parent.
_LONGEST_PARENT: Final = 27

_PREFIX: Final = "uc-"
_LOCK: Final = "driver.lock"

_REACH_S: Final = 10.0
_ATTEMPTS: Final = 2


@contextmanager
def local_ray(array_bytes: int) -> Iterator[None]:
    """Start a Ray that nobody else joins, with room for ``array_bytes`` of arrays; end it on exit.

    Raises:
        ClusterError: Ray can't be started.
    """
    with _own_folder() as folder, _own_token():
        try:
            connect(
                address="local",
                include_dashboard=False,
                object_store_memory=max(_LEAST_OBJECTS_BYTES, 2 * array_bytes + _SLACK_BYTES),
                _temp_dir=folder,
                # Replicas get processes with their own settings: early ones would stay idle.
                _system_config={"prestart_worker_first_driver": False},
            )
            yield
        finally:
            ray.shutdown()


@contextmanager
def connected(address: str, array_bytes: int) -> Iterator[None]:
    """Have a Ray inside the block: one of one's own for "local", else the one at the address.

    A process that is connected already keeps its connection.

    Args:
        address: "local", "auto" or "ray://HOST:PORT".
        array_bytes: of the arrays that a Ray of one's own shall have room for.

    Raises:
        ClusterError: it can't be started, or there is none.
    """
    if ray.is_initialized():
        yield
    elif address == "local":
        with local_ray(array_bytes):
            yield
    else:
        connect(address=address)
        try:
            yield
        finally:
            ray.shutdown()


# Any: what `ray.init` takes
def connect(*, address: str, **options: Any) -> None:
    """Call `ray.init` so that it prints nothing and leaves this process' signals as they are.

    What may work the second time is tried again: Ray gives its own processes 30 s to start, which
    is short on a machine that is busy and cold; and the server of a ``ray://`` head forks while
    gRPC's threads run, which kills one child in twenty unless the head has
    ``GRPC_ENABLE_FORK_SUPPORT=0``.

    Raises:
        ClusterError: there is no such cluster, it lets nobody in, or it can't be started.
    """
    if address != "local":
        _check_reachable(named_address(address))
    on_sigterm = signal.getsignal(signal.SIGTERM)
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.util.client.logsclient").disabled = True  # Ray sets its level anew
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else every actor warns
    # What a raylet has to say would come out on stdout, whatever `log_to_driver` is.
    ray_worker._worker_logs_enabled = False
    for attempts_left in reversed(range(_ATTEMPTS)):
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
            break
        except Exception as error:  # Ray raises plain ones too
            # What a client's own server raises comes as the former.
            may_pass = isinstance(error, ConnectionAbortedError) or address == "local"
            if not (may_pass and attempts_left):
                raise ClusterError(_explained(address, error)) from error
            ray.shutdown()
    if threading.current_thread() is threading.main_thread():
        # Set again, Ray's handler (it leaves by `sys.exit`) is rid of the stack trace around it.
        its = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, its if on_sigterm is signal.SIG_DFL else on_sigterm)


def named_address(address: str) -> str:
    """Return what "auto" stands for where RAY_ADDRESS names a cluster; others as they are."""
    return os.environ.get("RAY_ADDRESS", address) if address == "auto" else address


def _check_reachable(address: str) -> None:
    """Find out at once what Ray would take minutes to find out.

    Raises:
        ClusterError: nothing listens there.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()
    except OSError as error:
        raise ClusterError(
            f"nothing answers at {address} ({error.strerror or error}): start a cluster there with"
            " `ray start --head`, or use --address local"
        ) from error


def _explained(address: str, error: Exception) -> str:
    lines = (str(error).strip() or type(error).__name__).splitlines()
    # What a client server raised comes after a line that only says so.
    reason = (lines[-1] if lines[0].endswith("from server:") else lines[0])[:300]
    if address == "local":
        return f"Ray can't be started here ({reason}): try --address none, which needs no Ray"
    return (
        f"the Ray cluster at {address} can't be joined ({reason}): see that it runs, that it is of"
        " the same version, and that RAY_AUTH_TOKEN holds its token if it wants one"
    )


@contextmanager
def _own_folder() -> Iterator[str]:
    """Make a folder for Ray's files and remove it afterwards, with those that killed drivers left.

    A driver holds a lock in its folder while it lives.
    """
    parent = tempfile.gettempdir()
    parent = parent if len(parent) <= _LONGEST_PARENT else "/tmp"
    for lock in Path(parent).glob(f"{_PREFIX}*/{_LOCK}"):
        with contextlib.suppress(OSError), lock.open("w") as file:  # another user's, or held
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
    folder = tempfile.mkdtemp(prefix=_PREFIX, dir=parent)
    fresh = Path(folder, "new.lock")
    with fresh.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        fresh.rename(fresh.with_name(_LOCK))  # nobody may find it before it is held
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _own_token() -> Iterator[None]:
    """Give a new cluster a token of its own, unless the user has decided on access."""
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
    before = {name: os.environ.get(name) for name in names}
    if before["RAY_AUTH_MODE"] is not None:
        yield
        return
    if before["RAY_AUTH_TOKEN"] is None:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        # Ray read both once; a later connection of this process must read them again.
        AuthenticationTokenLoader.instance().reset_cache()
        Config.initialize("")
