"""Reads a container: in one pass from any stream, checked entry by entry, many threads decoding.

No more is in memory than what is being decoded and what the caller keeps. What it does not know:
what is done with the entries.
"""

from __future__ import annotations

import math
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import BinaryIO, Final, cast

import numpy as np
import torch
from numpy.typing import NDArray

from unicuco.errors import ContainerError
from unicuco.packing.coder import Bytes, decode
from unicuco.packing.int8 import FLOATS, Int8Matrix
from unicuco.packing.layout import (
    PREFIX,
    Entry,
    Header,
    Role,
    Scheme,
    chunk_shapes,
    parse_header,
    parse_prefix,
)
from unicuco.packing.planes import decode_tensor
from unicuco.packing.write import available_threads

_IN_FLIGHT_BYTES: Final = 64 << 20  # of entries that are being decoded, beside the largest one


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedEntry:
    """An entry with its checked bytes, not yet decoded."""

    entry: Entry
    payload: memoryview

    @property
    def num_chunks(self) -> int:
        """How many parts can be decoded each by itself, scales left out."""
        return len(self.entry.lengths) - (self.entry.scheme is Scheme.INT8)

    def scales(self) -> Int8Matrix:
        """Return an 8-bit matrix without rows of codes: its scales alone."""
        rows, columns = self.entry.shape
        both = np.empty(rows + columns, np.uint8)
        decode(self.payload[: self.entry.lengths[0]], both)
        exponents = both.view(np.int8)
        codes = np.empty((0, columns), np.int8)
        return Int8Matrix(codes=codes, rows=exponents[:rows], columns=exponents[rows:])

    def decode_chunk(self, index: int, out: Bytes) -> None:
        """Decode one chunk: codes of an 8-bit matrix, or the tensor's bytes.

        Raises:
            ValueError: the chunk does not hold what the header says.
        """
        lengths = self.entry.lengths
        place = index + (self.entry.scheme is Scheme.INT8)
        start = sum(lengths[:place])
        part = self.payload[start : start + lengths[place]]
        match self.entry.scheme:
            case Scheme.RAW:
                out[:] = np.frombuffer(part, np.uint8)
            case Scheme.CODED:
                decode_tensor(part, self.entry.dtype, out)
            case Scheme.INT8:
                decode(part, out)

    def decoded(self) -> Bytes:
        """Return the bytes of an entry that is no 8-bit matrix.

        Raises:
            ValueError: a chunk does not hold what the header says.
        """
        if self.entry.scheme is Scheme.RAW:
            return np.frombuffer(self.payload, np.uint8)
        out = np.empty(self.entry.num_bytes, np.uint8)
        per_item = out.size // max(1, self.entry.num_items)
        ends = accumulate(math.prod(shape) * per_item for shape in chunk_shapes(self.entry.shape))
        for index, (start, end) in enumerate(pairwise([0, *ends])):
            self.decode_chunk(index, out[start:end])
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A decoded entry: its bytes as the folder stores them, or the 8-bit matrix in their place."""

    entry: Entry
    content: Bytes | Int8Matrix

    def stored(self) -> Bytes:
        """Return the bytes that the folder's file holds; 8-bit weights in its own type."""
        if not isinstance(self.content, Int8Matrix):
            return self.content
        weights = self.content.dequantise().to(FLOATS[self.entry.dtype])
        return cast("Bytes", weights.view(torch.uint8).reshape(-1).numpy())


class ContainerReader:
    """Reads a container from a stream, once and in order.

    Args:
        stream: opened for binary reading; need not be seekable.
        name: of the container, for errors.

    Raises:
        ContainerError: the stream holds no container, or its header is damaged.
        OSError: the stream can't be read.
    """

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream = stream
        self._name = name
        length, crc = parse_prefix(stream.read(PREFIX.size), name)
        self.header: Header = parse_header(stream.read(length), length, crc, name)

    def packed(self) -> Iterator[PackedEntry]:
        """Give the entries as they are, each one checked; at the end nothing may follow.

        Raises:
            ContainerError: one line that names the entry that is cut short or altered.
        """
        for entry in self.header.entries:
            payload = memoryview(bytearray(entry.packed_bytes))
            if _read_into(self._stream, payload) != len(payload):
                raise ContainerError(
                    f"{self._name} is cut short: it ends in {entry.name}; fetch it again"
                )
            if zlib.crc32(payload) != entry.crc32:
                raise ContainerError(f"{self._name} was altered: {entry.name}; fetch it again")
            yield PackedEntry(entry=entry, payload=payload)
        if self._stream.read(1):
            raise ContainerError(f"{self._name} has bytes behind its end; fetch it again")

    def loaded(self, *, threads: int = 0) -> Iterator[Loaded]:
        """Give the entries decoded, in order, the next ones decoding while one is used.

        Args:
            threads: that decode; 0: one per core.

        Raises:
            ContainerError: one line that names the entry that is cut short or altered.
        """
        waiting: deque[_Pending] = deque()
        in_flight = 0
        with ThreadPoolExecutor(threads or available_threads()) as pool:
            for packed in self.packed():
                waiting.append(_start(packed, pool))
                in_flight += packed.entry.num_bytes
                while waiting and (in_flight > _IN_FLIGHT_BYTES or waiting[0].is_done):
                    first = waiting.popleft()
                    in_flight -= first.loaded.entry.num_bytes
                    yield first.result(self._name)
            while waiting:
                yield waiting.popleft().result(self._name)


