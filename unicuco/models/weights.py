"""Where a model's weight files can be read by ranges of bytes: a folder, or a URL.

A source describes the files as they were when the model was prepared. It is small and pickles, so
that a process anywhere reads only what it needs, of the same files. What this module does not know:
what a tensor is for, and how other processes pass bytes on.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Protocol

from unicuco.errors import ModelError, StorageError
from unicuco.headers import read_header
from unicuco.models.fetching import origin_of
from unicuco.models.folder import check_model_folder, weight_files
from unicuco.remote import RemoteFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """One safetensors file.

    ``header_bytes`` come before the data, and ``header_digest`` is their sha256; ``tensors`` are
    the names of what it holds; ``version`` is what its store calls its state, where it has one.
    """

    name: str
    num_bytes: int
    header_bytes: int
    header_digest: str
    tensors: tuple[str, ...]
    version: str = ""


class WeightSource(Protocol):
    """Files that can be read by ranges."""

    @property
    def files(self) -> tuple[WeightFile, ...]:
        """What there is to read, in name order."""

    @property
    def place(self) -> str:
        """Where they lie, for messages."""

    def check(self, file: WeightFile) -> None:
        """Refuse a file that is there no more, or no longer the one that is described.

        Raises:
            ModelError: the line says which and where.
        """

    def read_into(self, file: WeightFile, begin: int, target: memoryview) -> None:
        """Fill ``target`` with a file's bytes from ``begin`` on.

        Raises:
            ModelError: they can't be read.
        """


@dataclass(frozen=True, slots=True)
class FolderSource:
    """Files in a folder that this process sees."""

    place: str
    files: tuple[WeightFile, ...]

    def check(self, file: WeightFile) -> None:
        """Open the file and compare its size."""
        path = Path(self.place) / file.name
        try:
            with path.open("rb") as stream:
                num_bytes = os.fstat(stream.fileno()).st_size
        except OSError as error:
            if not Path(self.place).is_dir():
                raise ModelError(f"no model folder at {self.place}") from error
            raise ModelError(f"{path} can't be read: {error.strerror}") from error
        if num_bytes != file.num_bytes:
            raise changed(self.place, file)

    def read_into(self, file: WeightFile, begin: int, target: memoryview) -> None:
        """Read from the disk."""
        path = Path(self.place) / file.name
        try:
            with path.open("rb", buffering=0) as stream:
                stream.seek(begin)
                fill_buffer(stream, target)
        except OSError as error:
            raise ModelError(f"{path} can't be read: {error.strerror}") from error


@dataclass(frozen=True, slots=True)
class UrlSource:
    """Files at a URL."""

    remote: RemoteFolder
    files: tuple[WeightFile, ...]

    @property
    def place(self) -> str:
        """The URL."""
        return self.remote.url

    def check(self, file: WeightFile) -> None:
        """Compare the file's size, and the state that it is in."""
        try:
            state = self.remote.states([file.name]).get(file.name)
        except StorageError as error:
            raise ModelError(str(error)) from error
        if state is None or (state.num_bytes, state.version) != (file.num_bytes, file.version):
            raise changed(self.place, file)

    def read_into(self, file: WeightFile, begin: int, target: memoryview) -> None:
        """Ask for the range."""
        try:
            self.remote.read_into(file.name, begin, target, file.num_bytes)
        except StorageError as error:
            raise ModelError(str(error)) from error


def weight_source(folder: Path) -> WeightSource:
    """Return what other processes read a model's weights from: the folder, or where it came from.

    Raises:
        ModelError: no usable model is there.
    """
    own = folder_source(folder)
    origin = origin_of(folder)
    if origin is None:
        return own
    files = [replace(file, version=origin.files[file.name].version) for file in own.files]
    return UrlSource(RemoteFolder(origin.url), tuple(files))


def folder_source(folder: Path) -> FolderSource:
    """Return a folder's files; reads their headers.

    Raises:
        ModelError: no usable model is there.
    """
    check_model_folder(folder)
    return FolderSource(str(folder.resolve()), tuple(_described(weight_files(folder))))


def changed(place: str, file: WeightFile) -> ModelError:
    """Return the error of a file that is not the one that was described."""
    return ModelError(
        f"{place} holds another {file.name} than the model that was prepared; put that one there, "
        "or begin anew"
    )


def fill_buffer(source: FileIO, part: memoryview) -> None:
    """Read exactly ``len(part)`` bytes.

    Raises:
        ModelError: they can't be read, or the file ends too early.
    """
    missing = part
    while missing:
        try:
            count = source.readinto(missing)
        except OSError as error:
            raise ModelError(f"{source.name} can't be read: {error.strerror}") from error
        if not count:
            raise ModelError(f"{source.name} ends too early; fetch the model again")
        missing = missing[count:]


def _described(paths: Sequence[Path]) -> list[WeightFile]:
    files = []
    for path in paths:
        try:
            header = read_header(path)
            with path.open("rb") as stream:
                start = stream.read(header.data_offset)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{path} is cut off or damaged ({error}); fetch the model again"
            ) from error
        files.append(
            WeightFile(
                name=path.name,
                num_bytes=header.num_bytes,
                header_bytes=header.data_offset,
                header_digest=hashlib.sha256(start).hexdigest(),
                tensors=tuple(entry.name for entry in header.entries),
            )
        )
    return files
