"""Cuts a variant out of its base model's files and writes it as a Hugging Face folder.

The base's weight files are copied byte for byte except for the sites, whose dropped weights become
zero on the way through one small buffer: memory stays at one matrix, everything else is
bit-identical by construction, and the sha256 is taken of the file while it grows. Where the files'
tensors can't be matched to the sites without doubt, the model is loaded in the files' own type, cut
and saved instead. What this module does not know: how a strategy was found.

Sites of a level database are taken from there instead, in the files' own type.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from unicuco.errors import ModelError, VariantError
from unicuco.export.document import DOCUMENT_NAME, CheckpointRef, VariantDocument
from unicuco.export.header import FileHeader, TensorEntry, read_header
from unicuco.export.names import match_sites
from unicuco.export.staging import HashedFile, staged_folder
from unicuco.levels import LevelDatabase
from unicuco.models import read_site, weight_files
from unicuco.pruners import LevelPruner
from unicuco.ranks import RankStore, cut
from unicuco.rows import RowRule
from unicuco.space import StrategySpace
from unicuco.types import ModelProfile, Plan, ServedAs, Site

if TYPE_CHECKING:
    from unicuco.models import LoadedModel

ROWS_NAME: Final = "rows.json"  # no safetensors: engines load every such file as weights
_CHUNK_BYTES: Final = 1 << 20
_SINGLE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"
_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# Everything beside the weights that from_pretrained, an engine or a licence may need; never code or
# pickles.
_SMALL_FILES: Final = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer*.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece.*.model",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "NOTICE*",
)


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
            cut(weight, self.rank, self.num_dropped, rows=self.rows, out=weight)
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
        plan: what to cut; it must be served as a mask.
        provenance: ``run`` (digest) and ``seed``; ``versions`` (name -> version) may be given too.
        rows: how a site's dropped weights are spread over its rows; kept beside the weights as
            ``rows.json``. None: equally.
        levels: what sites are taken from instead of being cut by the ranks; knows no row rule.
        overwrite: replace a variant that stands at ``out``.

    Raises:
        ValueError: levels and a row rule are given together.
        VariantError: something stands at ``out``, or the plan can't be stored.
        StorageError: the disk is full or refuses; nothing is left behind.
        ModelError: the base can't be read or does not fit the profile.
        RunError: the ranks are another model's.
    """
    folder = base if isinstance(base, Path) else base.folder
    if levels is not None and rows is not None:
        raise ValueError("levels are matrices as they are: a row rule can't spread their drops")
    cuts = [
        replace(site_cut, levels=levels)
        for site_cut in _site_cuts(profile, ranks, space, plan, rows)
    ]
    with staged_folder(out, overwrite=overwrite) as stage:
        files = _write_weights(stage, folder, profile, cuts)
        files |= _copy_small_files(folder, stage, present=files.keys())
        if rows is not None:
            with HashedFile(stage / ROWS_NAME) as file:
                file.write(json.dumps(rows.to_dict()).encode())
            files[ROWS_NAME] = file.sha256()
        document = VariantDocument(
            plan=plan,
            base_digest=profile.digest,
            base_path=str(folder.resolve()),
            run=str(provenance["run"]),
            seed=int(str(provenance["seed"])),
            versions=_versions(provenance),
            dropped_weights=tuple((site_cut.site.path, site_cut.num_dropped) for site_cut in cuts),
            files=tuple(sorted(files.items())),
        )
        with HashedFile(stage / DOCUMENT_NAME) as file:
            file.write(document.to_json().encode())
    return CheckpointRef(
        path=out, sha256=document.files, strategy_key=plan.strategy.key, served_as=plan.served_as
    )


def _site_cuts(
    profile: ModelProfile,
    ranks: RankStore,
    space: StrategySpace,
    plan: Plan,
    rows: RowRule | None,
) -> list[_SiteCut]:
    """Turn the plan's strategy into one cut per site, refusing what can't be stored as zeros."""
    if plan.served_as is not ServedAs.MASK:
        raise VariantError(
            f"a plan served as {plan.served_as} can't be written in this version; ask for mask"
        )
    ranks.check_sites(profile)
    drops = space.cost.site_drops(plan.strategy.values)
    if space.cost.kept_params(plan.strategy.values) != plan.kept_params:
        raise VariantError(
            f"strategy {plan.strategy.key[:12]} does not keep what its plan says; plan again"
        )
    if plan.total_params - sum(drops.values()) != plan.kept_params:
        raise VariantError(
            "the plan removes whole blocks, which can't be written in this version; "
            "plan with the sparsity dimension alone"
        )
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
    headers = [_read_header(path) for path in weight_files(folder)]
    entries = {entry.name: entry for header in headers for entry in header.entries}
    names = match_sites(profile, {name: entry.shape for name, entry in entries.items()})
    if names is None:
        return _write_through_model(stage, folder, cuts)
    by_tensor = {names[c.site.path]: c for c in cuts if c.num_dropped}
    for name in by_tensor:
        if entries[name].dtype not in _DTYPES:
            raise ModelError(f"{folder} stores {name} as {entries[name].dtype}, which can't be cut")
    return {h.path.name: _stream(h, stage / h.path.name, by_tensor) for h in headers}


