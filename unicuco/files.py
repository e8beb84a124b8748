"""Files that are there whole or not at all (a temporary name, synced, renamed), and their digests.

Several who write the same path at once do no harm: one of their files stands there in the end.
What only one may do at a time, it does `alone_in` a folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from unicuco.errors import StorageError


def replace_with(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file under a temporary name beside ``path``, and put it in place.

    Raises:
        StorageError: the disk refused; what stood there stays.
    """
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(descriptor)
        try:
            write(Path(name))
            with open(name, "rb+") as file:
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"{path} can't be written: {reason}") from error


def replace_bytes(path: Path, data: bytes) -> None:
    """Put a file of these bytes in place.

    Raises:
        StorageError: the disk refused; what stood there stays.
    """
    replace_with(path, lambda target: target.write_bytes(data))


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make a folder if need be, and keep all others who ask here out of it, on any node.

    Who is killed inside leaves nothing locked.

    Raises:
        StorageError: the disk refused.
    """
    try:
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise StorageError(f"{folder} can't be made: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """Return a file's sha256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
