"""The header of a safetensors file: which tensor lies where. Never touches a weight.

Format: 8 bytes little-endian header length, the header as JSON, then the data; offsets count from
the data's start.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_LENGTH_BYTES: Final = 8
_MAX_HEADER_BYTES: Final = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor; ``dtype`` is the format's word, e.g. BF16; its data are bytes [begin, end)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FileHeader:
    """A file's tensors in the order of their data, which starts at byte ``data_offset``."""

    path: Path
    entries: tuple[TensorEntry, ...]
    data_offset: int
    num_bytes: int


def read_header(path: Path) -> FileHeader:
    """Read and check the header of one file.

    Raises:
        OSError: the file can't be read.
        ValueError: it is no safetensors file, or shorter or longer than its header says.
    """
    num_bytes = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        if not 2 <= length <= min(_MAX_HEADER_BYTES, num_bytes - _LENGTH_BYTES):
            raise ValueError(f"{path} is no safetensors file")
        header = json.loads(stream.read(length))
    try:
        entries = [
            TensorEntry(
                name=name,
                dtype=str(entry["dtype"]),
                shape=tuple(int(size) for size in entry["shape"]),
                begin=int(entry["data_offsets"][0]),
                end=int(entry["data_offsets"][1]),
            )
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} has a damaged safetensors header: {error!r}") from None
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    offset = _LENGTH_BYTES + length
    if num_bytes != offset + max((entry.end for entry in entries), default=0):
        raise ValueError(f"{path} is cut short or has bytes too many")
    return FileHeader(path=path, entries=tuple(entries), data_offset=offset, num_bytes=num_bytes)
