"""Where a model's files are: from a name to a checked local folder.

A folder is taken when it holds ``config.json`` and safetensors weights, whole. Pickles
(``pytorch_model.bin``) are never opened: reading one can run any code. What this module does not
know: what the weights mean.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from importlib.resources import as_file, files
from pathlib import Path
from typing import Final

from huggingface_hub import snapshot_download

from unicuco.errors import ModelError, StorageError
from unicuco.headers import read_header
from unicuco.models.fetching import fetch_model
from unicuco.models.index import INDEX, SINGLE, parse_index
from unicuco.remote import is_url, local_path

REFERENCE: Final = "reference"
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_HUB_FILES: Final = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
_PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_CHUNK_BYTES: Final = 1 << 22


def resolve_model(name: str) -> Path:
    """Return the local folder of a model.

    Args:
        name: ``reference`` (the embedded model), a folder, a URL that fsspec reaches, or a Hugging
            Face hub id; an existing folder wins.

    Returns:
        A folder that passed `check_model_folder`.

    Raises:
        ModelError: nothing usable is there; the line says what was found and what to do.
    """
    local = local_path(name)
    path = Path(name if local is None else local).expanduser()
    if local is None:
        folder = _fetched(name)
    elif path.is_dir() and name != REFERENCE:
        folder = path
    elif name == REFERENCE:
        folder = _reference_folder()
    elif path.exists():
        raise ModelError(
            f"{path} is a file, not a model folder; give the folder that holds config.json"
        )
    elif _HUB_ID.fullmatch(name) and not is_url(name):
        folder = _download(name)
    else:
        raise ModelError(f"no model folder at {path}")
    check_model_folder(folder)
    return folder


def local_copy(name: str | Path) -> str | Path:
    """Return a model's local copy if its name is a URL, else the name as it is.

    Raises:
        ModelError: there is no model, or it can't be fetched.
    """
    return resolve_model(name) if isinstance(name, str) and is_url(name) else name


def check_model_folder(folder: Path) -> None:
    """Check that the folder holds a configuration and whole safetensors weights, by their headers.

    Raises:
        ModelError: a file is missing, cut off or damaged, or the weights are pickles.
    """
    if not folder.is_dir():
        raise ModelError(f"no model folder at {folder}")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a model folder: it holds no config.json")
    read_config(folder)
    for path in weight_files(folder):
        _tensor_names(path)


def read_config(folder: Path) -> dict[str, object]:
    """Return ``config.json`` as a dictionary.

    Raises:
        ModelError: the file is missing or no JSON object.
    """
    return _read_object(folder / "config.json")


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the model's safetensors files in name order: one, or the shards that the index names.

    Raises:
        ModelError: there are none, or a shard is missing or lacks a tensor that the index promises.
    """
    if (folder / SINGLE).is_file():
        return (folder / SINGLE,)
    if not (folder / INDEX).is_file():
        raise ModelError(_no_weights(folder))
    shards = parse_index(_read(folder / INDEX), str(folder / INDEX))
    for shard, tensors in shards.items():
        if not (folder / shard).is_file():
            raise ModelError(
                f"{folder} lacks the shard {shard} that its index names; fetch the model again"
            )
        missing = tensors - _tensor_names(folder / shard)
        if missing:
            raise ModelError(
                f"{folder / shard} lacks the tensor {min(missing)} that the index names"
            )
    return tuple(folder / shard for shard in sorted(shards))


def model_digest(folder: Path) -> str:
    """Return the sha256 over names and contents of the weight files, in hexadecimal."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        digest.update(f"{path.name}\n{path.stat().st_size}\n".encode())
        for chunk in _chunks(path):
            digest.update(chunk)
    return digest.hexdigest()


def _reference_folder() -> Path:
    resource = files("unicuco") / "reference" / "model"
    # A package on disk: as_file then hands out the real folder, and nothing is unpacked or removed.
    with as_file(resource) as folder:
        found = folder / SINGLE
    if not found.is_file():
        raise ModelError(
            f"the embedded reference model is missing from this installation ({folder}); "
            "reinstall unicuco, or train it: "
            "python -m unicuco.reference.train --out unicuco/reference/model"
        )
    return folder


def _fetched(url: str) -> Path:
    try:
        return fetch_model(url)
    except StorageError as error:
        raise ModelError(str(error)) from error


def _download(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    # The hub client raises its own, requests', httpx' and OS errors; all mean the same to the user.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{name!r} is neither a folder here nor a model that the hub would give: {reason}"
        ) from error


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder} holds its weights as pickles only ({pickles[0]}), which are never read "
            "since they can run code; convert them to safetensors: load the model where you trust "
            "it and save_pretrained(..., safe_serialization=True)"
        )
    if (folder / "adapter_config.json").is_file():
        return f"{folder} is an adapter, not a model; merge it into its base model first"
    return f"{folder} holds no weights: looked for {SINGLE} or {INDEX}"


def _tensor_names(path: Path) -> set[str]:
    try:
        return {entry.name for entry in read_header(path).entries}
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path} is cut off or damaged ({error}); fetch the model again"
        ) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path} can't be read ({error}); fetch the model again") from error


def _read_object(path: Path) -> dict[str, object]:
    try:
        document = json.loads(_read(path))
    except ValueError as error:
        raise ModelError(
            f"{path} can't be read as JSON ({error}); fetch the model again"
        ) from error
    if not isinstance(document, dict):
        raise ModelError(f"{path} holds no JSON object; fetch the model again")
    return document


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk
