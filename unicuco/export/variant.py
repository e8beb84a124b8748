"""Cuts a variant out of its base model's files and writes it as a Hugging Face folder.

The base's weight files are copied byte for byte except for the sites, whose dropped weights become
zero on the way through one small buffer: memory stays at one matrix, everything else is
bit-identical by construction, and the sha256 is taken of the file while it grows. Where the files'
tensors can't be matched to the sites without doubt, the model is loaded in the files' own type, cut
and saved instead: this alone needs memory for all of it. What this module does not know: how a
strategy was found.

Sites of a level database are taken from there instead, in the files' own type. Variants of smaller
shapes are written by `unicuco.export.shrunk`, those of fewer bits by `unicuco.export.quantised`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from unicuco.dimensions import ByteCost
from unicuco.errors import ModelError, VariantError
from unicuco.export.document import DOCUMENT_NAME, CheckpointRef, VariantDocument
from unicuco.export.files import (
    copy_bytes,
    copy_small_files,
    open_file,
    read_checked_header,
    versions_of,
)
from unicuco.export.names import match_sites
from unicuco.export.precision import describe
from unicuco.export.quantised import write_quantised
from unicuco.export.shrunk import ShrinkPlan, write_shrunk
from unicuco.export.staging import HashedFile, staged_folder
from unicuco.files import file_digest
from unicuco.headers import FileHeader, TensorEntry
from unicuco.importance.units import UnitStore
from unicuco.levels import LevelDatabase
from unicuco.models import read_site, weight_files
from unicuco.models.fetching import place_of
from unicuco.models.index import INDEX
from unicuco.models.weights import fill_buffer
from unicuco.pruners import LevelPruner
from unicuco.ranks import RankStore, cut
from unicuco.rows import RowRule
from unicuco.space import StrategySpace
from unicuco.tensors import FLOATS
from unicuco.types import ModelProfile, Plan, ServedAs, Site

if TYPE_CHECKING:
    from unicuco.models import LoadedModel

ROWS_NAME: Final = "rows.json"  # no safetensors: engines load every such file as weights
_CHUNK_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class _SiteCut:
    """What happens to one site: ``rank`` is ``o x i``, the lowest ``num_dropped`` become zero.

    ``rows`` are its offsets of a row rule, or none; ``levels`` what its matrix is taken from
    instead, or none.
    """

    site: Site
    rank: Tensor
    num_dropped: int
    rows: Tensor | None
    levels: LevelDatabase | None = None

    def apply(self, weight: Tensor) -> None:
        """Cut an ``o x i`` matrix in place."""
        if self.levels is None:
            cut(  # another thread hashes meanwhile
                weight, self.rank, self.num_dropped, rows=self.rows, out=weight, parallel=False
            )
        else:
            pruner = LevelPruner(self.levels, {self.site.path: weight})
            weight.copy_(pruner.materialise(self.site, self.num_dropped))


def write_variant(
    out: Path,
    *,
    base: LoadedModel | Path,
    profile: ModelProfile,
    ranks: RankStore,
    space: StrategySpace,
    plan: Plan,
    provenance: Mapping[str, object],
    rows: RowRule | None = None,
    levels: LevelDatabase | None = None,
    units: UnitStore | None = None,
    factors: Mapping[str, Tensor] | None = None,
    overwrite: bool = False,
) -> CheckpointRef:
    """Cut the plan's strategy and write the variant; it stands at ``out`` as a whole or not at all.

    Args:
        out: folder to make; it may exist only if it is empty.
        base: the model that the ranks were made of, or its folder. That it is the right one (its
            digest) is the caller's to check, since that costs as much as the whole cut.
        profile: of the base.
        ranks: of every site.
        space: that the strategy belongs to.
        plan: what to cut, served as the space's dimensions are.
        provenance: ``run`` (digest) and ``seed``; ``versions`` (name -> version) may be given too.
        rows: how a site's dropped weights are spread over its rows; kept beside the weights as
            ``rows.json``. None: equally.
        levels: what sites are taken from instead of being cut by the ranks; knows no row rule.
        units: which units of a part stay, where the plan narrows parts.
        factors: what GPTQ rounds each site by, where bits are fewer; none: to the nearest.
        overwrite: replace a variant that stands at ``out``.

    Raises:
        ValueError: levels and a row rule are given together, or either with shapes or bits.
        VariantError: something stands at ``out``, or the plan can't be stored.
        StorageError: the disk is full or refuses; nothing is left behind.
        ModelError: the base can't be read or does not fit the profile.
        RunError: the ranks are another model's.
    """
    folder = base if isinstance(base, Path) else base.folder
    if levels is not None and rows is not None:
        raise ValueError("levels are matrices as they are: a row rule can't spread their drops")
    _check_plan(profile, ranks, space, plan)
    shrinks = plan.served_as is ServedAs.SHRINK
    if plan.served_as is not ServedAs.MASK and (rows is not None or levels is not None):
        raise ValueError("shapes and bits are cut by the ranks alone: no row rule, no levels")
    cuts = [
        replace(site_cut, levels=levels)
        for site_cut in _site_cuts(profile, ranks, space, plan, rows)
    ]
    shrink = ShrinkPlan.of(profile, space, plan.strategy, folder) if shrinks else None
    cost = space.cost if isinstance(space.cost, ByteCost) else None
    with staged_folder(out, overwrite=overwrite) as stage:
        if cost is not None:
            files = _write_bits(stage, folder, profile, cuts, cost, plan, factors)
        elif shrink is not None:
            files = write_shrunk(stage, shrink, ranks, units)
        else:
            files = _write_weights(stage, folder, profile, cuts)
        files |= copy_small_files(folder, stage, present=files.keys())
        if rows is not None:
            with HashedFile(stage / ROWS_NAME) as file:
                file.write(json.dumps(rows.to_dict()).encode())
            files[ROWS_NAME] = file.sha256()
        document = VariantDocument(
            plan=plan,
            base_digest=profile.digest,
            base_path=place_of(folder),
            run=str(provenance["run"]),
            seed=int(str(provenance["seed"])),
            versions=versions_of(provenance),
            dropped_weights=tuple((site_cut.site.path, site_cut.num_dropped) for site_cut in cuts),
            files=tuple(sorted(files.items())),
            site_weights=profile.num_site_weights if shrinks else 0,
            precision={} if cost is None else _precision(profile, cost, plan),
        )
        with HashedFile(stage / DOCUMENT_NAME) as file:
            file.write(document.to_json().encode())
    return CheckpointRef(
        path=out, sha256=document.files, strategy_key=plan.strategy.key, served_as=plan.served_as
    )


def _check_plan(profile: ModelProfile, ranks: RankStore, space: StrategySpace, plan: Plan) -> None:
    """Refuse what can't be stored as the plan says."""
    if plan.served_as is not space.cost.served_as:
        raise VariantError(
            f"a plan served as {plan.served_as} can't be written of these dimensions; "
            f"ask for {space.cost.served_as}"
        )
    ranks.check_sites(profile)
    if space.cost.kept_params(plan.strategy.values) != plan.kept_params:
        raise VariantError(
            f"strategy {plan.strategy.key[:12]} does not keep what its plan says; plan again"
        )


