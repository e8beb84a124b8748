"""The layout of a container: one file that holds a model folder, tensor by tensor.

  8 bytes   magic
  4 + 4     length of the header and its crc32, little-endian
  header    JSON, padded with spaces to the length that was reserved before anything was coded
  payload   the entries' chunks, one after the other, in the header's order

So a container is written in one pass and read in one pass, from a pipe too. An entry is a small
file of the folder, the head of a weight file, or one of its tensors; a folder is its entries in
order. The crc32 of an entry is over its bytes as they lie in the container. Against accidents it is
as good as any digest, and four times as fast; against someone who wants to deceive no checksum
helps that lies beside the data. What it does not know: how an entry is coded.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

from unicuco.errors import ContainerError

MAGIC: Final = b"UCUCPACK"
PREFIX: Final = struct.Struct("<8sII")
FORMAT: Final = 1
CHUNK_ITEMS: Final = 1 << 17  # what is decoded at once: one zstd block of 8-bit weights
_MOST_HEADER_BYTES: Final = 1 << 30


class Role(StrEnum):
    """What an entry is of the folder."""

    FILE = "file"
    HEAD = "head"
    TENSOR = "tensor"


class Scheme(StrEnum):
    """How an entry lies in the container: as it is, coded, or as coded 8-bit weights."""

    RAW = "raw"
    CODED = "coded"
    INT8 = "int8"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One entry; ``dtype``, ``shape`` and ``num_bytes`` are those of the folder's file.

    ``file`` is the folder's file; ``name`` the tensor's, or the file's own. ``lengths`` are the
    bytes of its chunks in the container: one for a raw entry; for a coded one a chunk per
    `chunk_shapes`; for 8-bit weights the scales first, then such chunks.
    """

    role: Role
    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    scheme: Scheme
    lengths: tuple[int, ...]
    crc32: int

    @property
    def packed_bytes(self) -> int:
        """Bytes in the container."""
        return sum(self.lengths)

    @property
    def is_coded(self) -> bool:
        """Whether the entry takes less room than its items do as they are, scales left out."""
        whole = self.num_items if self.scheme is Scheme.INT8 else self.num_bytes
        return self.packed_bytes < whole

    @property
    def num_items(self) -> int:
        """Items of the tensor."""
        return math.prod(self.shape)

    def to_dict(self) -> dict[str, object]:
        """Return the entry as the header holds it."""
        return {
            "role": self.role.value,
            "file": self.file,
            "name": self.name,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "bytes": self.num_bytes,
            "scheme": self.scheme.value,
            "lengths": list(self.lengths),
            "crc32": self.crc32,
        }

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Entry:
        """Read an entry of a header; any wrong field raises."""
        entry = cls(
            role=Role(d["role"]),
            file=str(d["file"]),
            name=str(d["name"]),
            dtype=str(d["dtype"]),
            shape=tuple(int(size) for size in d["shape"]),
            num_bytes=int(d["bytes"]),
            scheme=Scheme(d["scheme"]),
            lengths=tuple(int(length) for length in d["lengths"]),
            crc32=int(d["crc32"]),
        )
        if Path(entry.file).name != entry.file or entry.file in {"", ".", ".."}:
            raise ValueError(f"{entry.file!r} is no name of a file")
        if min((entry.num_bytes, *entry.lengths, *entry.shape), default=0) < 0:
            raise ValueError(f"{entry.name} has a negative size")
        return entry


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a container says of itself.

    ``base_digest`` is `model_digest` of the model that the folder was cut from (its own, if it is
    no variant); ``facts`` plain JSON: how it was quantised and measured, speeds it was made for.
    """

    base_digest: str
    facts: Mapping[str, Any]  # Any: JSON
    entries: tuple[Entry, ...]

    def to_bytes(self) -> bytes:
        """Return the header as JSON."""
        document = {
            "format": FORMAT,
            "base_model": {"digest": self.base_digest},
            "facts": dict(self.facts),
            "entries": [entry.to_dict() for entry in self.entries],
        }
        return json.dumps(document, separators=(",", ":"), allow_nan=False).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Header:
        """Read the JSON.

        Raises:
            ValueError: it is no such header, or of a newer format.
        """
        d: Any = json.loads(data)
        if not isinstance(d, dict) or d.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}; use a newer version of unicuco")
        try:
            return cls(
                base_digest=str(d["base_model"]["digest"]),
                facts=dict(d["facts"]),
                entries=tuple(Entry.from_dict(entry) for entry in d["entries"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"its header lacks something: {error!r}") from None

    @property
    def digest(self) -> str:
        """What names the container's contents: the checksums of all of them are in the header."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def packed_bytes(self) -> int:
        """Bytes of all entries in the container."""
        return sum(entry.packed_bytes for entry in self.entries)

    @property
    def tensors(self) -> tuple[Entry, ...]:
        """The entries that are tensors, in order."""
        return tuple(entry for entry in self.entries if entry.role is Role.TENSOR)

    def offsets(self) -> list[int]:
        """Return where every entry begins in the payload."""
        return [0, *accumulate(entry.packed_bytes for entry in self.entries)][:-1]


def chunk_shapes(shape: Sequence[int]) -> list[tuple[int, ...]]:
    """Cut a tensor along its first axis so that no chunk has more than `CHUNK_ITEMS` items.

    A row of more items than that is a chunk of its own. A tensor without items has no chunk.
    """
    num_items = math.prod(shape)
    if num_items == 0:
        return []
    if not shape:
        return [()]
    row = num_items // shape[0]
    height = max(1, CHUNK_ITEMS // row)
    heights = [min(height, shape[0] - start) for start in range(0, shape[0], height)]
    return [(rows, *shape[1:]) for rows in heights]


def frame_header(header: Header, reserved: int) -> bytes:
    """Return prefix and header, padded to ``reserved`` bytes of JSON."""
    data = header.to_bytes().ljust(reserved)
    assert len(data) == reserved, "the header outgrew what was reserved for it"
    return PREFIX.pack(MAGIC, reserved, zlib.crc32(data)) + data


def parse_prefix(data: bytes, name: str) -> tuple[int, int]:
    """Return the header's length and crc32.

    Raises:
        ContainerError: the bytes are not those of a container.
    """
    if len(data) != PREFIX.size or not data.startswith(MAGIC):
        raise ContainerError(f"{name} is no packed model; make one with: unicuco pack")
    _, length, crc = PREFIX.unpack(data)
    if length > _MOST_HEADER_BYTES:
        raise ContainerError(f"{name} was altered: its header is damaged; fetch it again")
    return length, crc


def parse_header(data: bytes, length: int, crc: int, name: str) -> Header:
    """Check and read the header's bytes.

    Raises:
        ContainerError: they are cut short, altered, or of another format.
    """
    if len(data) != length:
        raise ContainerError(f"{name} is cut short: it ends in its header; fetch it again")
    if zlib.crc32(data) != crc:
        raise ContainerError(f"{name} was altered: its header is damaged; fetch it again")
    try:
        return Header.from_bytes(data)
    except ValueError as error:
        raise ContainerError(f"{name} can't be read: {error}") from None