def _stream(header: FileHeader, target: Path, cuts: Mapping[str, _SiteCut]) -> str:
    """Copy one weight file, cutting the tensors named in ``cuts``, and return the copy's sha256."""
    tensors = [entry for entry in header.entries if entry.name in cuts]
    largest = max((entry.end - entry.begin for entry in tensors), default=0)
    buffer = memoryview(bytearray(max(largest, _CHUNK_BYTES)))
    position = 0
    with _open(header.path) as source, HashedFile(target) as file:
        for entry in tensors:
            begin = header.data_offset + entry.begin
            _copy(source, file, begin - position, buffer)
            matrix = buffer[: entry.end - entry.begin]
            _fill(source, matrix)
            _cut_bytes(matrix, entry, cuts[entry.name])
            file.write(matrix)
            position = begin + len(matrix)
        _copy(source, file, header.num_bytes - position, buffer)
    return file.sha256()


def _cut_bytes(matrix: memoryview, entry: TensorEntry, site_cut: _SiteCut) -> None:
    """Zero the dropped weights of one stored matrix in place."""
    weight = torch.frombuffer(matrix, dtype=_DTYPES[entry.dtype]).view(entry.shape)
    weight = weight.T if site_cut.site.transposed else weight  # (o, i)
    site_cut.apply(weight)


def _copy(source: FileIO, file: HashedFile, count: int, buffer: memoryview) -> None:
    """Copy ``count`` bytes as they are."""
    while count:
        part = buffer[: min(count, len(buffer))]
        _fill(source, part)
        file.write(part)
        count -= len(part)


def _fill(source: FileIO, part: memoryview) -> None:
    """Read exactly ``len(part)`` bytes."""
    missing = part
    while missing:
        try:
            count = source.readinto(missing)
        except OSError as error:
            raise ModelError(f"{source.name} can't be read: {error.strerror}") from error
        if not count:
            raise ModelError(f"{source.name} ends too early; fetch the model again")
        missing = missing[count:]


def _write_through_model(stage: Path, folder: Path, cuts: Sequence[_SiteCut]) -> dict[str, str]:
    """Load the model in its own type, cut it, save it, and return file name -> sha256."""
    from unicuco.models import load_model  # rarely needed, and it takes seconds

    loaded = load_model(folder, dtype=_stored_dtype(folder))
    for site_cut in cuts:
        site_cut.apply(read_site(loaded.model, site_cut.site))
    loaded.model.save_pretrained(stage)
    for path in stage.iterdir():  # configurations are taken from the base as they are
        if path.name != _INDEX and path.suffix != ".safetensors":
            path.unlink()
    return {path.name: _hash(path) for path in sorted(stage.iterdir())}


def _stored_dtype(folder: Path) -> torch.dtype:
    """The one type in which the files hold their floating-point tensors."""
    words = {e.dtype for path in weight_files(folder) for e in _read_header(path).entries}
    floating = sorted(words & _DTYPES.keys())
    if len(floating) != 1 or any(word.startswith("F8") for word in words):
        found = ", ".join(sorted(words))
        raise ModelError(
            f"{folder} mixes or lacks plain floating-point tensors ({found}); it can't be cut"
        )
    return _DTYPES[floating[0]]


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _copy_small_files(folder: Path, stage: Path, *, present: Container[str]) -> dict[str, str]:
    """Copy what belongs beside the weights and return file name -> sha256."""
    found = {path.name: path for pattern in _SMALL_FILES for path in folder.glob(pattern)}
    files: dict[str, str] = {}
    for name, path in sorted(found.items()):
        stale_index = name == _INDEX and _SINGLE in present
        if name in present or stale_index or not path.is_file():
            continue
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ModelError(f"{path} can't be read: {error.strerror}") from error
        with HashedFile(stage / name) as file:
            file.write(_without_sparsity_config(data) if name == "config.json" else data)
        files[name] = file.sha256()
    return files


def _without_sparsity_config(data: bytes) -> bytes:
    """Drop ``sparsity_config`` from a config: vLLM refuses every model that has one."""
    config = json.loads(data)
    if "sparsity_config" not in config:
        return data
    del config["sparsity_config"]
    return json.dumps(config, indent=2).encode() + b"\n"


def _versions(provenance: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    given = provenance.get("versions")
    if isinstance(given, Mapping):
        return tuple((str(name), str(value)) for name, value in given.items())
    return (
        ("unicuco", _version("unicuco")),
        ("torch", torch.__version__),
        ("transformers", _version("transformers")),
    )


@functools.cache  # reading a distribution's metadata takes milliseconds
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "unknown"


def _open(path: Path) -> FileIO:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror}") from error


def _read_header(path: Path) -> FileHeader:
    try:
        return read_header(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read as safetensors: {error}") from error
