from __future__ import annotations

import io
import os
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest

from unicuco.errors import ContainerError
from unicuco.packing import ContainerReader, Int8Matrix, Link, Role, write_container
from unicuco.packing.layout import CHUNK_ITEMS, PREFIX, Header, chunk_shapes, parse_prefix
from unicuco.packing.read import read_header
from unicuco.packing.write import Draft

GENERATOR = np.random.default_rng(0)
ARRAYS = {
    "large": GENERATOR.normal(0, 0.02, (700, 300)).astype(np.float32),
    "vector": GENERATOR.normal(0, 1, 5).astype(np.float32),
    "scalar": np.array(2.0, np.float32),
    "empty": np.empty((0, 4), np.float32),
}
MATRIX = Int8Matrix(
    codes=np.rint(GENERATOR.normal(0, 3, (900, 300))).astype(np.int8),
    rows=np.arange(900).astype(np.int8),
    columns=np.arange(300).astype(np.int8),
)


def drafts() -> list[Draft]:
    found = [
        Draft(
            role=Role.TENSOR,
            file="file",
            name=name,
            dtype="F32",
            shape=array.shape,
            num_bytes=array.nbytes,
            read=lambda array=array: array.reshape(-1).view(np.uint8),
        )
        for name, array in ARRAYS.items()
    ]
    int8 = Draft(
        role=Role.TENSOR,
        file="file",
        name="int8",
        dtype="BF16",
        shape=(900, 300),
        num_bytes=2 * 900 * 300,
        matrix=lambda: MATRIX,
    )
    return [*found, int8]


@pytest.fixture(scope="module", params=[None, 1e9], ids=["coded", "raw"])
def file(request: pytest.FixtureRequest, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("container") / "file"
    link = Link(mbps=request.param)
    write_container(path, drafts(), base_digest="d", facts={"a": 1}, link=link)
    return path


def assert_whole(reader: ContainerReader, threads: int = 0) -> None:
    contents = {loaded.entry.name: loaded.content for loaded in reader.loaded(threads=threads)}
    assert list(contents) == [*ARRAYS, "int8"]
    for name, array in ARRAYS.items():
        assert contents[name].tobytes() == array.tobytes()
    matrix = contents["int8"]
    for field in ("codes", "rows", "columns"):
        assert np.array_equal(getattr(matrix, field), getattr(MATRIX, field))


@pytest.mark.parametrize("threads", [1, 3])
def test_what_went_in_comes_out(file: Path, threads: int) -> None:
    with file.open("rb") as stream:
        assert_whole(ContainerReader(stream, "file"), threads)
    header = read_header(file)
    assert (header.base_digest, header.facts) == ("d", {"a": 1})
    assert Header.from_bytes(header.to_bytes()) == header


def test_a_pipe_will_do(file: Path) -> None:
    source, sink = os.pipe()

    def send() -> None:
        with os.fdopen(sink, "wb") as stream:
            stream.write(file.read_bytes())

    sender = threading.Thread(target=send)
    sender.start()
    with os.fdopen(source, "rb") as stream:
        assert_whole(ContainerReader(stream, "pipe"))
    sender.join()


def test_progress_is_told_in_bytes(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    write_container(
        tmp_path / "file",
        drafts(),
        base_digest="d",
        facts={},
        link=Link(),
        progress=lambda done, total: told.append((done, total)),
    )
    total = sum(draft.num_bytes for draft in drafts())
    assert told[-1] == (total, total)
    assert told == sorted(told)


@pytest.mark.parametrize(
    "shape",
    [(), (0,), (5,), (3 * CHUNK_ITEMS + 1,), (7, CHUNK_ITEMS // 3), (2, 3 * CHUNK_ITEMS), (0, 4)],
)
def test_chunks_cover_a_tensor_once(shape: tuple[int, ...]) -> None:
    chunks = chunk_shapes(shape)
    assert sum(int(np.prod(chunk)) for chunk in chunks) == int(np.prod(shape))
    for chunk in chunks:
        assert chunk[1:] == shape[1:]
        assert int(np.prod(chunk)) <= CHUNK_ITEMS or chunk[0] == 1


def test_names_that_lead_out_of_the_folder_are_refused(file: Path) -> None:
    data = file.read_bytes()
    length, _ = parse_prefix(data[: PREFIX.size], "file")
    header = data[PREFIX.size : PREFIX.size + length]
    for name in (b"../f", b"/abs", b"..", b""):
        evil = header.replace(b'"file":"file"', b'"file":"' + name + b'"')
        prefix = PREFIX.pack(data[:8], len(evil), zlib.crc32(evil))
        stream = io.BytesIO(prefix + evil + data[PREFIX.size + length :])
        with pytest.raises(ContainerError, match="is no name of a file"):
            ContainerReader(stream, "file")


def test_a_newer_format_is_refused(file: Path) -> None:
    data = file.read_bytes()
    length, _ = parse_prefix(data[: PREFIX.size], "file")
    newer = data[PREFIX.size : PREFIX.size + length].replace(b'"format":1', b'"format":2', 1)
    stream = io.BytesIO(PREFIX.pack(data[:8], length, zlib.crc32(newer)) + newer)
    with pytest.raises(ContainerError, match="use a newer version"):
        ContainerReader(stream, "file")
