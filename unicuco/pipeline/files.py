"""Files of a run folder, JSON and safetensors, whole or not at all: temporary, synced, renamed."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from unicuco.errors import RunError, StorageError


def save_json(path: Path, document: Mapping[str, Any]) -> None:  # Any: JSON
    """Write a document.

    Raises:
        StorageError: the disk refused; what stood there stays.
    """
    _replace(path, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors.

    Raises:
        StorageError: the disk refused; what stood there stays.
    """
    _replace(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def replace_with(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` make a file under a temporary name beside ``path``, and put it in place.

    Raises:
        StorageError: the disk refused; what stood there stays.
    """
    try:
        descriptor, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix
        )
        os.close(descriptor)
        try:
            write(Path(name))
            with open(name, "rb+") as file:
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{path} can't be written: {error.strerror or error}") from error


def load_json(path: Path) -> dict[str, Any]:  # Any: JSON, checked by whoever reads the fields
    """Read a document.

    Raises:
        RunError: it is missing or damaged.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{path.parent} is no finished run: {path.name} is missing") from error
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is damaged or unreadable ({error}); learn the run again") from error
    if not isinstance(document, dict):
        raise RunError(f"{path} is damaged: it holds no JSON object; learn the run again")
    return document


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read named tensors.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise RunError(f"{path.parent} is no finished run: {path.name} is missing") from error
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} is damaged or unreadable ({error}); learn the run again") from error


def file_digest(path: Path) -> str:
    """Return a file's sha256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace(path: Path, data: bytes) -> None:
    def write(target: Path) -> None:
        target.write_bytes(data)

    replace_with(path, write)
