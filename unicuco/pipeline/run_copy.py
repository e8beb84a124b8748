"""A run at a URL: what lies there, and a local copy of as much of it as is asked for.

``snapshot.json`` names every file of the run with size and sha256; it is written last, so what it
names is a whole state of the run, finished or not. A copy belongs to one snapshot and is checked
file by file. What this module does not know: what the files mean, and how they came there
(`unicuco.pipeline.publishing`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Final

from unicuco.errors import RunError
from unicuco.files import file_digest, replace_with
from unicuco.remote import RemoteFolder, RemoteState, cache_folder, local_path

SNAPSHOT: Final = "snapshot.json"
_FORMAT: Final = 1
_MAX_BYTES: Final = 1 << 26
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileState:
    """One file's contents."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A state of a run: files by name, ``/`` between folders; ``writer`` tells drivers apart.

    ``coming`` are the files that are being replaced, as they will be: a driver that is killed
    meanwhile leaves some of them as the one and some as the other.
    """

    writer: str
    files: dict[str, FileState]
    coming: dict[str, FileState] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """Return it as `parse_snapshot` reads it."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=1).encode() + b"\n"


def parse_snapshot(data: bytes, where: str) -> Snapshot:
    """Read a snapshot.

    Raises:
        RunError: it is damaged, of another format, or names what lies outside the run.
    """
    try:
        document = json.loads(data)
        files, coming = (
            {name: FileState(**state) for name, state in document[kind].items()}
            for kind in ("files", "coming")
        )
        snapshot = Snapshot(writer=str(document["writer"]), files=files, coming=coming)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{where} is damaged ({error!r}); publish the run again") from error
    if document.get("format") != _FORMAT:
        raise RunError(f"{where} has format {document.get('format')}; this version reads {_FORMAT}")
    for name, state in (*files.items(), *coming.items()):
        parts = PurePosixPath(name).parts
        is_inside = parts and "/".join(parts) == name and ".." not in parts and parts[0] != "/"
        if not (is_inside and _SHA256.fullmatch(str(state.sha256)) and state.num_bytes >= 0):
            raise RunError(f"{where} names {name!r}, which is no file of a run")
    return snapshot


def read_snapshot(remote: RemoteFolder) -> Snapshot | None:
    """Return the state of the run at a URL; none: there is no run.

    Raises:
        RunError: see `parse_snapshot`.
        StorageError: the store can't be reached or refuses.
    """
    state = remote.states([SNAPSHOT]).get(SNAPSHOT)
    if state is None:
        return None
    data = remote.read(SNAPSHOT, state, _MAX_BYTES)
    return parse_snapshot(data, f"{remote.url}/{SNAPSHOT}")


def fetch_files(
    remote: RemoteFolder, snapshot: Snapshot, folder: Path, wanted: Callable[[str], bool]
) -> None:
    """Fetch those files of a run that are wanted and not yet in a folder.

    Raises:
        RunError: a file is not the one that the snapshot names.
        StorageError: the store or the disk refuses.
    """
    missing = [name for name in snapshot.files if wanted(name) and not (folder / name).is_file()]
    states = remote.states(missing)
    for name in missing:
        known = {snapshot.files[name], snapshot.coming.get(name, snapshot.files[name])}
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_with(path, partial(_fetch, remote, name, states.get(name), known))


def _fetch(
    remote: RemoteFolder, name: str, state: RemoteState | None, known: set[FileState], path: Path
) -> None:
    if state is not None:
        remote.fetch(name, state, path)
    if FileState(num_bytes=path.stat().st_size, sha256=file_digest(path)) not in known:
        raise RunError(
            f"{remote.url}/{name} is not the file that its {SNAPSHOT} names: a driver publishes "
            "just now, or it was altered; try again"
        )


@dataclass(frozen=True, slots=True)
class RunCopy:
    """A run's local folder, into which files come when they are needed.

    ``remote`` is where they come from; none: the run lies here.
    """

    folder: Path
    remote: RemoteFolder | None = None
    snapshot: Snapshot = field(default_factory=lambda: Snapshot(writer="", files={}))

    @property
    def place(self) -> str:
        """The run's path or URL."""
        return str(self.folder) if self.remote is None else self.remote.url

    def need(self, *names: str) -> None:
        """Have files, or all files of folders; those that the run does not have stay away.

        Raises:
            RunError: a file is not the one that was published.
            StorageError: the store or the disk refuses.
        """
        if self.remote is not None:
            fetch_files(
                self.remote,
                self.snapshot,
                self.folder,
                lambda name: name in names or name.partition("/")[0] in names,
            )

    def need_all(self) -> Path:
        """Have every file; return the folder.

        Raises:
            RunError: a file is not the one that was published.
            StorageError: the store or the disk refuses.
        """
        self.need(*self.snapshot.files)
        return self.folder


def copy_of_run(name: str | Path) -> RunCopy:
    """Return the copy of a run by its path or URL; of one at a URL nothing is fetched yet.

    Raises:
        RunError: there is no run at the URL.
        StorageError: the store can't be reached or refuses.
    """
    local = local_path(str(name)) if isinstance(name, str) else name
    if local is not None:
        return RunCopy(local)
    remote = RemoteFolder(str(name))
    snapshot = read_snapshot(remote)
    if snapshot is None:
        raise RunError(
            f"no run at {remote.url}; learn one with: unicuco learn MODEL --out {remote.url}"
        )
    key = hashlib.sha256(remote.url.encode() + b"\n" + snapshot.to_json()).hexdigest()
    folder = cache_folder("runs") / key / last_name(remote.url)
    folder.mkdir(parents=True, exist_ok=True)
    return RunCopy(folder, remote, snapshot)


def last_name(url: str) -> str:
    """Return what a run at a URL is called: the last part of it."""
    return PurePosixPath(url).name
