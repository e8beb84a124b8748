"""Writes a container in one pass, many threads coding, no tensor held longer than it takes.

Every coded entry is decoded again before it is written, which proves that it comes back bit by bit
and measures what decoding costs; with that and the link's speed an entry is coded only where its
receiver saves time. What it does not know: folders and models; it is given drafts.
"""

from __future__ import annotations

import os
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from unicuco.packing.coder import Bytes, store
from unicuco.packing.int8 import Int8Matrix
from unicuco.packing.layout import (
    PREFIX,
    Entry,
    Header,
    Role,
    Scheme,
    chunk_shapes,
    frame_header,
)
from unicuco.packing.planes import decode_tensor, encode_tensor
from unicuco.packing.speed import Link

_IN_FLIGHT_BYTES: Final = 64 << 20  # of entries that are being coded, beside the largest one
_MOST_CHUNK_GROWTH: Final = 64  # bytes that coding may add to a chunk: heads of eight planes


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """An entry that is yet to be coded; its data are asked for when its turn has come.

    ``read`` gives the folder's bytes, ``matrix`` the quantised matrix of ``shape``; exactly one of
    them is there.
    """

    role: Role
    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    read: Callable[[], Bytes] | None = None
    matrix: Callable[[], Int8Matrix] | None = None


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A chunk as it is and coded, and the processor seconds that decoding it took."""

    data: Bytes
    coded: bytes
    seconds: float


def write_container(
    target: Path,
    drafts: Sequence[Draft],
    *,
    base_digest: str,
    facts: Mapping[str, Any],  # Any: JSON
    link: Link,
    threads: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Header:
    """Write a container; the caller puts it in place when it is whole.

    Args:
        target: a file to make or overwrite.
        drafts: entries in order.
        base_digest: of the model that the folder was cut from.
        facts: plain JSON for the header.
        link: decides what is coded.
        threads: that code; 0: one per core.
        progress: told the bytes done and their total.

    Raises:
        OSError: the disk refused.
    """
    reserved = len(_widest(drafts, base_digest, facts).to_bytes())
    total = sum(draft.num_bytes for draft in drafts)
    entries: list[Entry] = []
    done = 0
    with target.open("wb") as file, ThreadPoolExecutor(threads or available_threads()) as pool:
        file.seek(PREFIX.size + reserved)
        for draft, chunks in _coded(drafts, pool):
            scheme, payload = _choose(draft, chunks, link)
            crc = 0
            for part in payload:
                crc = zlib.crc32(part, crc)
                file.write(part)
            lengths = tuple(len(part) for part in payload)
            entries.append(_entry(draft, scheme, lengths, crc))
            done += draft.num_bytes
            progress(done, total)
        header = Header(base_digest=base_digest, facts=facts, entries=tuple(entries))
        file.seek(0)
        file.write(frame_header(header, reserved))
    return header


def available_threads() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _coded(
    drafts: Sequence[Draft], pool: ThreadPoolExecutor
) -> Iterator[tuple[Draft, list[_Chunk]]]:
    """Code drafts in order, the next ones while the first is waited for."""
    waiting: deque[tuple[Draft, list[Future[_Chunk]]]] = deque()
    in_flight = 0
    for draft in drafts:
        waiting.append((draft, [pool.submit(_code, data, dtype) for data, dtype in _jobs(draft)]))
        in_flight += draft.num_bytes
        while waiting and in_flight > _IN_FLIGHT_BYTES:
            first, futures = waiting.popleft()
            in_flight -= first.num_bytes
            yield first, [future.result() for future in futures]
    for draft, futures in waiting:
        yield draft, [future.result() for future in futures]


def _jobs(draft: Draft) -> Iterator[tuple[Bytes, str]]:
    """Give the chunks of a draft with the type that each is coded as."""
    if draft.matrix is not None:
        matrix = draft.matrix()
        yield np.concatenate([matrix.rows, matrix.columns]).view(np.uint8), "I8"
        data, dtype = matrix.codes.reshape(-1).view(np.uint8), "I8"
    else:
        assert draft.read is not None
        data, dtype = draft.read(), draft.dtype
    start = 0
    per_item = data.size // max(1, int(np.prod(draft.shape, dtype=np.int64)))
    for shape in chunk_shapes(draft.shape):
        size = int(np.prod(shape, dtype=np.int64)) * per_item
        yield data[start : start + size], dtype
        start += size


def _code(data: Bytes, dtype: str) -> _Chunk:
    coded = encode_tensor(data, dtype)
    back = np.empty_like(data)
    started = time.thread_time()
    decode_tensor(coded, dtype, back)
    seconds = time.thread_time() - started
    if not np.array_equal(back, data):
        raise AssertionError(f"coding a chunk of type {dtype} is not lossless")
    return _Chunk(data, coded, seconds)


def _choose(draft: Draft, chunks: list[_Chunk], link: Link) -> tuple[Scheme, list[bytes]]:
    """Return how the entry is written, and its chunks."""
    whole = sum(chunk.data.size for chunk in chunks)
    coded = sum(len(chunk.coded) for chunk in chunks)
    pays = link.pays(whole, coded, sum(chunk.seconds for chunk in chunks))
    if draft.matrix is not None:
        return Scheme.INT8, [c.coded if pays else store(c.data) for c in chunks]
    if pays:
        return Scheme.CODED, [chunk.coded for chunk in chunks]
    return Scheme.RAW, [b"".join(c.data.tobytes() for c in chunks)] if chunks else []


def _entry(draft: Draft, scheme: Scheme, lengths: tuple[int, ...], crc: int) -> Entry:
    return Entry(
        role=draft.role,
        file=draft.file,
        name=draft.name,
        dtype=draft.dtype,
        shape=draft.shape,
        num_bytes=draft.num_bytes,
        scheme=scheme,
        lengths=lengths,
        crc32=crc,
    )


def _widest(drafts: Sequence[Draft], base_digest: str, facts: Mapping[str, Any]) -> Header:
    """Return a header that no real one outgrows: every number at its largest."""
    entries = []
    for draft in drafts:
        most = draft.num_bytes + sum(draft.shape) + _MOST_CHUNK_GROWTH
        chunks = len(chunk_shapes(draft.shape)) + 1
        entries.append(_entry(draft, Scheme.CODED, (most,) * chunks, 2**32 - 1))
    return Header(base_digest=base_digest, facts=facts, entries=tuple(entries))
