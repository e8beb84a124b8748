"""The level database: per site, matrices at a ladder of sparsities, for pruners that move weights.

A rank store can't hold what SparseGPT does, since it changes the weights that stay. So every site
is pruned once at each of its levels, and a strategy picks. All levels of all sites are the same
number of weights apart: one level up here and one down there keeps the budget.

On disk: one safetensors file per matrix, named by its content (so equal matrices are stored once),
one small JSON file per finished site, and a manifest. A site's file appears last and at once, so a
build can be stopped anywhere, goes on where it was, and may run for several sites in parallel.

Levels are read memory-mapped, so all processes of a node share one copy of them; the first time a
process reads one, its content is checked.

What it does not know: how levels are made, and strategies.

Notation: a site is ``o x i``, c is the weights between two levels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from unicuco.errors import RunError, StorageError
from unicuco.files import replace_bytes
from unicuco.types import ModelProfile, Site

FOLDER: Final = "levels"  # in a run folder
_FORMAT: Final = 1
_MANIFEST: Final = "levels.json"
_LEVELS: Final = 16  # of a site of average size
_HEADER_BYTES: Final = 256  # of a safetensors file of one matrix, about
MAX_SPARSITY: Final = 0.98


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelPlan:
    """What a database holds; any difference makes another database.

    ``method`` names what prunes with its settings; ``step`` is c.
    """

    model_digest: str
    data_digest: str
    method: str
    step: int

    def counts(self, site: Site) -> tuple[int, ...]:
        """Return how many weights a site drops at each of its levels, the dense one left out."""
        return tuple(range(self.step, int(MAX_SPARSITY * site.num_weights) + 1, self.step))

    def num_bytes(self, profile: ModelProfile, dtype: torch.dtype) -> int:
        """Return about how large the whole database will be on disk."""
        return self.num_bytes_of(profile.sites, dtype)

    def num_bytes_of(self, sites: Sequence[Site], dtype: torch.dtype) -> int:
        """Return about how much of the disk the levels of some sites take."""
        size = dtype.itemsize
        return sum(
            len(self.counts(site)) * (site.num_weights * size + _HEADER_BYTES) for site in sites
        )


def default_step(profile: ModelProfile, levels: int = _LEVELS) -> int:
    """Return the c at which a site of average size has so many levels, and no site none."""
    average = profile.num_site_weights / len(profile.sites)
    smallest = min(site.num_weights for site in profile.sites)
    return max(1, min(int(average / levels), int(MAX_SPARSITY * smallest)))


class LevelDatabase:
    """A folder of levels.

    Args:
        folder: made if missing.
        plan: what it is to hold; none: what the folder says.

    Raises:
        RunError: the folder holds another database, or none where no plan is given.
        StorageError: the disk refused.
    """

    def __init__(self, folder: Path, plan: LevelPlan | None = None) -> None:
        self.folder = folder
        manifest = folder / _MANIFEST
        if not manifest.is_file():
            if plan is None:
                raise RunError(f"{folder} holds no levels; build them first")
            _write(manifest, _json({"format": _FORMAT, **asdict(plan)}))
        found = self._read_manifest()
        if plan is not None and plan != found:
            raise RunError(
                f"{folder} holds levels of another model, text or step; give another folder"
            )
        self.plan = found
        self._found: dict[str, Mapping[str, str]] = {}  # of finished sites, which never change
        self._checked: dict[str, tuple[int, int]] = {}  # content's name -> time and size

    def has_site(self, site: Site) -> bool:
        """Return whether all levels of a site are there."""
        return self._site_file(site).is_file()

    def missing(self, profile: ModelProfile) -> list[Site]:
        """Return the sites that are still to be built, in order."""
        return [site for site in profile.sites if not self.has_site(site)]

    def sweep(self) -> None:
        """Remove what killed writers left; only when nobody else writes."""
        for path in self.folder.rglob(".*.tmp"):
            with suppress(OSError):
                path.unlink()

    def digest(self, profile: ModelProfile) -> str:
        """Return the sha256 over the plan and the content of all levels.

        Raises:
            RunError: a site's levels are missing.
        """
        sites = {site.path: dict(self._entries(site)) for site in profile.sites}
        return hashlib.sha256(_json({**asdict(self.plan), "sites": sites})).hexdigest()

    def build_site(self, site: Site, make: Callable[[int], Tensor]) -> None:
        """Make and store all levels of one site; nothing where they are there.

        Args:
            site: whose levels.
            make: dropped weights -> ``o x i`` matrix.

        Raises:
            StorageError: the disk refused; the site then counts as missing.
            ValueError: a level is of another shape or drops another number of weights.
        """
        if self.has_site(site):
            return
        entries: dict[str, str] = {}
        for count in self.plan.counts(site):
            matrix = make(count)
            if matrix.shape != (site.num_rows, site.num_columns):
                raise ValueError(f"level {count} of {site.path} has shape {tuple(matrix.shape)}")
            if int((matrix == 0).sum()) < count:
                raise ValueError(f"level {count} of {site.path} drops too few weights")
            entries[str(count)] = self._store(matrix)
        _write(self._site_file(site), _json({"path": site.path, "levels": entries}))

    def read(self, site: Site, count: int) -> Tensor:
        """Return a stored level, memory-mapped, its content checked once against its name.

        Not to be written to.

        Raises:
            RunError: the level was never built, or its file is missing or altered.
        """
        name = self._entries(site).get(str(count))
        if name is None:
            raise RunError(f"{self.folder} holds no level of {site.path} with {count} dropped")
        path = self._object(name)
        try:
            state = path.stat()
            if self._checked.get(name) != (state.st_mtime_ns, state.st_size):
                with path.open("rb") as data:
                    if hashlib.file_digest(data, "sha256").hexdigest() != name:
                        raise RunError(f"the level {path} was altered; learn the run again")
                self._checked[name] = (state.st_mtime_ns, state.st_size)
            with safe_open(path, framework="pt") as file:
                matrix: Tensor = file.get_tensor("weight")
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RunError(f"the level {path} can't be read: {reason}") from error
        return matrix

    def nearest_below(self, site: Site, count: int) -> int:
        """Return the level that drops the most weights, but not more than ``count``; 0: dense."""
        return min(count // self.plan.step, len(self.plan.counts(site))) * self.plan.step

    def _entries(self, site: Site) -> Mapping[str, str]:
        if site.path in self._found:
            return self._found[site.path]
        path = self._site_file(site)
        try:
            entries: Mapping[str, str] = json.loads(path.read_text())["levels"]
        except FileNotFoundError as error:
            raise RunError(
                f"{self.folder} lacks the levels of {site.path}; build them first"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} can't be read: {error}") from error
        self._found[site.path] = entries
        return entries

    def _store(self, matrix: Tensor) -> str:
        data = save({"weight": matrix.detach().cpu().contiguous()})
        name = hashlib.sha256(data).hexdigest()
        if not self._object(name).is_file():
            _write(self._object(name), data)
        return name

    def _object(self, name: str) -> Path:
        return self.folder / "objects" / name[:2] / f"{name}.safetensors"

    def _site_file(self, site: Site) -> Path:
        return self.folder / "sites" / f"{site.path}.json"

    def _read_manifest(self) -> LevelPlan:
        path = self.folder / _MANIFEST
        try:
            # Any: JSON; the dataclass refuses other fields.
            fields: dict[str, Any] = json.loads(path.read_text())
            if fields.pop("format") != _FORMAT:
                raise ValueError("another format")
            return LevelPlan(**fields)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise RunError(f"{path} can't be read: {error}") from error


def _json(document: Mapping[str, object]) -> bytes:
    return (json.dumps(document, indent=1) + "\n").encode()


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{path} can't be written: {error.strerror or error}") from error
    replace_bytes(path, data)
