from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from tests.range_server import RangeServer, range_server
from unicuco import remote
from unicuco.errors import StorageError
from unicuco.remote import RemoteFolder, RemoteState, cache_folder, is_url, local_path


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    monkeypatch.setattr(remote, "_PAUSE_S", 0.0)
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "file").write_bytes(bytes(range(256)) * 4)
    with range_server(tmp_path / "served") as running:
        yield running


def test_names_are_told_apart() -> None:
    assert [is_url(name) for name in ("s3://b/k", "HTTPS://h", "a/b", "c:/d", "/x")] == [
        True, True, False, False, False
    ]  # fmt: skip
    assert local_path("a/b") == Path("a/b")
    assert local_path("file:///a%20b/c") == Path("/a b/c")
    assert local_path("s3://bucket/key") is None


def test_ranges_of_a_web_server_are_what_was_asked_for_and_no_more(server: RangeServer) -> None:
    folder = pickle.loads(pickle.dumps(RemoteFolder(f"{server.url}/")))
    states = folder.states(["file", "nothing"])
    assert states.keys() == {"file"}
    assert states["file"].num_bytes == 1024
    assert states["file"].version
    part = bytearray(300)
    folder.read_into("file", 700, memoryview(part), 1024)
    assert part == (bytes(range(256)) * 4)[700:1000]
    (given,) = server.given.values()
    assert given == {"file": 300}


def test_another_content_is_another_state(server: RangeServer) -> None:
    folder = RemoteFolder(server.url)
    before = folder.states(["file"])
    (server.folder / "file").write_bytes(bytes(1024))
    assert folder.states(["file"]) != before


def test_a_range_that_breaks_off_is_asked_for_again(server: RangeServer) -> None:
    calls: list[int] = []

    def spoil(name: str, data: bytes) -> bytes:
        calls.append(len(data))
        return data if len(calls) > 1 else data[:-1]

    server.spoil = spoil
    part = bytearray(100)
    RemoteFolder(server.url).read_into("file", 1, memoryview(part), 1024)
    assert part == bytes(range(1, 101))
    assert calls == [100, 100]
    server.spoil = lambda name, data: data[:-1]
    with pytest.raises(StorageError, match=r"/file can't be read: .*99 bytes came of 100 at 1$"):
        RemoteFolder(server.url).read_into("file", 1, memoryview(part), 1024)


def test_a_server_without_ranges_is_refused_before_a_file_fills_the_memory(
    server: RangeServer,
) -> None:
    server.has_ranges = False
    with pytest.raises(StorageError, match="doesn't appear to support range requests"):
        RemoteFolder(server.url).read_into("file", 1, memoryview(bytearray(100)), 1024)


def test_a_server_that_is_gone_is_one_line(server: RangeServer) -> None:
    folder = RemoteFolder(server.url.replace("127.0.0.1", "127.0.0.2"))
    with pytest.raises(StorageError, match=r"/file can't be read: ClientConnector") as error:
        folder.states(["file"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("https://me:secret@host/model", "must carry no credentials"),
        ("https://host/model?token=secret", "without a query"),
        ("nosuch://host/model", "can't be used: Protocol not known"),
    ],
)
def test_a_url_that_can_not_be_used_is_one_line_without_its_secret(url: str, line: str) -> None:
    with pytest.raises(StorageError, match=line) as error:
        RemoteFolder(url)
    assert "secret" not in str(error.value)


def test_a_small_file_that_is_large_is_refused() -> None:
    with fsspec.open("memory://test-remote/large", "wb") as file:
        file.write(bytes(100))
    folder = RemoteFolder("memory://test-remote")
    state = folder.states(["large"])["large"]
    assert folder.read("large", state, 100) == bytes(100)
    with pytest.raises(StorageError, match="has 100 bytes, more than such a file may have"):
        folder.read("large", state, 99)
    with pytest.raises(StorageError, match="there is no memory://test-remote/small"):
        folder.read("small", RemoteState(num_bytes=1, version=""), 1)


def test_copies_lie_where_the_user_says_and_are_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNICUCO_CACHE", str(tmp_path / "cache"))
    folder = cache_folder("models")
    assert folder == tmp_path / "cache" / "models"
    assert folder.stat().st_mode & 0o077 == 0
    (tmp_path / "file").touch()
    monkeypatch.setenv("UNICUCO_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="set UNICUCO_CACHE"):
        cache_folder("models")