@dataclass(frozen=True, slots=True)
class _Pending:
    """An entry whose chunks are being decoded."""

    loaded: Loaded
    chunks: list[Future[None]]

    @property
    def is_done(self) -> bool:
        return all(chunk.done() for chunk in self.chunks)

    def result(self, name: str) -> Loaded:
        try:
            for chunk in self.chunks:
                chunk.result()
        except ValueError as error:
            where = self.loaded.entry.name
            raise ContainerError(f"{name}: {where} can't be decoded: {error}") from None
        return self.loaded


def _start(packed: PackedEntry, pool: ThreadPoolExecutor) -> _Pending:
    """Begin to decode an entry."""
    entry = packed.entry
    if entry.scheme is Scheme.RAW:
        return _Pending(Loaded(entry=entry, content=np.frombuffer(packed.payload, np.uint8)), [])
    shapes = chunk_shapes(entry.shape)
    if packed.num_chunks != len(shapes):
        raise ContainerError(f"{entry.name} has {packed.num_chunks} chunks, not {len(shapes)}")
    content: Bytes | Int8Matrix
    if entry.scheme is Scheme.INT8:
        try:
            scales = packed.scales()
        except ValueError as error:
            raise ContainerError(f"{entry.name} can't be decoded: {error}") from None
        codes = np.empty(entry.shape, np.int8)
        content = Int8Matrix(codes=codes, rows=scales.rows, columns=scales.columns)
        data: NDArray[np.uint8] = codes.reshape(-1).view(np.uint8)
    else:
        data = content = np.empty(entry.num_bytes, np.uint8)
    per_item = data.size // max(1, entry.num_items)
    ends = accumulate(math.prod(shape) * per_item for shape in shapes)
    starts = [0, *ends]
    chunks = [
        pool.submit(packed.decode_chunk, index, data[start:end])
        for index, (start, end) in enumerate(pairwise(starts))
    ]
    return _Pending(Loaded(entry=entry, content=content), chunks)


def read_header(path: Path) -> Header:
    """Read a container's header, and check that the file is as long as it says.

    Raises:
        ContainerError: it is no container, damaged, or of another length.
    """
    try:
        with path.open("rb") as stream:
            reader = ContainerReader(stream, str(path))
            offset = stream.tell()
        num_bytes = path.stat().st_size
    except OSError as error:
        raise ContainerError(f"{path} can't be read: {error.strerror or error}") from None
    expected = offset + reader.header.packed_bytes
    if num_bytes < expected:
        starts = [offset + start for start in reader.header.offsets()]
        ends = zip(starts, reader.header.entries, strict=True)
        cut = next(e for start, e in ends if start + e.packed_bytes > num_bytes)
        raise ContainerError(f"{path} is cut short: it ends in {cut.name}; fetch it again")
    if num_bytes > expected:
        raise ContainerError(f"{path} has bytes behind its end; fetch it again")
    return reader.header


def check_base(header: Header, digest: str, name: str) -> None:
    """Refuse a container that was made of another base model.

    Raises:
        ContainerError: it was.
    """
    if header.base_digest != digest:
        raise ContainerError(
            f"{name} was packed from base model {header.base_digest[:12]}, not {digest[:12]}; "
            "give the container or the base that belongs to it"
        )


def of_role(header: Header, role: Role) -> tuple[Entry, ...]:
    """Return the entries of a role, in order."""
    return tuple(entry for entry in header.entries if entry.role is role)


def _read_into(stream: BinaryIO, out: memoryview) -> int:
    """Fill ``out`` from the stream; fewer bytes only at its end."""
    count = 0
    while count < len(out):
        part = stream.read(min(len(out) - count, 1 << 20))
        if not part:
            break
        out[count : count + len(part)] = part
        count += len(part)
    return count
