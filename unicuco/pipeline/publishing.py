"""Learning into a run at a URL: a local folder that is published at checkpoints and at the end.

Files go up as they are in the run folder, only those that changed, with a copy of the live store;
``run.json`` comes after them and ``snapshot.json`` last, so a reader who goes by it sees a whole
state. Before a file is replaced the snapshot says by what, so that a driver killed in the middle
leaves a run that goes on. Single files must come whole or not at all, as object stores have it.
Where the connection is gone at a checkpoint, the next one catches up.

A lease guards the live store, which is local; between machines the snapshot's writer does: whoever
resumes a run takes it over, and a driver that finds another's name there stops. What this module
does not know: what is learned.
"""

from __future__ import annotations

import hashlib
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from unicuco.errors import RunError, StorageError
from unicuco.files import file_digest, replace_bytes
from unicuco.pipeline.options import LearnOptions, ProgressSink
from unicuco.pipeline.run import DATABASE, MANIFEST
from unicuco.pipeline.run_copy import (
    SNAPSHOT,
    FileState,
    Snapshot,
    fetch_files,
    last_name,
    read_snapshot,
)
from unicuco.remote import RemoteFolder, cache_folder, local_path
from unicuco.search.drive import Progress
from unicuco.store import EvaluationStore

_EVERY_S: Final = 60.0
_WRITER: Final = "writer"  # beside the run's folder
_TRIAL: Final = ".unicuco"


def run_place(out: str) -> tuple[Path, str]:
    """Return the folder to learn in, and the URL to publish it to; none for a path.

    Args:
        out: a path, or a URL that fsspec reaches.

    Raises:
        StorageError: the URL can't be used.
    """
    local = local_path(out)
    if local is not None:
        return local, ""
    url = RemoteFolder(out).url
    key = hashlib.sha256(url.encode()).hexdigest()
    return cache_folder("learning") / key / last_name(url), url


class Publisher:
    """Publishes one run; for a run that stays where it is learned, does nothing.

    Args:
        options: of learning.
    """

    def __init__(self, options: LearnOptions) -> None:
        self._folder = options.out
        self._resumes = options.resume
        self._remote = RemoteFolder(options.publish_to) if options.publish_to else None
        self._writer = ""
        self._known_writers: set[str] = set()
        self._digests: dict[Path, tuple[tuple[int, int], str]] = {}
        self._published_at = 0.0

    def begin(self) -> None:
        """Find out what lies at the URL, and have the state to go on from.

        Raises:
            RunError: a run lies there and is not to be resumed, or was gone on with elsewhere.
            StorageError: the store can't be reached, or nothing can be written there.
        """
        if self._remote is None:
            return
        snapshot = read_snapshot(self._remote)
        if snapshot is not None and not self._resumes:
            raise RunError(
                f"{self._remote.url} already holds a run; add --resume to go on with it, or choose "
                "another place"
            )
        self._remote.check_writable(_TRIAL)
        self._writer = self._own_name()
        self._known_writers = {self._writer}
        if snapshot is None:
            return
        if not (self._folder / DATABASE).exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            fetch_files(self._remote, snapshot, self._folder, lambda name: True)
            self._known_writers.add(snapshot.writer)
        elif snapshot.writer != self._writer:
            raise RunError(
                f"{self._remote.url} was gone on with elsewhere; to go on from there, remove "
                f"{self._folder}"
            )

    def watching(self, progress: ProgressSink, store: EvaluationStore) -> ProgressSink:
        """Return a sink that passes on what it is told, and publishes now and then."""
        if self._remote is None:
            return progress

        def tell(step: Progress) -> None:
            progress(step)
            if time.monotonic() - self._published_at >= _EVERY_S:
                self.checkpoint(progress, store)

        return tell

    def checkpoint(self, progress: ProgressSink, store: EvaluationStore) -> None:
        """Publish the run as it is; a store that can't be reached just now is only told of.

        Raises:
            RunError: another driver has taken over.
        """
        if self._remote is None:
            return
        try:
            self.publish(store)
        except StorageError as error:
            progress(Progress(stage="publish", done=0, total=1, detail=str(error), announce=True))
        self._published_at = time.monotonic()

    def publish(self, store: EvaluationStore) -> None:
        """Publish the run as it is.

        Raises:
            RunError: another driver has taken over.
            StorageError: the store can't be reached or refuses.
        """
        if self._remote is None:
            return
        before = read_snapshot(self._remote)
        if before is not None and before.writer not in self._known_writers:
            raise RunError(
                f"another driver goes on with {self._remote.url}, so this one stops; what it "
                f"measured is in {self._folder}"
            )
        with tempfile.TemporaryDirectory(dir=self._folder.parent) as scratch:
            copy = Path(scratch) / DATABASE
            store.copy_to(copy)
            paths = {**dict(self._files()), DATABASE: copy}
            files = {name: self._state(path) for name, path in sorted(paths.items())}
            stand = {} if before is None else before.files
            changed = {name: own for name, own in files.items() if stand.get(name) != own}
            if changed.keys() & stand.keys():
                self._put_snapshot(
                    scratch, Snapshot(writer=self._writer, files=stand, coming=changed)
                )
            # The manifest after all that it names.
            for name in sorted(changed, key=lambda name: (name == MANIFEST, name)):
                self._remote.put(name, paths[name])
            after = Snapshot(writer=self._writer, files=files)
            if after != before:
                self._put_snapshot(scratch, after)
        self._known_writers = {self._writer}
        self._remote.remove(stand.keys() - files.keys())

    def _put_snapshot(self, scratch: str, snapshot: Snapshot) -> None:
        assert self._remote is not None, "somewhere"
        path = Path(scratch) / SNAPSHOT
        replace_bytes(path, snapshot.to_json())
        self._remote.put(SNAPSHOT, path)

    def _own_name(self) -> str:
        """Return the name that this machine's folder of the run publishes under."""
        path = self._folder.parent / _WRITER
        if path.exists():
            return path.read_text(encoding="utf-8")
        name = secrets.token_hex(16)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(path, name.encode())
        return name

    def _files(self) -> Iterator[tuple[str, Path]]:
        """Yield what belongs to the run: no live store, nothing half written."""
        for path in self._folder.rglob("*"):
            parts = path.relative_to(self._folder).parts
            is_hidden = any(part.startswith(".") for part in parts)
            if path.is_file() and not is_hidden and not parts[0].startswith(DATABASE):
                yield "/".join(parts), path

    def _state(self, path: Path) -> FileState:
        """Return a file's digest, reckoned once per state of the file."""
        stat = path.stat()
        mark = (stat.st_size, stat.st_mtime_ns)
        if self._digests.get(path, (None, ""))[0] != mark:
            self._digests[path] = mark, file_digest(path)
        return FileState(num_bytes=stat.st_size, sha256=self._digests[path][1])
