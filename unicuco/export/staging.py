"""Writes a folder so that it is there as a whole or not at all: temporary name, fsync, rename.

A process that is killed leaves a hidden ``.NAME.HOST.PID.TOKEN.part`` folder beside the target; the
next writer of the same target removes it. What this module does not know: what the files mean.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final

from unicuco.errors import StorageError, UnicucoError, VariantError

_SUFFIX: Final = ".part"
_ASIDE: Final = ".old"
_READ_BYTES: Final = 1 << 20  # at a time, of a file that is being hashed
_SYNC_BYTES: Final = 2 << 20  # that wait for the disk at least before it is asked to take them
_SYNC_SHARE: Final = 1 / 8  # of the file, for large ones: a disk may need milliseconds each time


class HashedFile:
    """A new file whose sha256 is known when it is closed; `staged_folder` brings it to the disk.

    A second thread reads a large file back while it grows and hashes it, for hashing takes longer
    than cutting and writing together. It brings to the disk what it has hashed, too, so that little
    is left to do at the end.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._num_written = 0
        self._is_complete = False
        self._changed = threading.Condition()  # over the two above
        self._digest = hashlib.sha256()
        self._hasher: threading.Thread | None = None
        self._error: OSError | None = None

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append ``data``, which may be overwritten afterwards."""
        view = memoryview(data)
        num_bytes = len(view)
        while view:
            view = view[os.write(self._descriptor, view) :]
        with self._changed:
            self._num_written += num_bytes
            self._changed.notify()
        if self._hasher is None and self._num_written > _READ_BYTES:
            self._hasher = threading.Thread(target=self._hash, name="unicuco-hash", daemon=True)
            self._hasher.start()

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            with self._changed:
                self._is_complete = True
                self._changed.notify()
            if self._hasher is None:
                self._hash()
            elif kind is None:
                os.fsync(self._descriptor)
        finally:
            if self._hasher is not None:
                self._hasher.join()
            os.close(self._descriptor)
        if self._error is not None and kind is None:
            raise self._error

    def sha256(self) -> str:
        """Return the digest of everything written, in hexadecimal; the file is closed."""
        return self._digest.hexdigest()

    def _hash(self) -> None:
        buffer = memoryview(bytearray(min(_READ_BYTES, self._num_written)))
        position = synced = 0
        try:
            while missing := self._wait_for_more(position):
                count = os.preadv(self._descriptor, [buffer[:missing]], position)
                if not count:
                    raise OSError(errno.EIO, f"{self._path} was cut short while it was written")
                self._digest.update(buffer[:count])
                position += count
                if position - synced >= max(_SYNC_BYTES, position * _SYNC_SHARE):
                    os.fsync(self._descriptor)
                    synced = position
        except OSError as error:
            self._error = error

    def _wait_for_more(self, position: int) -> int:
        """Return the bytes there are after ``position``; 0 at the end of the file."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_complete or self._num_written > position)
            return self._num_written - position


@contextlib.contextmanager
def staged_folder(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a new empty folder that becomes ``out`` when the block ends, and vanishes when it fails.

    Args:
        out: the target; missing parents are made, and removed again on failure.
        overwrite: whether a variant that stands at ``out`` may be replaced. Anything else that is
            not an empty folder is always refused.

    Raises:
        VariantError: something stands at ``out``.
        StorageError: the disk is full, read-only or refuses; one line.
    """
    out = Path(os.path.abspath(out))
    check_target(out, overwrite=overwrite)
    made = _missing_parents(out)
    token = secrets.token_hex(4)
    stage = out.parent / f"{_stage_prefix(out)}{os.getpid()}.{token}{_SUFFIX}"
    done = False
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        stage.mkdir()
        yield stage
        # Together at the end: the first call commits the file system's journal for all the others.
        for path in [*stage.iterdir(), stage]:
            _sync(path)
        _put_in_place(stage, out, overwrite=overwrite)
        _sync(out.parent)
        done = True
    except OSError as error:
        raise storage_error(error, out) from error
    finally:
        if not done:
            shutil.rmtree(stage, ignore_errors=True)
            for parent in made:
                with contextlib.suppress(OSError):
                    parent.rmdir()


def check_target(out: Path, *, overwrite: bool) -> None:
    """Refuse a target that stands in the way, before any work is done for it."""
    try:
        _clear_after_killed_writers(out)
        if not os.path.lexists(out):
            return
        if not out.is_dir():
            raise VariantError(f"{out} exists and is no folder; choose another place")
        if not any(out.iterdir()):
            return
    except OSError as error:
        raise storage_error(error, out) from error
    if not (out / "strategy.json").is_file():
        raise VariantError(f"{out} exists and holds no variant; choose another place or empty it")
    if not overwrite:
        raise VariantError(f"{out} holds a variant already; choose another place or remove it")


def storage_error(error: OSError, out: Path) -> UnicucoError:
    """Return the one-line error for a system call that failed while ``out`` was written."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return StorageError(
            f"the disk is full: {out} was not written; free some space and try again"
        )
    if error.errno in {errno.EROFS, errno.EACCES, errno.EPERM}:
        return StorageError(
            f"{out} can't be written: {error.strerror}; choose a place you may write to"
        )
    if error.errno in {errno.ENOTEMPTY, errno.EEXIST}:
        return VariantError(f"{out} was written by another process meanwhile; choose another place")
    return StorageError(f"{out} was not written: {error.strerror or error}")


def _missing_parents(out: Path) -> list[Path]:
    """The parents that don't exist yet, deepest first."""
    return [parent for parent in out.parents if not parent.exists()]


def _clear_after_killed_writers(out: Path) -> None:
    """Remove what killed writers of the same target on this machine left.

    A variant that one of them had set aside and not yet replaced goes back to its place.
    """
    prefix = _stage_prefix(out)
    for path in out.parent.iterdir() if out.parent.is_dir() else ():
        if not path.name.startswith(prefix) or path.suffix not in {_SUFFIX, _ASIDE}:
            continue
        pid = path.name[len(prefix) :].split(".")[0]
        if not pid.isdigit() or _is_running(int(pid)):
            continue
        if path.suffix == _ASIDE and not out.exists():
            path.rename(out)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _stage_prefix(out: Path) -> str:
    return f".{out.name}.{socket.gethostname()}."


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _put_in_place(stage: Path, out: Path, *, overwrite: bool) -> None:
    """Rename the finished folder; what it replaces steps aside first, and back on failure."""
    aside = stage.with_suffix(_ASIDE)
    replaced = overwrite and out.is_dir() and any(out.iterdir())
    if replaced:
        os.rename(out, aside)
    try:
        os.rename(stage, out)
    except OSError:
        if replaced:
            os.rename(aside, out)
        raise
    if replaced:
        shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
