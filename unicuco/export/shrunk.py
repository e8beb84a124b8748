"""Writes a variant of smaller shapes: what is removed is absent, what is narrowed is smaller.

One tensor at a time goes from the base's files to the variant's: left out, renumbered, reduced to
the rows and columns of the units that stay, its last matrix fitted to the dense outputs, its
dropped weights set to zero. Everything else is bit-identical. What this module does not know: how a
strategy was found.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from unicuco.errors import ModelError, VariantError
from unicuco.export.files import (
    read_checked_header,
    without_sparsity_config,
    write_index,
    write_json,
)
from unicuco.export.names import match_sites
from unicuco.export.shapes import with_blocks, with_shapes
from unicuco.export.tensors import StoredTensor, write_tensors
from unicuco.headers import FileHeader, TensorEntry
from unicuco.importance.units import UnitStore
from unicuco.models import weight_files
from unicuco.models.block_shapes import BlockShape
from unicuco.models.folder import read_config
from unicuco.models.index import SINGLE
from unicuco.ranks import RankStore, cut, narrowed_rank
from unicuco.space import Narrowing, Shape, StrategySpace
from unicuco.tensors import map_tensors
from unicuco.types import ModelProfile, Part, Site, Strategy


@dataclass(frozen=True, slots=True, kw_only=True)
class ShrinkPlan:
    """What is left of a model, and how its configuration says it.

    ``parts`` are the cost model's; ``kept_blocks`` the base's numbers of the blocks that are left.
    """

    profile: ModelProfile
    folder: Path
    parts: tuple[Part, ...]
    shape: Shape
    kept_blocks: tuple[int, ...]
    config: dict[str, object]

    @classmethod
    def of(
        cls, profile: ModelProfile, space: StrategySpace, strategy: Strategy, folder: Path
    ) -> ShrinkPlan:
        """Work out what a strategy leaves.

        Raises:
            VariantError: nothing, or something that no configuration of this family describes.
        """
        shape, parts = space.cost.shape(strategy.values), space.cost.parts
        alive = [part for p, part in enumerate(parts) if p not in shape.parts]
        kept = tuple(sorted({part.block for part in alive}))
        if not kept:
            raise VariantError("the plan removes every block; ask for less")
        config = read_config(folder)
        whole = not shape.narrowed and all(
            part.block not in kept for p, part in enumerate(parts) if p in shape.parts
        )
        if whole:
            new = with_blocks(config, kept, profile.num_blocks)
        else:
            shapes = _block_shapes(config, parts, shape, kept)
            new = with_shapes(config, profile.architecture, kept, shapes, profile.num_blocks)
        return cls(
            profile=profile,
            folder=folder,
            parts=parts,
            shape=shape,
            kept_blocks=kept,
            config=new,
        )


def _block_shapes(
    config: Mapping[str, object],
    parts: tuple[Part, ...],
    shape: Shape,
    kept: tuple[int, ...],
) -> list[BlockShape]:
    if not all(part.num_units for part in parts):  # another family; `with_shapes` says so
        return []
    lost = dict(shape.narrowed)
    sizes: dict[int, dict[str, int]] = {
        block: {"attention_heads": 0, "key_value_heads": 0, "intermediate_size": 0}
        for block in kept
    }
    for p, part in enumerate(parts):
        if p in shape.parts:
            continue
        less, own = lost.get(p, Narrowing()), sizes[part.block]
        units = part.num_units - less.units
        if len(part.sites) == 3:  # gate, up, down; attention has four matrices
            own["intermediate_size"] = units
            continue
        heads, groups = config["num_attention_heads"], config.get("num_key_value_heads")
        per_group = int(str(heads)) // int(str(groups or heads))
        own |= {"key_value_heads": units, "attention_heads": units * per_group}
        if less.pairs:
            own["query_key_size"] = part.head_size - 2 * less.pairs
        if less.ranks:
            own["value_size"] = part.head_size - less.ranks
    return [BlockShape(**size) for size in sizes.values()]


def write_shrunk(
    stage: Path, plan: ShrinkPlan, ranks: RankStore, units: UnitStore | None
) -> dict[str, str]:
    """Write weights and ``config.json`` into ``stage`` and return file name -> sha256.

    Raises:
        ModelError: the base can't be read, or its tensors can't be told apart.
        VariantError: the plan narrows parts and no units are given.
    """
    if plan.shape.narrowed and units is None:
        raise VariantError("the plan narrows parts, and the run holds no units; learn it again")
    headers = [read_checked_header(path) for path in weight_files(plan.folder)]
    entries = [entry for header in headers for entry in header.entries]
    names = match_sites(plan.profile, {entry.name: entry.shape for entry in entries})
    if names is None:
        raise ModelError(
            f"{plan.folder} names its tensors in a way that blocks can't be told apart by; "
            "load it with transformers and save it again, or ask for masks"
        )
    cutter = _Cutter(plan, names, ranks, units)
    files: dict[str, str] = {}
    places: dict[str, str] = {}
    for header in headers:
        kept = [(entry, new) for entry in header.entries if (new := cutter.new_name(entry.name))]
        if kept:
            name = header.path.name
            files[name] = _write_file(stage / name, header, kept, cutter)
            places |= dict.fromkeys((new for _, new in kept), name)
    described = plan.config if units is None else plan.config | _rotary_pairs(plan, units)
    config = without_sparsity_config(json.dumps(described).encode())
    files |= write_json(stage / "config.json", json.loads(config))
    if SINGLE not in files:
        files |= write_index(stage, places, cutter.num_bytes)
    return files


def _rotary_pairs(plan: ShrinkPlan, units: UnitStore) -> dict[str, object]:
    """Return what the configuration says of the queries and keys that every block has left."""
    pairs: list[list[list[int]] | None] = [None] * len(plan.kept_blocks)
    for p, less in plan.shape.narrowed:
        if less.pairs:
            part = plan.parts[p]
            pairs[plan.kept_blocks.index(part.block)] = units.kept_pairs(part, less).tolist()
    return {"rotary_pairs": pairs} if any(pairs) else {}


class _Cutter:
    """Says what every stored tensor becomes."""

    def __init__(
        self,
        plan: ShrinkPlan,
        names: Mapping[str, str],
        ranks: RankStore,
        units: UnitStore | None,
    ) -> None:
        self.num_bytes = 0
        self._plan = plan
        self._ranks = ranks
        self._units = units
        profile = plan.profile
        self._site_of = {names[site.path]: k for k, site in enumerate(profile.sites)}
        first = profile.sites[0]
        # The stored name of a site minus its place inside the block: "model.layers.0." or "h.0."
        inside = f"{first.path.removeprefix(profile.block_paths[first.block])[1:]}.weight"
        front = names[first.path].removesuffix(f"{first.block}.{inside}")
        self._in_block = re.compile(rf"{re.escape(front)}(\d+)\.(.+)")
        self._front = front
        self._new_number = {block: k for k, block in enumerate(plan.kept_blocks)}
        self._lost = dict(plan.shape.narrowed)
        self._part_of = {path: p for p, part in enumerate(plan.parts) for path in part.sites}
        self._removed = tuple(
            f"{module}." for p in sorted(plan.shape.parts) for module in plan.parts[p].modules
        )

    def new_name(self, name: str) -> str | None:
        """Return the tensor's name in the variant, or none where it is gone."""
        found = self._in_block.fullmatch(name)
        if found is None:
            return name
        block, inside = int(found[1]), found[2]
        if block not in self._new_number:
            return None
        path = f"{self._plan.profile.block_paths[block]}.{inside}"
        if path.startswith(self._removed):
            return None
        return f"{self._front}{self._new_number[block]}.{inside}"

    def new_shape(self, name: str, shape: tuple[int, ...]) -> list[int]:
        """Return the shape that a stored tensor of this shape becomes."""
        position, is_bias = self._site(name)
        if position is None:
            return list(shape)
        site = self._plan.profile.sites[position]
        rows, columns = self._kept(site)
        num_rows = site.num_rows if rows is None else len(rows)
        num_columns = site.num_columns if columns is None else len(columns)
        if is_bias:
            return [num_rows]
        return [num_columns, num_rows] if site.transposed else [num_rows, num_columns]

    def tensor(self, name: str, tensor: Tensor) -> Tensor:
        """Return what a stored tensor becomes."""
        position, is_bias = self._site(name)
        if position is None:
            return tensor
        site = self._plan.profile.sites[position]
        if is_bias:
            part, less = self._loss(site)
            if not less:
                return tensor
            assert self._units is not None, "checked before anything is written"
            return self._units.narrowed_bias(part, less, site, tensor)[1]
        return self._matrix(site, self._plan.shape.zeroed[position], tensor)

    def _site(self, name: str) -> tuple[int | None, bool]:
        """Return the site that a stored tensor belongs to, and whether it is its bias."""
        if name in self._site_of:
            return self._site_of[name], False
        if name.endswith(".bias"):
            return self._site_of.get(f"{name.removesuffix('.bias')}.weight"), True
        return None, False

    def _matrix(self, site: Site, num_zeroed: int, stored: Tensor) -> Tensor:
        matrix = stored.T if site.transposed else stored  # (o, i)
        part, lost = self._loss(site)
        rows, columns = self._kept(site)
        if lost:
            assert self._units is not None, "checked before anything is written"
            rows, columns, matrix = self._units.narrowed(part, lost, site, matrix)
        if num_zeroed:
            rank = narrowed_rank(self._ranks.ranks[site.path], rows, columns)
            matrix = cut(matrix, rank, num_zeroed)
        return matrix.T if site.transposed else matrix

    def _kept(self, site: Site) -> tuple[Tensor | None, Tensor | None]:
        """Return the rows, or the columns, of a site that stay; none: all."""
        part, lost = self._loss(site)
        if not lost:
            return None, None
        assert self._units is not None, "checked before anything is written"
        return self._units.kept_lines(part, lost, site)

    def _loss(self, site: Site) -> tuple[Part, Narrowing]:
        p = self._part_of[site.path]
        return self._plan.parts[p], self._lost.get(p, Narrowing())


def _write_file(
    target: Path, source: FileHeader, kept: Iterable[tuple[TensorEntry, str]], cutter: _Cutter
) -> str:
    """Write one safetensors file, one tensor at a time, and return its sha256."""
    _, mapped = map_tensors(source.path)
    tensors = [
        StoredTensor(
            new,
            entry.dtype,
            tuple(cutter.new_shape(entry.name, entry.shape)),
            lambda entry=entry: cutter.tensor(entry.name, mapped[entry.name]),  # type: ignore[misc]
        )
        for entry, new in kept
    ]
    digest, num_bytes = write_tensors(target, tensors)
    cutter.num_bytes += num_bytes
    return digest
