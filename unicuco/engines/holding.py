"""A model's files, held for as long as an engine serves it.

A folder is hard-linked, so that it can be deleted meanwhile; a container is unpacked, which takes
room for the whole model. Either happens in a scratch folder. What this module does not know:
engines.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from unicuco.errors import EngineError
from unicuco.export.document import DOCUMENT_NAME
from unicuco.models import model_digest
from unicuco.packing import unpack_container


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A model as it was when it was asked for.

    ``named`` is what was asked for, ``folder`` where its files are; ``packed_digest`` that of the
    container that they come from, or none.
    """

    named: Path
    folder: Path
    packed_digest: str | None = None

    def digest(self) -> str:
        """Return what names the contents: a variant's manifest, a container's header, or all."""
        document = self.folder / DOCUMENT_NAME
        if self.packed_digest is not None:
            return self.packed_digest
        if document.is_file():
            return hashlib.sha256(document.read_bytes()).hexdigest()
        return model_digest(self.folder)

    def release(self) -> None:
        """Remove what was made to hold it."""
        if self.folder != self.named:
            shutil.rmtree(self.folder, ignore_errors=True)


def hold(model: Path, scratch: Path | None, *, threads: int = 0) -> Held:
    """Hold a model folder, or what a container holds.

    Args:
        model: the folder, or the file.
        scratch: where; on the folder's file system, or the folder is read where it lies. None:
            folders are, and containers are unpacked in the system's temporary folder.
        threads: that unpack; 0: one per core.

    Raises:
        EngineError: the folder can't be read.
        ContainerError: the container is cut short or altered; the line names the tensor.
        StorageError: there is no room.
    """
    if scratch is not None:
        scratch.mkdir(parents=True, exist_ok=True)
    if model.is_file():
        return _unpacked(model, scratch, threads)
    return Held(named=model, folder=model if scratch is None else _linked(model, scratch))


def _unpacked(file: Path, scratch: Path | None, threads: int) -> Held:
    place = Path(tempfile.mkdtemp(dir=scratch, prefix=f"{file.stem}-"))
    try:
        header = unpack_container(file, place, threads=threads)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    return Held(named=file, folder=place, packed_digest=header.digest)


def _linked(folder: Path, scratch: Path) -> Path:
    """Return a folder of hard links; the folder itself where there can be none."""
    place = Path(tempfile.mkdtemp(dir=scratch, prefix=f"{folder.name}-"))
    try:
        for file in folder.iterdir():
            if file.is_file():
                os.link(file.resolve(), place / file.name)
    except OSError as error:
        shutil.rmtree(place, ignore_errors=True)
        if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK):
            return folder
        raise EngineError(f"{folder} can't be read: {error.strerror}") from None
    return place
