"""Files of a run folder, JSON and safetensors, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from unicuco.errors import RunError
from unicuco.files import replace_bytes


def save_json(path: Path, document: Mapping[str, Any]) -> None:  # Any: JSON
    """Write a document.

    Raises:
        StorageError: the disk refused; what stood there stays.
    """
    replace_bytes(path, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors.

    Raises:
        StorageError: the disk refused; what stood there stays.
    """
    replace_bytes(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}))


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
