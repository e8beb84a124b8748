"""Reading a base model's files and writing a variant's: what every kind of cut shares."""

from __future__ import annotations

import functools
import json
from collections.abc import Container, Mapping
from importlib.metadata import PackageNotFoundError, version
from io import FileIO
from pathlib import Path
from typing import Final

import torch

from unicuco.errors import ModelError
from unicuco.export.staging import HashedFile
from unicuco.headers import FileHeader, read_header
from unicuco.models.index import INDEX, SINGLE
from unicuco.models.weights import fill_buffer

# Everything beside the weights that from_pretrained, an engine or a licence may need; never code or
# pickles.
_SMALL_FILES: Final = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer*.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece.*.model",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "NOTICE*",
)


def copy_bytes(source: FileIO, file: HashedFile, count: int, buffer: memoryview) -> None:
    """Copy ``count`` bytes as they are."""
    while count:
        part = buffer[: min(count, len(buffer))]
        fill_buffer(source, part)
        file.write(part)
        count -= len(part)


def copy_small_files(folder: Path, stage: Path, *, present: Container[str]) -> dict[str, str]:
    """Copy what belongs beside the weights and return file name -> sha256."""
    found = {path.name: path for pattern in _SMALL_FILES for path in folder.glob(pattern)}
    files: dict[str, str] = {}
    for name, path in sorted(found.items()):
        stale_index = name == INDEX and SINGLE in present
        if name in present or stale_index or not path.is_file():
            continue
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ModelError(f"{path} can't be read: {error.strerror}") from error
        with HashedFile(stage / name) as file:
            file.write(without_sparsity_config(data) if name == "config.json" else data)
        files[name] = file.sha256()
    return files


def without_sparsity_config(data: bytes) -> bytes:
    """Drop ``sparsity_config`` from a config: vLLM refuses every model that has one."""
    config = json.loads(data)
    if "sparsity_config" not in config:
        return data
    del config["sparsity_config"]
    return json.dumps(config, indent=2).encode() + b"\n"


def write_json(path: Path, document: object) -> dict[str, str]:
    """Write a document and return its file's name -> sha256."""
    with HashedFile(path) as file:
        file.write(json.dumps(document, indent=2).encode() + b"\n")
    return {path.name: file.sha256()}


def write_index(stage: Path, places: Mapping[str, str], num_bytes: int) -> dict[str, str]:
    """Write which file holds which tensor, and all their bytes; return file name -> sha256."""
    index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(places)}
    return write_json(stage / INDEX, index)


def versions_of(provenance: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    """Return the versions that a provenance names, or those of this process."""
    given = provenance.get("versions")
    if isinstance(given, Mapping):
        return tuple((str(name), str(value)) for name, value in given.items())
    return (
        ("unicuco", _version("unicuco")),
        ("torch", torch.__version__),
        ("transformers", _version("transformers")),
    )


@functools.cache  # reading a distribution's metadata takes milliseconds
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "unknown"


def open_file(path: Path) -> FileIO:
    """Open a file of the base model.

    Raises:
        ModelError: it can't be read.
    """
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror}") from error


def read_checked_header(path: Path) -> FileHeader:
    """Read the header of a file of the base model.

    Raises:
        ModelError: it can't be read, or is no safetensors file.
    """
    try:
        return read_header(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read as safetensors: {error}") from error