def _write_bits(
    stage: Path,
    folder: Path,
    profile: ModelProfile,
    cuts: Sequence[_SiteCut],
    cost: ByteCost,
    plan: Plan,
    factors: Mapping[str, Tensor] | None,
) -> dict[str, str]:
    """Write cut and rounded weights and return file name -> sha256."""
    by_path = {site_cut.site.path: site_cut for site_cut in cuts}
    bits = cost.weight_bits(plan.strategy.values)
    return write_quantised(
        stage,
        folder,
        profile,
        {site.path: own for site, own in zip(profile.sites, bits, strict=True)},
        lambda site, weight: by_path[site.path].apply(weight),
        factors,
    )


def _precision(profile: ModelProfile, cost: ByteCost, plan: Plan) -> dict[str, object]:
    values = plan.strategy.values
    judges_kv = any(dimension.name == "kv_bits" for dimension in cost.dimensions)
    return describe(profile.sites, cost.weight_bits(values), cost.kv_bits(values), judges_kv)


def _site_cuts(
    profile: ModelProfile,
    ranks: RankStore,
    space: StrategySpace,
    plan: Plan,
    rows: RowRule | None,
) -> list[_SiteCut]:
    """Turn the plan's strategy into one cut per site."""
    drops = space.cost.site_drops(plan.strategy.values)
    return [
        _SiteCut(
            site=site,
            rank=ranks.ranks[site.path],
            num_dropped=drops[site.path],
            rows=None if rows is None else rows.of(site.path),
        )
        for site in profile.sites
    ]


