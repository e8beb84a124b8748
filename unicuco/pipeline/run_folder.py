"""The folder of a run that is being learned: what may stand there, and whose it is.

What this module does not know: what is learned.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from unicuco.errors import RunError, StorageError, UnicucoError
from unicuco.pipeline.options import LearnOptions
from unicuco.pipeline.run import DATABASE, MANIFEST
from unicuco.store import EvaluationStore
from unicuco.store.database import display_name


@contextmanager
def opened(options: LearnOptions) -> Iterator[EvaluationStore]:
    """Open the run's folder and store; what was made for a run that never began goes again.

    Raises:
        RunError: the folder holds something else, or an unfinished run without ``resume``.
        StorageError: the disk refused, or another driver writes there.
    """
    folder = options.out
    was_empty = not (folder.is_dir() and any(folder.iterdir()))
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    begun = False
    _open_folder(options)
    try:
        with EvaluationStore.open(options.store or folder / DATABASE, create=True) as store:
            begun = True  # by another driver, who came first, if the lease is refused
            store.acquire_lease("learn")
            if options.store and not options.resume and _has_begun(store):
                begun = False  # not in this folder
                raise RunError(
                    f"the database {display_name(options.store)} holds a run already; add --resume "
                    "to go on with it, or name another database"
                )
            try:
                yield store
            finally:
                begun = _has_begun(store)
    except BaseException:
        if was_empty and not begun:
            _empty(folder)
            for place in made:
                with suppress(OSError):  # somebody else's file came meanwhile
                    place.rmdir()
        raise


def _has_begun(store: EvaluationStore) -> bool:
    try:
        return store.get_meta("prepared") is not None
    except UnicucoError:
        return True  # what can't be told apart from a run is kept


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _open_folder(options: LearnOptions) -> None:
    folder = options.out
    if (folder / MANIFEST).exists() and not options.resume:
        raise RunError(
            f"{options.place} already holds a run; add --resume to extend it, or choose another "
            "folder"
        )
    if (folder / DATABASE).exists() and not options.resume:
        raise RunError(
            f"{options.place} holds an unfinished run; add --resume to go on, or choose another "
            "folder"
        )
    holds_something = options.store or _holds_something(folder / DATABASE)
    if (folder / MANIFEST).exists() and not holds_something:
        raise RunError(f"{folder} is damaged: its {DATABASE} is empty; learn into another folder")
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; choose another place for the run")
    has_record = (folder / DATABASE).exists() or (options.store and options.resume)
    if folder.exists() and not has_record and any(folder.iterdir()):
        raise RunError(f"{folder} is not empty and holds no run; choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder} can't be made: {error.strerror or error}") from error


def _holds_something(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0
