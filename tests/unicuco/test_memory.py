from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from unicuco.memory import free_bytes, left_by_groups

OLD = "35 31 0:32 {root} /sys/fs/cgroup/memory rw shared:1 - cgroup cgroup rw,memory\n"
NEW = "35 31 0:32 {root} /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}".rstrip() + "\n")


def own_groups(root: Path, lines: str, mounts: str) -> None:
    group(root / "proc" / "self", cgroup=lines, mountinfo=f"1 0 0:1 / / rw - ext4 x rw\n{mounts}")


def test_every_group_around_the_process_counts_and_its_file_pages_do_not(tmp_path: Path) -> None:
    mount = tmp_path / "sys/fs/cgroup"
    own_groups(tmp_path, "0::/a/b", NEW.format(root="/"))
    stat = "anon 600\nfile 300\ninactive_file 200\nactive_file 50"
    group(mount, memory__stat="anon 9")
    group(mount / "a", memory__max=2000, memory__current=1000, memory__stat=stat)
    group(mount / "a/b", memory__max="max", memory__current=900, memory__stat=stat)
    assert list(left_by_groups(tmp_path)) == [1250]
    group(mount / "a/b", memory__max=1000)
    assert list(left_by_groups(tmp_path)) == [350, 1250]


def test_groups_of_the_first_version_are_read_too(tmp_path: Path) -> None:
    own_groups(
        tmp_path,
        "5:cpu,cpuacct:/elsewhere\n4:memory:/a",
        "33 31 0:30 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n" + OLD.format(root="/"),
    )
    group(
        tmp_path / "sys/fs/cgroup/memory/a",
        memory__limit_in_bytes=1000,
        memory__usage_in_bytes=800,
        memory__stat="total_inactive_file 100\ntotal_active_file 0",
    )
    assert list(left_by_groups(tmp_path)) == [300]


@pytest.mark.parametrize(
    ("own", "root"),
    [("/docker/7", "/docker/7"), ("/docker/7", "/"), ("/../..", "/")],
    ids=["mounted as the root", "named as outside", "above what can be seen"],
)
def test_a_container_finds_its_own_group_at_the_mount(tmp_path: Path, own: str, root: str) -> None:
    own_groups(tmp_path, f"0::{own}", NEW.format(root=root))
    group(tmp_path / "sys/fs/cgroup", memory__max=1000, memory__current=400, memory__stat="anon 1")
    assert list(left_by_groups(tmp_path)) == [600]


def test_without_groups_there_are_no_limits_by_them(tmp_path: Path) -> None:
    assert list(left_by_groups(tmp_path)) == []


@pytest.mark.parametrize("kind", ["RLIMIT_DATA", "RLIMIT_AS"])
def test_the_process_own_limits_count(kind: str) -> None:
    assert free_bytes() > 2**28, "more than what is asked for below"
    program = (
        "import resource, psutil\n"
        "from unicuco.memory import free_bytes\n"
        "info = psutil.Process().memory_info()\n"
        f"used = info.data if {kind!r} == 'RLIMIT_DATA' else info.vms\n"
        f"resource.setrlimit(resource.{kind}, (used + 2**27, used + 2**27))\n"
        "before = free_bytes()\n"
        "taken = bytearray(2**26)\n"
        "print(before, free_bytes())\n"
        f"resource.setrlimit(resource.{kind}, (used, used))\n"
        "print(free_bytes())\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    before, after, none = map(int, output.split())
    assert 0.9 * 2**27 < before <= 2**27
    assert before - 1.1 * 2**26 < after <= before - 2**26
    assert none == 0
