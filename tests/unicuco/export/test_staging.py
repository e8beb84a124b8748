from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from unicuco.errors import StorageError, VariantError
from unicuco.export import read_variant
from unicuco.export.staging import staged_folder
from unicuco.testing.variants import VariantCase, make_plan


def test_what_stands_at_the_target_is_never_harmed(llama: VariantCase, tmp_path: Path) -> None:
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "keep.txt").write_text("mine")
    file.write_text("mine")
    for out in (full, file):
        for overwrite in (False, True):
            with pytest.raises(VariantError, match="choose another place"):
                llama.write(out, overwrite=overwrite)
    assert (full / "keep.txt").read_text() == file.read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"]


def test_a_variant_is_replaced_only_when_asked(llama: VariantCase, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is taken
    llama.write(out)
    other = llama.space.uniform(0.3)
    plan = make_plan(llama.profile, llama.space, other)
    with pytest.raises(VariantError, match="holds a variant already"):
        llama.write(out, plan=plan)
    assert read_variant(out).plan == llama.plan
    llama.write(out, plan=plan, overwrite=True)
    assert read_variant(out).plan == plan
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_one_line_and_leaves_nothing(
    llama: VariantCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = 3000
    real = os.write

    def write(descriptor: int, data: memoryview) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = real(descriptor, data[:room])  # a short write first, as a real disk does
        room -= count
        return count

    monkeypatch.setattr("unicuco.export.staging.os.write", write)
    with pytest.raises(StorageError, match="disk is full") as caught:
        llama.write(tmp_path / "new" / "deep" / "out")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with room for 20 kB: a real small file system for root, else refused writes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=20k", "tmpfs", str(disk)]
    if os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0:
        yield disk
        subprocess.run(["umount", str(disk)], check=True)
        return

    def write(descriptor: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("unicuco.export.staging.os.write", write)
    yield disk


def test_a_really_full_disk_is_one_line_and_leaves_nothing(
    llama: VariantCase, small_disk: Path
) -> None:
    with pytest.raises(StorageError, match="disk is full"):
        llama.write(small_disk / "out")
    assert not list(small_disk.iterdir())


def test_a_read_only_place_is_one_line(
    llama: VariantCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("unicuco.export.staging.Path.mkdir", refuse)
    with pytest.raises(StorageError, match="may write to"):
        llama.write(tmp_path / "out")


def test_a_writer_killed_in_the_middle_leaves_nothing_at_the_target(
    llama: VariantCase, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    script = f"""
        import os, signal, sys
        from pathlib import Path
        from unicuco.export.staging import HashedFile, staged_folder
        with staged_folder(Path({str(out)!r}), overwrite=False) as stage:
            with HashedFile(stage / "model.safetensors") as file:
                file.write(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=Path.cwd())
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    assert [p.suffix for p in tmp_path.iterdir()] == [".part"]
    llama.write(out)  # the next writer clears what the killed one left
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    read_variant(out)


def test_a_variant_that_a_killed_writer_set_aside_comes_back(
    llama: VariantCase, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    llama.write(out)
    dead = subprocess.Popen(["true"])
    dead.wait()
    out.rename(tmp_path / f".out.{socket.gethostname()}.{dead.pid}.00000000.old")
    with pytest.raises(VariantError, match="holds a variant already"):
        llama.write(out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    read_variant(out)


def test_of_two_writers_at_once_one_wins_and_the_other_says_so(
    llama: VariantCase, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def write_while_another_finishes() -> None:
        with staged_folder(out, overwrite=False) as stage:
            (stage / "mine").write_text("late")
            llama.write(out)

    with pytest.raises(VariantError, match="another process"):
        write_while_another_finishes()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    read_variant(out)
