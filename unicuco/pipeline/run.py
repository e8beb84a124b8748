"""`Run`: one learned StratNet with all it needs, opened from its folder.

Opening checks the manifest and the files it names. Planning needs neither the base model nor the
rank store; both are found, checked and loaded when the first variant is cut.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from unicuco.dimensions import Granularity, any_narrows, build_space
from unicuco.errors import ModelError, RunError, UnicucoError
from unicuco.files import file_digest
from unicuco.importance.hessian import FACTORS
from unicuco.importance.units import UNITS, UnitStore
from unicuco.levels import FOLDER as LEVELS
from unicuco.levels import LevelDatabase
from unicuco.models import model_digest, resolve_model
from unicuco.pipeline.files import load_json, load_tensors
from unicuco.pipeline.latency_file import LATENCY, load_latency
from unicuco.pipeline.planner import FrontPoint, Planner
from unicuco.pipeline.run_copy import RunCopy, copy_of_run
from unicuco.ranks import RankStore
from unicuco.stratnet import NetKind, StratNet, StratNetAllocator
from unicuco.surrogate import (
    Forecast,
    GaussianProcess,
    Intervals,
    SurrogateOptions,
    TaskForecast,
    TaskSurrogates,
    TextForecast,
)
from unicuco.types import ModelProfile, Part, Plan, Request, Site

MANIFEST: Final = "run.json"
DATABASE: Final = "evaluations.db"
FORMAT: Final = 2
_CURVES: Final = ("stratnet", "uniform", "fisher")  # measured on the validation text
_KINDS: Final = {"default": NetKind.SIZE, "paper": NetKind.PREFERENCE}


class Run:
    """A finished run.

    Attributes:
        folder: where it lies, or its copy does.
        copy: brings files into the folder, where the run lies at a URL.
        manifest: the contents of ``run.json``.
        profile: of the base model.
        latency: what was measured of its shapes; none: nothing yet.
        seed: of learning.
        validation: measured (sparsity, KL) on the validation text, by allocator.
    """

    def __init__(
        self,
        folder: Path,
        manifest: dict[str, Any],
        *,
        base: str | None,
        copy: RunCopy | None = None,
    ) -> None:
        self.folder = folder
        self.copy = copy or RunCopy(folder)
        self.manifest = manifest
        try:
            self.profile = _profile(manifest["profile"])
            low, high = manifest["sparsity_range"]
            self.sparsity_range = (float(low), float(high))
            self.latency = load_latency(folder, base_digest=self.profile.digest)
            self.planner = self._planner()
            self.validation = {
                name: [(float(s), float(kl)) for s, kl in manifest["validation"][name]]
                for name in _CURVES
            }
            self.seed = int(manifest["seed"])
            self._base = base or str(manifest["base_model"]["path"])
        except RunError:
            raise
        except (
            UnicucoError, AttributeError, KeyError, TypeError, ValueError, RuntimeError
        ) as error:  # fmt: skip
            raise RunError(
                f"{folder / MANIFEST} is damaged ({error!r}); learn the run again"
            ) from error

    @classmethod
    def open(cls, name: Path | str, *, base: str | None = None) -> Run:
        """Open a run; of one at a URL the small files are fetched, the others when needed.

        Args:
            name: the run's folder, or its URL.
            base: the base model, where it no longer lies where the run was learned.

        Raises:
            RunError: no run, an unfinished, altered or damaged one, or one of another format.
            StorageError: the URL can't be reached.
        """
        copy = copy_of_run(name)
        folder = copy.folder
        copy.need(MANIFEST)
        if not folder.is_dir():
            raise RunError(
                f"{folder} is no run folder; learn one with: unicuco learn MODEL --out {folder}"
            )
        begun = (folder / DATABASE).exists() or copy.remote is not None
        if begun and not (folder / MANIFEST).exists():
            raise RunError(
                f"{copy.place} holds an unfinished run; "
                f"finish it with: unicuco learn MODEL --out {copy.place} --resume"
            )
        manifest = load_json(folder / MANIFEST)
        if manifest.get("format") != FORMAT:
            raise RunError(
                f"{folder} holds a run of format {manifest.get('format')}; "
                f"this version reads {FORMAT}"
            )
        files = manifest.get("files", {})
        if not isinstance(files, dict):
            raise RunError(f"{folder / MANIFEST} is damaged (files); learn the run again")
        copy.need(*files, LATENCY)
        for file, digest in files.items():
            path = folder / file
            if not path.is_file():
                raise RunError(f"{copy.place} is damaged: {file} is missing; learn the run again")
            if file_digest(path) != digest:
                raise RunError(f"{path} was altered since the run was learned; learn the run again")
        return cls(folder, manifest, base=base, copy=copy)

    @cached_property
    def digest(self) -> str:
        """The sha256 of the manifest: what variants name their run by."""
        return hashlib.sha256((self.folder / MANIFEST).read_bytes()).hexdigest()

    @cached_property
    def ranks(self) -> RankStore:
        """The rank store, memory-mapped."""
        self.copy.need("ranks")
        return RankStore.load(self.folder / "ranks")

    @cached_property
    def levels(self) -> LevelDatabase | None:
        """The level database that variants are cut from; none: they are cut by the ranks.

        Raises:
            RunError: it is missing, incomplete or altered.
        """
        if "levels" not in self.manifest:
            return None
        self.copy.need(LEVELS)
        database = LevelDatabase(self.folder / LEVELS)
        if database.digest(self.profile) != self.manifest["levels"]["digest"]:
            raise RunError(f"{database.folder} was altered; learn the run again")
        return database

    @cached_property
    def units(self) -> UnitStore | None:
        """Which units of a part stay, where parts are narrowed; none: they aren't."""
        if not any_narrows(self.manifest["options"]["dimensions"]):
            return None
        return UnitStore.from_tensors(load_tensors(self.folder / UNITS))

    @cached_property
    def factors(self) -> dict[str, Tensor] | None:
        """What GPTQ rounds by; none: rounding is to the nearest, or there are no bits."""
        if self.manifest["options"].get("rounding", "nearest") == "nearest":
            return None
        return load_tensors(self.folder / FACTORS)

    @cached_property
    def base_folder(self) -> Path:
        """The base model's folder, checked to be the model that was learned.

        Raises:
            RunError: it is not there any more, or another model lies there.
        """
        try:
            folder = resolve_model(self._base)
        except ModelError as error:
            raise RunError(
                f"the base model of this run is needed; name it with --base: {error}"
            ) from error
        if model_digest(folder) != self.profile.digest:
            raise RunError(
                f"{folder} is not the model that {self.folder} was learned for; "
                "name the right one with --base"
            )
        return folder

    def plan(self, requests: list[Request]) -> list[Plan | UnicucoError]:
        """Answer requests, each by a plan or by the error that says why not."""
        return self.planner.plan(requests)

    def front(self) -> list[FrontPoint]:
        """Return the front: predictions, with what rivals measured at the same sparsity."""
        measured = {
            name: {round(s, 6): kl for s, kl in curve} for name, curve in self.validation.items()
        }
        return [
            FrontPoint(
                sparsity=point.sparsity,
                kl=point.kl,
                uniform_kl=measured["uniform"].get(round(point.sparsity, 6)),
                fisher_kl=measured["fisher"].get(round(point.sparsity, 6)),
            )
            for point in self.planner.front()
        ]

    def front_document(self) -> dict[str, object]:
        """Return what ``front.json`` holds: predicted points, and measured ones apart from them."""
        predicted = [
            {"sparsity": point.sparsity, "kl": asdict(point.kl)} for point in self.planner.front()
        ]
        return {"format": FORMAT, "predicted": predicted, "measured_on_validation": self.validation}

    def _planner(self) -> Planner:
        options = self.manifest["options"]
        space = build_space(
            self.profile,
            tuple(options["dimensions"]),
            Granularity(options["granularity"]),
            level_step=self.manifest.get("levels", {}).get("step", 0),
        )
        kind = _KINDS[options["preset"]]
        if kind is NetKind.SIZE and space.has_shapes:
            kind = NetKind.SHAPE
        state = load_tensors(self.folder / "stratnet.safetensors")
        net = StratNet.restore(kind, space.num_axes, state, num_tasks=len(self.tasks))
        return Planner(
            space=space,
            allocator=StratNetAllocator(net, space),
            forecast=self.forecast(),
            sparsity_range=self.sparsity_range,
            tasks=self.tasks,
            latency=None if self.latency is None else self.latency.model,
        )

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that requests may weigh; none where the run has one text."""
        return tuple(self.manifest["options"].get("tasks", ()))

    def forecast(self) -> Forecast:
        """Return the run's surrogate with its calibration."""
        options = SurrogateOptions(curves=self.manifest["options"]["preset"] == "default")
        state = load_tensors(self.folder / "surrogate.safetensors")
        intervals = self.manifest["intervals"]
        if not self.tasks:
            surrogate = GaussianProcess.restore(options, state)
            return TextForecast(surrogate=surrogate, intervals=Intervals.restore(intervals))
        return TaskForecast(
            surrogates=TaskSurrogates.restore(options, self.tasks, state),
            intervals=tuple(Intervals.restore(intervals[task]) for task in self.tasks),
        )


def profile_document(profile: ModelProfile) -> dict[str, Any]:
    """Return a profile as JSON; `Run` reads it back."""
    return asdict(profile)


def _profile(document: dict[str, Any]) -> ModelProfile:
    # Any: JSON; wrong fields are refused by the constructor.
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in document.items()
    }
    fields["sites"] = tuple(Site(**site) for site in document["sites"])
    fields["parts"] = tuple(map(_part, document["parts"]))
    fields["kv_heads"] = tuple(map(tuple, document.get("kv_heads", ())))
    return ModelProfile(**fields)


def _part(document: dict[str, Any]) -> Part:
    lists = {name: tuple(document[name]) for name in ("modules", "sites")}
    return Part(**{**document, **lists})
