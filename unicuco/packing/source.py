"""A model folder as drafts of a container's entries: small files, then each weight file's tensors.

Everything beside the weights travels as it is, so that the folder comes back whole; weights that do
not belong to the model, pickles and subfolders are left out. What it does not know: coding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import numpy as np

from unicuco.errors import ModelError
from unicuco.headers import FileHeader, TensorEntry, read_header
from unicuco.models import weight_files
from unicuco.packing.coder import Bytes
from unicuco.packing.int8 import Int8Matrix
from unicuco.packing.layout import Role
from unicuco.packing.write import Draft

_LEFT_OUT: Final = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf"})


def folder_drafts(
    folder: Path, matrices: Mapping[str, Callable[[], Int8Matrix]] | None = None
) -> list[Draft]:
    """Return the drafts of a folder's entries, in the order in which they are written back.

    Args:
        folder: a model folder.
        matrices: tensor name -> what gives its quantised matrix, for those that are not packed as
            they are.

    Raises:
        ModelError: there are no weights, or a weight file is damaged.
    """
    matrices = matrices or {}
    drafts = [_file_draft(path) for path in _small_files(folder)]
    for path in weight_files(folder):
        header = read_weights_header(path)
        drafts.append(_head_draft(header))
        drafts += [_tensor_draft(header, entry, matrices) for entry in header.entries]
    return drafts


def read_weights_header(path: Path) -> FileHeader:
    """Read a weight file's header and check that its tensors leave no gap.

    Raises:
        ModelError: it can't be read, or is none.
    """
    try:
        header = read_header(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read as safetensors: {error}") from error
    position = 0
    for entry in header.entries:
        if entry.begin != position:
            raise ModelError(f"{path}: the tensors overlap or leave gaps; save the model again")
        position = entry.end
    return header


def read_stored(header: FileHeader, entry: TensorEntry) -> Bytes:
    """Return a tensor's bytes, mapped from the file where it has any.

    Raises:
        ModelError: the file can't be read.
    """
    size = entry.end - entry.begin
    if size == 0:
        return np.empty(0, np.uint8)
    try:
        offset = header.data_offset + entry.begin
        return np.memmap(header.path, np.uint8, mode="r", offset=offset, shape=(size,))
    except (OSError, ValueError) as error:
        raise ModelError(f"{header.path} can't be read: {error}") from error


def _small_files(folder: Path) -> list[Path]:
    found = [path for path in folder.iterdir() if path.is_file() and path.name[0] != "."]
    return sorted(path for path in found if path.suffix not in _LEFT_OUT)


def _file_draft(path: Path) -> Draft:
    return _bytes_draft(Role.FILE, path, path.name, path.stat().st_size)


def _head_draft(header: FileHeader) -> Draft:
    name = f"the head of {header.path.name}"
    return _bytes_draft(Role.HEAD, header.path, name, header.data_offset)


def _bytes_draft(role: Role, path: Path, name: str, size: int) -> Draft:
    def read() -> Bytes:
        try:
            with path.open("rb") as stream:
                data = stream.read(size)
        except OSError as error:
            raise ModelError(f"{path} can't be read: {error.strerror or error}") from error
        return np.frombuffer(data, np.uint8)

    return Draft(
        role=role,
        file=path.name,
        name=name,
        dtype="U8",
        shape=(size,),
        num_bytes=size,
        read=read,
    )


def _tensor_draft(
    header: FileHeader, entry: TensorEntry, matrices: Mapping[str, Callable[[], Int8Matrix]]
) -> Draft:
    matrix = matrices.get(entry.name)
    return Draft(
        role=Role.TENSOR,
        file=header.path.name,
        name=entry.name,
        dtype=entry.dtype,
        shape=entry.shape,
        num_bytes=entry.end - entry.begin,
        read=None if matrix is not None else lambda: read_stored(header, entry),
        matrix=matrix,
    )
