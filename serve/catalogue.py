"""Which runs and variants there are, and where: ids in, folders out, nothing outside one root.

A variant's id is ``RUN_ID:suffix`` and its folder ``DATA/variants/RUN_ID/suffix``; it is there when
its ``strategy.json`` is, which a folder gets by one rename of a finished one. Its packed forms lie
in a hidden folder inside, so that they go with it. A variant may also lie packed only: as the file
``DATA/variants/RUN_ID/suffix.pack``, which somebody moved there as a whole. What this module does
not know: jobs, weights, Ray.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from serve.config import RUN_ID, SUFFIX, ServeConfig
from unicuco.errors import StorageError, VariantError
from unicuco.export import VariantDocument, read_variant
from unicuco.export.document import DOCUMENT_NAME

_TRASH: Final = ".trash-"
_PACKED_FORMS: Final = ".packed"  # loaders see files only, and none that is hidden
_PACK: Final = ".pack"


class UnknownModelError(VariantError):
    """An id that no run and no variant has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelId:
    """A run (``suffix`` none) or a variant of it."""

    run: str
    suffix: str | None = None

    @classmethod
    def parse(cls, text: str) -> ModelId:
        """Read ``RUN_ID`` or ``RUN_ID:suffix``.

        Raises:
            UnknownModelError: it matches neither pattern, so nothing can have that name.
        """
        run, colon, suffix = text.partition(":")
        if not RUN_ID.fullmatch(run) or (colon and not SUFFIX.fullmatch(suffix)):
            raise UnknownModelError(f"no model is called {text[:120]!r}")
        return cls(run=run, suffix=suffix if colon else None)

    def __str__(self) -> str:
        return self.run if self.suffix is None else f"{self.run}:{self.suffix}"


class Catalogue:
    """The runs and variants of one service.

    Args:
        config: of the service; ``config.data`` need not exist yet.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._runs = {run_id: Path(folder) for run_id, folder in config.runs}
        self._root = Path(config.data) / "variants"
        self._staging = Path(config.data) / "staging"

    def make_folders(self) -> None:
        """Make the folders that variants go through and to.

        Raises:
            StorageError: the disk refused.
        """
        try:
            self._staging.mkdir(parents=True, exist_ok=True)
            for run_id in self._runs:
                (self._root / run_id).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{self._root} can't be made: {error.strerror}") from error

    @property
    def run_ids(self) -> tuple[str, ...]:
        """Ids of the runs, in the order they were given."""
        return tuple(self._runs)

    def run_folder(self, run_id: str) -> Path:
        """Return a run's folder.

        Raises:
            UnknownModelError: no run has that id.
        """
        try:
            return self._runs[run_id]
        except KeyError:
            raise UnknownModelError(f"no run is called {run_id[:120]!r}") from None

    def find(self, name: ModelId) -> Path:
        """Return the folder of a run or of a variant that is there, or the file it lies packed in.

        Raises:
            UnknownModelError: it is not there, or is not inside the one root.
        """
        if name.suffix is None:
            return self.run_folder(name.run)
        for path in self._there(name):
            return path
        raise UnknownModelError(f"no variant is called {str(name)!r}")

    def packed_form(self, variant: ModelId, link_mbps: float | None) -> Path:
        """Return where a variant's form for a link is, or will be; the file it lies packed in.

        Args:
            variant: that is there.
            link_mbps: megabits per second, > 0; none: the smallest form.

        Raises:
            UnknownModelError: it is not there.
        """
        found = self.find(variant)
        if found.is_file():
            return found
        name = "smallest" if link_mbps is None else f"{link_mbps:g}-mbps"
        return found / _PACKED_FORMS / f"{name}{_PACK}"

    def _there(self, variant: ModelId) -> list[Path]:
        """Return the folder and the packed file of a variant, as far as they are there."""
        folder = self.place(variant)
        marks = {folder: folder / DOCUMENT_NAME, _packed(folder): _packed(folder)}
        return [path for path, mark in marks.items() if self._is_ours(path) and mark.is_file()]

    def _is_ours(self, path: Path) -> bool:
        """Say whether a variant's place leads to itself, and by no link elsewhere."""
        is_inside = path.resolve() == path.parent.resolve() / path.name
        return is_inside and path.parent.resolve() == self._root.resolve() / path.parent.name

    def place(self, variant: ModelId) -> Path:
        """Return where a variant is, or will be, published.

        Raises:
            UnknownModelError: its run is not served here, or it is a run itself.
        """
        self.run_folder(variant.run)
        if variant.suffix is None:
            raise UnknownModelError(f"{str(variant)!r} is a run, not a variant")
        return self._root / variant.run / variant.suffix

    def staging_place(self, name: str) -> Path:
        """Return where a variant that nobody may see yet is written."""
        return self._staging / name

    def publish(self, staged: str, variant: ModelId) -> None:
        """Put a finished variant in its place, by one rename; whoever comes second finds it there.

        Raises:
            StorageError: something else stands there, or the disk refused.
        """
        place = self.place(variant)
        if _packed(place).exists():
            raise StorageError(f"{place} can't be published: {_packed(place).name} is there")
        try:
            self.staging_place(staged).rename(place)
        except FileNotFoundError:  # published by another, before or just now
            return
        except OSError as error:
            raise StorageError(f"{place} can't be published: {error.strerror}") from error
        _sync(place.parent)

    def clear_staging(self, prefix: str) -> None:
        """Remove what dead writers of staging names with this prefix left behind."""
        for path in self._staging.iterdir():
            if path.name.lstrip(".").startswith(prefix):
                shutil.rmtree(path, ignore_errors=True)

    def variants(self) -> Iterator[ModelId]:
        """Return every variant that is there, by run and suffix."""
        for run_id in self._runs:
            folder = self._root / run_id
            paths = folder.iterdir() if folder.is_dir() else ()
            for name in sorted({path.name.removesuffix(_PACK) for path in paths}):
                variant = ModelId(run=run_id, suffix=name)
                if SUFFIX.fullmatch(name) and self.has(variant):
                    yield variant

    def has(self, variant: ModelId) -> bool:
        """Say whether a variant is there."""
        try:
            self.find(variant)
        except UnknownModelError:
            return False
        return True

    def document(self, variant: ModelId) -> VariantDocument:
        """Return what a variant's ``strategy.json`` says.

        Raises:
            UnknownModelError: it is not there.
            VariantError: it is damaged.
            ContainerError: what it lies packed in is.
        """
        found = self.find(variant)
        if found.is_file():
            from unicuco.packing import read_packed_variant  # torch, for those alone who need it

            return read_packed_variant(found)
        return read_variant(found, verify=False)

    def remove(self, variant: ModelId) -> None:
        """Take a variant away: unlisted by one rename, then deleted.

        Raises:
            UnknownModelError: it is not there.
            StorageError: the disk refused.
        """
        there = self._there(variant)
        if not there:
            raise UnknownModelError(f"no variant is called {str(variant)!r}")
        for path in reversed(there):  # the folder last: it counts as long as it is there
            self._remove(path, variant)

    def _remove(self, path: Path, variant: ModelId) -> None:
        trash = self._staging / f"{_TRASH}{secrets.token_hex(8)}"
        try:
            path.rename(trash)
        except FileNotFoundError:
            raise UnknownModelError(f"no variant is called {str(variant)!r}") from None
        except OSError as error:
            raise StorageError(f"{path} can't be removed: {error.strerror}") from error
        if trash.is_file():
            trash.unlink()
        else:
            shutil.rmtree(trash, ignore_errors=True)


def _packed(place: Path) -> Path:
    return place.with_name(place.name + _PACK)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
