from __future__ import annotations

import os
from pathlib import Path

import pytest

from unicuco.errors import StorageError
from unicuco.files import replace_bytes, replace_with


def test_a_file_is_replaced_as_a_whole_and_may_be_read_by_all(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for data in (b"old", b"new"):
        replace_bytes(path, data)
        assert path.read_bytes() == data
    assert path.stat().st_mode & 0o777 == 0o644
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_ends_early_leaves_what_stood_there(
    tmp_path: Path, error: BaseException
) -> None:
    path = tmp_path / "x.json"
    replace_bytes(path, b"old")

    def write(target: Path) -> None:
        target.write_bytes(b"ha")
        raise error

    expected = StorageError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        replace_with(path, write)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_what_is_in_place_was_synced_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    replace_bytes(tmp_path / "x", b"four")
    assert synced == [4]


def test_a_place_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"nowhere/x can't be written: No such file"):
        replace_bytes(tmp_path / "nowhere" / "x", b"")