def _write_weights(
    stage: Path, folder: Path, profile: ModelProfile, cuts: Sequence[_SiteCut]
) -> dict[str, str]:
    """Write the cut weight files and return file name -> sha256."""
    headers = [read_checked_header(path) for path in weight_files(folder)]
    entries = {entry.name: entry for header in headers for entry in header.entries}
    names = match_sites(profile, {name: entry.shape for name, entry in entries.items()})
    if names is None:
        return _write_through_model(stage, folder, cuts)
    by_tensor = {names[c.site.path]: c for c in cuts if c.num_dropped}
    for name in by_tensor:
        if entries[name].dtype not in FLOATS:
            raise ModelError(f"{folder} stores {name} as {entries[name].dtype}, which can't be cut")
    return {h.path.name: _stream(h, stage / h.path.name, by_tensor) for h in headers}


def _stream(header: FileHeader, target: Path, cuts: Mapping[str, _SiteCut]) -> str:
    """Copy one weight file, cutting the tensors named in ``cuts``, and return the copy's sha256."""
    tensors = [entry for entry in header.entries if entry.name in cuts]
    largest = max((entry.end - entry.begin for entry in tensors), default=0)
    buffer = memoryview(bytearray(max(largest, _CHUNK_BYTES)))
    position = 0
    with open_file(header.path) as source, HashedFile(target) as file:
        for entry in tensors:
            begin = header.data_offset + entry.begin
            copy_bytes(source, file, begin - position, buffer)
            matrix = buffer[: entry.end - entry.begin]
            fill_buffer(source, matrix)
            _cut_bytes(matrix, entry, cuts[entry.name])
            file.write(matrix)
            position = begin + len(matrix)
        copy_bytes(source, file, header.num_bytes - position, buffer)
    return file.sha256()


def _cut_bytes(matrix: memoryview, entry: TensorEntry, site_cut: _SiteCut) -> None:
    """Zero the dropped weights of one stored matrix in place."""
    weight = torch.frombuffer(matrix, dtype=FLOATS[entry.dtype]).view(entry.shape)
    weight = weight.T if site_cut.site.transposed else weight  # (o, i)
    site_cut.apply(weight)


def _write_through_model(stage: Path, folder: Path, cuts: Sequence[_SiteCut]) -> dict[str, str]:
    """Load the model in its own type, cut it, save it, and return file name -> sha256."""
    from unicuco.models import load_model  # rarely needed, and it takes seconds

    loaded = load_model(folder, dtype=_stored_dtype(folder))
    for site_cut in cuts:
        site_cut.apply(read_site(loaded.model, site_cut.site))
    loaded.model.save_pretrained(stage)
    for path in stage.iterdir():  # configurations are taken from the base as they are
        if path.name != INDEX and path.suffix != ".safetensors":
            path.unlink()
    return {path.name: file_digest(path) for path in sorted(stage.iterdir())}


def _stored_dtype(folder: Path) -> torch.dtype:
    """The one type in which the files hold their floating-point tensors."""
    words = {e.dtype for path in weight_files(folder) for e in read_checked_header(path).entries}
    floating = sorted(words & FLOATS.keys())
    if len(floating) != 1 or any(word.startswith("F8") for word in words):
        found = ", ".join(sorted(words))
        raise ModelError(
            f"{folder} mixes or lacks plain floating-point tensors ({found}); it can't be cut"
        )
    return FLOATS[floating[0]]
