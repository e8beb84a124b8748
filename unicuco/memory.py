"""How much memory this process may still take, and how to take no more than is in use.

It may take the least of what the machine has, what the control groups that the process is in leave
it (a container's limit is one, and the machine's own figure knows nothing of it), and what the
process' own limits do. What this module does not know: what the memory is for; limits of GPUs.
"""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psutil

_OWN_GROUPS: Final = "proc/self/cgroup"
_MOUNTS: Final = "proc/self/mountinfo"
# Limit, usage, and what of the usage the kernel gives up on demand: pages of files. By the type of
# the file system, which is the version of control groups.
_FILES: Final = {
    "cgroup2": ("memory.max", "memory.current", ("inactive_file", "active_file")),
    "cgroup": (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
}

# Of glibc's malloc.h: what `mallopt` sets, and to what. Larger blocks are mappings of their own, as
# it has them itself at first; and so much may stay free at the heap's end.
_TRIM_THRESHOLD: Final = (-1, 16 << 20)
_MMAP_THRESHOLD: Final = (-3, 1 << 17)


def give_back_freed() -> None:
    """Make the C library give freed tensors back to the system at once, in all of this process.

    By itself it comes to keep blocks of up to 32 MiB for later; after passes over many matrices of
    several sizes that is more than is in use: 430 MB for a model of as many, measured. Does nothing
    where the library is not glibc.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
            library.mallopt(*option)


def free_bytes() -> int:
    """Return the bytes that this process may still take; 0 where it has taken all it may."""
    machine = int(psutil.virtual_memory().available)
    return max(0, min(machine, *_left_by_limits(), *left_by_groups(Path("/"))))


def _left_by_limits() -> Iterator[int]:
    """Yield what RLIMIT_DATA and RLIMIT_AS leave, where they are set."""
    taken = psutil.Process().memory_info()
    # Where the system does not tell private memory from all of it, all of it is too much, not less.
    data = getattr(taken, "data", taken.vms)
    for kind, used in ((resource.RLIMIT_DATA, data), (resource.RLIMIT_AS, taken.vms)):
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY:
            yield limit - used


def is_lack_of_memory(error: BaseException) -> bool:
    """Say whether an error is that memory could not be had; libraries raise it in many types."""
    return isinstance(error, MemoryError) or "allocate memory" in str(error)


def left_by_groups(root: Path) -> Iterator[int]:
    """Yield what each control group with a limit leaves: the process' own and those around it.

    Args:
        root: of the file system, whose ``proc`` and mounts are looked at.
    """
    for kind, folder, mount in _own_groups(root):
        while True:
            left = _left_in(folder, kind)
            if left is not None:
                yield left
            if folder == mount:
                break
            folder = folder.parent


def _own_groups(root: Path) -> Iterator[tuple[str, Path, Path]]:
    """Yield the kind, the folder and the mount of the groups that count this process' memory."""
    own: dict[str, str] = {}
    for line in _lines(root / _OWN_GROUPS):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            own["cgroup2"] = path
        elif "memory" in controllers.split(","):
            own["cgroup"] = path
    for line in _lines(root / _MOUNTS):
        place, _, rest = line.partition(" - ")
        mounted, point = place.split(" ")[3:5]
        kind, _, options = rest.split(" ", 2)
        if kind not in own or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        mount = root / point.lstrip("/")
        # A container may see its own group as the mount, under the name that it has outside.
        inside = own[kind].removeprefix(mounted.rstrip("/")).strip("/")
        folder = mount / inside
        is_there = ".." not in folder.parts and folder.is_dir()
        yield kind, folder if is_there else mount, mount


def _left_in(folder: Path, kind: str) -> int | None:
    """Return what a group leaves; none where it has no limit."""
    limit_file, usage_file, reclaimable = _FILES[kind]
    limit, usage = _lines(folder / limit_file), _lines(folder / usage_file)
    if not (limit and usage) or limit[0] == "max":
        return None
    counts = dict(line.split(" ", 1) for line in _lines(folder / "memory.stat"))
    given_up = sum(int(counts.get(name, 0)) for name in reclaimable)
    return int(limit[0]) - int(usage[0]) + given_up


def _lines(path: Path) -> list[str]:
    """Return a small file's lines; none where it is not there or not for this user."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
