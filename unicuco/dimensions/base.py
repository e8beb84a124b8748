"""What a dimension is, and what several cost together: a product over sites and parts.

A part is what can be removed by itself: a sub-module where the profile tells them apart, else a
whole block. Notation: b batch, i sites, p parts. A dimension says which share of every site's
weights and lines it keeps, and which share of every part's units and of the part as a whole
(`Kept`); the parameters kept in part p are alive_p (fixed_p + width_p times the sum over its sites
of lines_i (biases_i + w_i weights_i)), all factors being products over the dimensions.

What it does not know: which weights are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from graphlib import TopologicalSorter
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from unicuco.space import Axis, Narrowing, Shape
from unicuco.types import ModelProfile, Part, ServedAs, Site

if TYPE_CHECKING:
    from torch import nn


class Granularity(StrEnum):
    """One axis per block, or one per site (depth and width: per sub-module)."""

    BLOCK = "block"
    LAYER = "layer"


@dataclass(frozen=True, slots=True)
class Kept:
    """Shares in [0, 1] that a dimension keeps; none: all.

    ``weights``: ``b x i`` of every site's weights, shapes as they are. ``lines``: ``b x i`` of the
    lines (rows, of a part's last site columns) that a unit has in every site. ``width``: ``b x p``
    of the units of every part. ``alive``: ``b x p`` of every part as a whole. ``weight_bits``:
    ``b x i`` of the way from 16 to 4 bits that every site has gone, and ``kv_bits``: ``b x l`` what
    every block caches: shares that are taken, not kept.
    """

    weights: Tensor | None = None
    lines: Tensor | None = None
    width: Tensor | None = None
    alive: Tensor | None = None
    weight_bits: Tensor | None = None
    kv_bits: Tensor | None = None


class Dimension(Protocol):
    """One way of compressing, as the space and the evaluator need it.

    ``must_follow`` names the dimensions that are applied before this one, ``apart_from`` those that
    it can't be learned with; ``narrows`` says that parts lose some of their units, or of what is
    inside them; ``has_slopes`` that the KL's derivative along its axes is known from one backward
    pass, where the model has parts. Subclasses say what they do; what they leave out changes
    nothing.
    """

    name: str
    served_as: ServedAs
    must_follow: frozenset[str]
    apart_from: frozenset[str] = frozenset()
    narrows: bool = False
    has_slopes: bool = False

    def axes(self, profile: ModelProfile, granularity: Granularity) -> list[Axis]:
        """Return the dimension's axes in order.

        Raises:
            RequestError: the model's structure has none at this granularity.
        """

    def kept(self, profile: ModelProfile, settings: Tensor, granularity: Granularity) -> Kept:
        """Return what ``b x d_own`` settings keep."""

    def removed_parts(
        self, profile: ModelProfile, values: Sequence[float], granularity: Granularity
    ) -> frozenset[int]:
        """Return the parts (positions in `parts_of`) that are gone as a whole."""
        return frozenset()

    def narrowed(
        self, profile: ModelProfile, values: Sequence[float], granularity: Granularity
    ) -> dict[int, Narrowing]:
        """Return what each part loses of its width; parts not named lose nothing."""
        return {}

    def zeroed(
        self,
        sites: Sequence[Site],
        sizes: Sequence[int],
        values: Sequence[float],
        granularity: Granularity,
    ) -> list[int]:
        """Return how many weights of each site become zero, of ``sizes`` that are still there."""
        return [0] * len(sizes)

    def apply(
        self,
        model: nn.Module,
        profile: ModelProfile,
        values: Sequence[float],
        granularity: Granularity,
    ) -> None:
        """Bring structural changes onto a live model, whatever was applied before.

        Weights are brought by whoever holds them.
        """
        return


def grid_axis(name: str, num_steps: int) -> Axis:
    """Return the axis of a share of something that goes by steps; the last step stays."""
    high = (num_steps - 1) / num_steps
    return Axis(name=name, low=0.0, high=high, num_steps=num_steps, is_shape=True)


def parts_of(profile: ModelProfile) -> tuple[Part, ...]:
    """Return the profile's parts, or a part for every block where it has none."""
    if profile.parts:
        return profile.parts
    return tuple(
        Part(
            block=block,
            modules=(path,),
            sites=tuple(site.path for site in profile.sites if site.block == block),
            num_params=profile.block_params[block],
            num_bytes=profile.block_bytes[block],
        )
        for block, path in enumerate(profile.block_paths)
    )


class ProductCost:
    """The cost model of several dimensions (`CostModel` of `unicuco.space`)."""

    counts_bytes = False

    def __init__(
        self, profile: ModelProfile, dimensions: Sequence[Dimension], granularity: Granularity
    ) -> None:
        self.profile = profile
        self.parts = parts_of(profile)
        self.dimensions = tuple(dimensions)
        self.granularity = granularity
        self.total_params = profile.total_params
        self.num_site_weights = profile.num_site_weights
        self.total_size = profile.total_params
        self.site_size = profile.num_site_weights
        counts = [len(dimension.axes(profile, granularity)) for dimension in dimensions]
        self._ends = [sum(counts[: k + 1]) for k in range(len(counts))]
        self._latest: tuple[tuple[float, ...], Shape] | None = None
        self._starts = [end - count for end, count in zip(self._ends, counts, strict=True)]
        self._weights = torch.tensor(
            [site.num_weights for site in profile.sites], dtype=torch.float64
        )
        part_of = {path: p for p, part in enumerate(self.parts) for path in part.sites}
        self._part_of = [part_of[site.path] for site in profile.sites]
        params = torch.tensor([part.num_params for part in self.parts], dtype=torch.float64)
        in_sites = torch.zeros(len(self.parts), dtype=torch.float64).index_add_(
            0, torch.tensor(self._part_of), self._weights
        )
        biases = {path: count for part in self.parts for path, count in _site_biases(part, profile)}
        self._biases = [biases.get(site.path, 0) for site in profile.sites]
        per_part = torch.tensor(
            [part.num_units * part.unit_biases for part in self.parts], dtype=torch.float64
        )
        self._fixed = params - in_sites - per_part
        self._outside = float(profile.total_params - int(params.sum()))

    @property
    def served_as(self) -> ServedAs:
        """How a variant of these dimensions is stored."""
        shrinks = any(part.served_as is ServedAs.SHRINK for part in self.dimensions)
        return ServedAs.SHRINK if shrinks else ServedAs.MASK

    @property
    def slack(self) -> float:
        """Weights by which the relaxed size of a strategy may be less than the exact one."""
        counted = [a for d in self.dimensions for a in d.axes(self.profile, self.granularity)]
        narrows = any(axis.is_shape and not axis.is_choice for axis in counted)
        return float(sum(not axis.is_shape for axis in counted)) if narrows else 0.0

    def size(self, settings: Tensor) -> Tensor:
        """Return the relaxed size, ``b`` float64, of ``b x d`` settings: the kept parameters."""
        return self.kept(settings)

    def size_of(self, values: Sequence[float]) -> int:
        """Return the exact size: the kept parameters."""
        return self.kept_params(values)

    def shares(self, settings: Tensor) -> list[Kept]:
        """Return what every dimension keeps, of ``b x d`` settings."""
        return [
            part.kept(self.profile, settings[:, start:end], self.granularity)
            for part, start, end in zip(self.dimensions, self._starts, self._ends, strict=True)
        ]

    def kept(self, settings: Tensor) -> Tensor:
        """Return the relaxed kept parameters, ``b`` float64, of ``b x d`` settings."""
        settings = settings.double()
        shares = self.shares(settings)
        width, alive = _product([s.width for s in shares]), _product([s.alive for s in shares])
        weights = self._weights.expand(len(settings), -1)
        for share in shares:
            weights = weights if share.weights is None else weights * share.weights
        weights = weights + torch.tensor(self._biases, dtype=torch.float64)
        lines = _product([s.lines for s in shares])
        weights = weights if lines is None else weights * lines
        in_sites = torch.zeros(len(settings), len(self.parts), dtype=torch.float64)
        in_sites = in_sites.index_add(1, self._part_index, weights)
        per_part = self._fixed + (in_sites if width is None else in_sites * width)
        return self._outside + (per_part if alive is None else per_part * alive).sum(1)

    def shape(self, values: Sequence[float]) -> Shape:
        """Return exactly what is left of the model."""
        key, latest = tuple(values), self._latest
        if latest is None or latest[0] != key:  # several questions are asked of each strategy
            latest = self._latest = key, self._shape_of(key)
        return latest[1]

    def _shape_of(self, values: tuple[float, ...]) -> Shape:
        own = self._split(values)
        gone: frozenset[int] = frozenset()
        lost: dict[int, Narrowing] = {}
        for dimension, part in own:
            gone |= dimension.removed_parts(self.profile, part, self.granularity)
            for p, narrowing in dimension.narrowed(self.profile, part, self.granularity).items():
                lost[p] = lost.get(p, Narrowing()) + narrowing
        narrowed = tuple((p, less) for p, less in sorted(lost.items()) if less and p not in gone)
        sizes = [site.num_weights for site in self.profile.sites]
        for position, p in enumerate(self._part_of):
            sizes[position] = 0 if p in gone else sizes[position]
        for position, kept, of in self._narrowed_sites(narrowed):
            sizes[position] = sizes[position] // of * kept
        zeroed = [0] * len(sizes)
        for dimension, part in own:
            more = dimension.zeroed(self.profile.sites, sizes, part, self.granularity)
            zeroed = [a + b for a, b in zip(zeroed, more, strict=True)]
        return Shape(parts=gone, narrowed=narrowed, sizes=tuple(sizes), zeroed=tuple(zeroed))

    def site_drops(self, values: Sequence[float]) -> dict[str, int]:
        """Return the exact number of weights each site loses, all of them where it is removed."""
        shape = self.shape(values)
        return {
            site.path: site.num_weights - size + zeroed
            for site, size, zeroed in zip(
                self.profile.sites, shape.sizes, shape.zeroed, strict=True
            )
        }

    def site_losses(self, values: Sequence[float]) -> list[float]:
        """Return the share of its weights that every site loses."""
        drops = self.site_drops(values)
        return [drops[site.path] / site.num_weights for site in self.profile.sites]

    def kept_params(self, values: Sequence[float]) -> int:
        """Return the exact kept parameters of the whole model."""
        shape = self.shape(values)
        gone = sum(self.parts[p].num_params for p in shape.parts)
        narrowed = sum(
            (self.profile.sites[position].num_weights + self._biases[position]) // of * (of - kept)
            for position, kept, of in self._narrowed_sites(shape.narrowed)
        )
        return self.profile.total_params - gone - narrowed - sum(shape.zeroed)

    def num_bytes(self, values: Sequence[float]) -> int:
        """Return the bytes stored: zeros are stored, removed parts and units are not."""
        shape = self.shape(values)
        gone = sum(self.parts[p].num_bytes for p in shape.parts)
        narrowed = sum(
            self._stored_bytes[position] // of * (of - kept)
            for position, kept, of in self._narrowed_sites(shape.narrowed)
        )
        return self.profile.total_bytes - gone - narrowed

    def apply(self, model: nn.Module, values: Sequence[float]) -> None:
        """Apply every dimension's structural part to a live model, after those it must follow."""
        own = {dimension.name: (dimension, part) for dimension, part in self._split(values)}
        follows = {name: dimension.must_follow & own.keys() for name, (dimension, _) in own.items()}
        for name in TopologicalSorter(follows).static_order():
            dimension, part = own[name]
            dimension.apply(model, self.profile, part, self.granularity)

    def _narrowed_sites(
        self, narrowed: Sequence[tuple[int, Narrowing]]
    ) -> list[tuple[int, int, int]]:
        """Return the sites of narrowed parts: position, lines that stay, of how many (per line)."""
        return [
            (self._position[path], *kept_lines(self.parts[p], k, less))
            for p, less in narrowed
            for k, path in enumerate(self.parts[p].sites)
        ]

    @cached_property
    def _position(self) -> dict[str, int]:
        return {site.path: position for position, site in enumerate(self.profile.sites)}

    @cached_property
    def _stored_bytes(self) -> list[int]:
        """Bytes of every site, its bias included where units have a share in it."""
        sizes = [site.num_weights * site.item_bytes for site in self.profile.sites]
        for part in self.parts:
            own = [self._position[path] for path in part.sites]
            if part.unit_biases:
                in_biases = part.unit_bytes - sum(sizes[k] for k in own) // part.num_units
                for k in own:
                    sizes[k] += self._biases[k] * in_biases // part.unit_biases
        return sizes

    @cached_property
    def _part_index(self) -> Tensor:
        return torch.tensor(self._part_of)

    def _split(self, values: Sequence[float]) -> list[tuple[Dimension, Sequence[float]]]:
        parts = zip(self.dimensions, self._starts, self._ends, strict=True)
        return [(dimension, values[start:end]) for dimension, start, end in parts]


def kept_lines(part: Part, position: int, less: Narrowing) -> tuple[int, int]:
    """Return how many lines of a narrowed part's site stay, and of how many; in steps of narrowing.

    Args:
        part: that loses something.
        position: of the site in the part.
        less: what it loses.
    """
    units = part.num_units - less.units
    if not part.head_size:
        return units, part.num_units
    if position < 2:  # queries and keys
        pairs = part.head_size // 2
        return units * (pairs - less.pairs), part.num_units * pairs
    return units * (part.head_size - less.ranks), part.num_units * part.head_size


def _site_biases(part: Part, profile: ModelProfile) -> list[tuple[str, int]]:
    """Return the biases of a part's sites that its units have a share in: of all but the last."""
    rows = {site.path: site.num_rows for site in profile.sites if site.path in part.sites[:-1]}
    per_row, rest = divmod(part.num_units * part.unit_biases, sum(rows.values()) or 1)
    assert (rest, per_row) in ((0, 0), (0, 1)), "all of them have biases, or none"
    return [(path, per_row * count) for path, count in rows.items()]


def _product(shares: Sequence[Tensor | None]) -> Tensor | None:
    product: Tensor | None = None
    for share in shares:
        if share is not None:
            product = share if product is None else product * share
    return product
