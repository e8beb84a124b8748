"""Ranges of files that only the driver's node has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from cluster import weights
from cluster.weights import NodeSource, start_range_server
from unicuco.errors import ModelError
from unicuco.models.weights import FolderSource, folder_source

pytestmark = pytest.mark.usefixtures("ray_local")


@pytest.fixture
def served(tiny_llama: Path) -> Iterator[NodeSource]:
    """The tiny model's files as a node sees them that does not have its folder."""
    folder = folder_source(tiny_llama)
    server = start_range_server(folder, {})
    yield NodeSource(replace(folder, place="/nowhere"), server)
    ray.kill(server)


def test_ranges_are_the_files_own_however_many_messages_they_take(
    served: NodeSource, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = served.files
    served.check(file)
    expected = (tiny_llama / file.name).read_bytes()
    for chunk_bytes, begin, count in (
        (1000, 5, 9001),
        (1000, 0, 1000),
        (1 << 24, 0, len(expected)),
    ):
        monkeypatch.setattr(weights, "CHUNK_BYTES", chunk_bytes)
        target = bytearray(count)
        served.read_into(file, begin, memoryview(target))
        assert target == expected[begin : begin + count]


def test_what_the_drivers_node_has_not_either_is_one_line(
    served: NodeSource, tmp_path: Path
) -> None:
    (file,) = served.files
    with pytest.raises(ModelError, match=r"^/nowhere holds another model\.safetensors than"):
        served.check(replace(file, num_bytes=file.num_bytes + 1))
    with pytest.raises(ModelError, match=r"^/nowhere/model\.safetensors ends too early"):
        served.read_into(file, file.num_bytes - 10, memoryview(bytearray(11)))
    empty = start_range_server(FolderSource(str(tmp_path), served.files), {})
    with pytest.raises(ModelError, match="neither this node nor the driver's has /nowhere/model"):
        NodeSource(served.folder, empty).check(file)
    ray.kill(empty)
