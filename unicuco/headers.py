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
        prefix = stream.read(_LENGTH_BYTES)
        length = int.from_bytes(prefix, "little")
        if not 2 <= length <= min(_MAX_HEADER_BYTES, num_bytes - _LENGTH_BYTES):
            raise ValueError(f"{path} is no safetensors file")
        header = prefix + stream.read(length)
    entries = parse_header(header, str(path))
    offset = len(header)
    if num_bytes != offset + max((entry.end for entry in entries), default=0):
        raise ValueError(f"{path} is cut short or has bytes too many")
    return FileHeader(path=path, entries=entries, data_offset=offset, num_bytes=num_bytes)


def parse_header(header: bytes, name: str) -> tuple[TensorEntry, ...]:
    """Return a file's tensors in the order of their data.

    Args:
        header: all that comes before the data.
        name: of the file, for the message.

    Raises:
        ValueError: it is no header.
    """
    try:
        entries = [
            TensorEntry(
                name=tensor,
                dtype=str(entry["dtype"]),
                shape=tuple(int(size) for size in entry["shape"]),
                begin=int(entry["data_offsets"][0]),
                end=int(entry["data_offsets"][1]),
            )
            for tensor, entry in json.loads(header[_LENGTH_BYTES:]).items()
            if tensor != "__metadata__"
        ]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{name} has a damaged safetensors header: {error!r}") from None
    return tuple(sorted(entries, key=lambda entry: (entry.begin, entry.end)))


def read_metadata(header: FileHeader) -> dict[str, str]:
    """Return the words that whoever wrote a file put into its header.

    Raises:
        OSError: the file can't be read.
        ValueError: it is no longer the file that it was.
    """
    with header.path.open("rb") as stream:
        text = stream.read(header.data_offset)[_LENGTH_BYTES:]
    words = json.loads(text).get("__metadata__", {})
    return {str(name): str(word) for name, word in words.items()}
