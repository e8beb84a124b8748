"""A model at a URL: its files in a private local folder, which remembers where they came from.

Whoever needs every byte (its digest, a pass over all blocks, a variant) reads the copy, made once
per state of the model; shards elsewhere read only their own ranges from the URL
(`unicuco.models.weights`). Safetensors and small text files are fetched, never code or pickles.
What this module does not know: what the files mean.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Final

from unicuco.errors import ModelError, StorageError
from unicuco.files import replace_bytes, replace_with
from unicuco.models.index import INDEX, SINGLE, parse_index
from unicuco.remote import RemoteFolder, RemoteState, cache_folder

_ORIGIN: Final = "origin.json"
_CONFIG: Final = "config.json"
# What may lie beside the weights, by name: a web server tells no names.
_SMALL_FILES: Final = (
    _CONFIG, INDEX, "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "spiece.model",
    "sentencepiece.bpe.model", "preprocessor_config.json", "processor_config.json", "LICENSE",
    "NOTICE", "strategy.json", "rows.json",
)  # fmt: skip
_MAX_SMALL_BYTES: Final = 1 << 27
_ROOM: Final = 1.02  # the disk's own tables


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a folder's files were fetched from, and the state that each was in."""

    url: str
    files: dict[str, RemoteState]


def origin_of(folder: Path) -> Origin | None:
    """Return where a folder's files were fetched from; none: they were made here."""
    try:
        document = json.loads((folder / _ORIGIN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    files = {name: RemoteState(**state) for name, state in document["files"].items()}
    return Origin(url=document["url"], files=files)


def place_of(folder: Path) -> str:
    """Return what names a model for others: the URL it was fetched from, or its whole path."""
    origin = origin_of(folder)
    return str(folder.resolve()) if origin is None else origin.url


def fetch_model(url: str) -> Path:
    """Return a local folder with a model's files, fetched where they are not there yet.

    Args:
        url: of the model's folder.

    Raises:
        ModelError: there is no model, or it changed meanwhile.
        StorageError: the store can't be reached or refuses, or the disk has no room.
    """
    remote = RemoteFolder(url)
    small = remote.states(_SMALL_FILES)
    if _CONFIG not in small:
        raise ModelError(
            f"no model at {remote.url}: there is no {_CONFIG}, or it may not be read from here"
        )
    contents = {
        name: remote.read(name, state, _MAX_SMALL_BYTES) for name, state in sorted(small.items())
    }
    index = contents.get(INDEX)
    names = [SINGLE] if index is None else sorted(parse_index(index, f"{remote.url}/{INDEX}"))
    weights = remote.states(names)
    for name in names:
        if name not in weights:
            raise ModelError(f"{remote.url} holds no {name}; only safetensors weights are read")
    folder = _folder_of(remote.url, contents, weights)
    origin = Origin(url=remote.url, files=weights)
    if origin_of(folder) != origin or not all(state.version for state in weights.values()):
        _fetch_weights(remote, weights, folder)
        if remote.states(names) != weights:
            raise ModelError(f"{remote.url} changed while it was fetched; try again")
        for name, data in contents.items():
            replace_bytes(folder / name, data)
        replace_bytes(folder / _ORIGIN, json.dumps(asdict(origin)).encode())
    return folder


def _folder_of(url: str, contents: dict[str, bytes], weights: dict[str, RemoteState]) -> Path:
    """Return the folder of this state of a model, made if missing; another state has another."""
    digest = hashlib.sha256(url.encode())
    for name, data in contents.items():
        digest.update(f"\n{name} {hashlib.sha256(data).hexdigest()}".encode())
    for name, state in sorted(weights.items()):
        digest.update(f"\n{name} {state.num_bytes} {state.version}".encode())
    folder = cache_folder("models") / digest.hexdigest()
    try:
        folder.mkdir(exist_ok=True, mode=0o700)
    except OSError as error:
        raise StorageError(f"{folder} can't be made: {error.strerror}") from error
    return folder


def _fetch_weights(remote: RemoteFolder, weights: dict[str, RemoteState], folder: Path) -> None:
    """Fetch the files that are not there yet; one that was broken off begins anew."""
    missing = {
        name: state
        for name, state in weights.items()
        if not (state.version and (folder / name).is_file())
    }
    _check_room(remote.url, missing.values(), folder)
    for name, state in missing.items():
        replace_with(folder / name, partial(remote.fetch, name, state))


def _check_room(url: str, states: Iterable[RemoteState], folder: Path) -> None:
    needed = int(sum(state.num_bytes for state in states) * _ROOM)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(
            f"{url} takes {needed} bytes and {folder} has room for {free}; "
            "set UNICUCO_CACHE to a folder with room"
        )
