"""A container as the folder that it was made of, as a whole, or only its small files.

What it does not know: which model a container should be of.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from unicuco.errors import ContainerError
from unicuco.export.document import DOCUMENT_NAME, VariantDocument
from unicuco.export.staging import HashedFile, staged_folder
from unicuco.packing.layout import Header, Role
from unicuco.packing.read import ContainerReader, read_header


def unpack_container(
    file: Path,
    out: Path,
    *,
    threads: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Header:
    """Unpack a container into the folder that it was made of, or one of 8-bit weights decoded.

    The folder stands at ``out`` as a whole or not at all. A variant of 8-bit weights gets the
    digests of its new weight files into ``strategy.json``, and ``packed`` with what was done to it.

    Args:
        file: the container.
        out: folder to make; it may exist only if it is empty.
        threads: that decode; 0: one per core.
        progress: told the bytes done and their total.

    Raises:
        ContainerError: it is cut short, altered or no container; the line names the tensor.
        VariantError: something stands at ``out``.
        StorageError: the disk refused.
    """
    read_header(file)  # a file that is cut short is refused before anything is written
    done = 0
    digests: dict[str, str] = {}
    manifest = b""
    with staged_folder(out, overwrite=False) as stage, _open(file) as stream:
        reader = ContainerReader(stream, str(file))
        header = reader.header
        total = sum(entry.num_bytes for entry in header.entries)
        entries = reader.loaded(threads=threads)
        for name, group in groupby(entries, key=lambda loaded: loaded.entry.file):
            with HashedFile(stage / name) as target:
                for loaded in group:
                    data = loaded.stored().data
                    target.write(data)
                    manifest = bytes(data) if name == DOCUMENT_NAME else manifest
                    done += loaded.entry.num_bytes
                    progress(done, total)
            digests[name] = target.sha256()
        if manifest and header.facts.get("int8") is not None:
            (stage / DOCUMENT_NAME).write_bytes(_with_digests(manifest, digests, header))
    return header


def read_small_files(file: Path) -> dict[str, bytes]:
    """Return what lies beside the weights, name -> content; no weight is read.

    Raises:
        ContainerError: the container is none, or damaged as far as it was read.
    """
    found: dict[str, bytes] = {}
    try:
        with _open(file) as stream:
            for packed in ContainerReader(stream, str(file)).packed():
                if packed.entry.role is not Role.FILE:
                    break
                found[packed.entry.file] = packed.decoded().tobytes()
    except (OSError, ValueError) as error:
        raise ContainerError(f"{file} can't be read: {error}") from None
    return found


def read_packed_variant(file: Path) -> VariantDocument:
    """Return the manifest of a variant that lies packed, as it was when it was packed.

    Raises:
        ContainerError: the container is damaged, or holds no variant.
    """
    document = read_small_files(file).get(DOCUMENT_NAME)
    if document is None:
        raise ContainerError(f"{file} holds no variant but a whole model: it has no strategy.json")
    try:
        return VariantDocument.parse(document.decode())
    except ValueError as error:
        raise ContainerError(f"{file} can't be read: {DOCUMENT_NAME}: {error}") from None


def _with_digests(manifest: bytes, digests: Mapping[str, str], header: Header) -> bytes:
    """Return a variant's manifest for its decoded 8-bit weights."""
    document: Any = json.loads(manifest)  # Any: JSON, checked when the variant was packed
    document["files"] = {name: digests[name] for name in document["files"]}
    document["packed"] = header.facts["int8"]
    return json.dumps(document, indent=1).encode() + b"\n"


def _open(file: Path) -> BinaryIO:
    try:
        return file.open("rb")
    except OSError as error:
        raise ContainerError(f"{file} can't be read: {error.strerror or error}") from None
