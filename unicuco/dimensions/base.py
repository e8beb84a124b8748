"""What a dimension is, and what several cost together: a product over sites and blocks.

Notation: b batch, i sites, l blocks. A dimension contributes a kept factor per site (``b x i``) and
per block (``b x l``), both in [0, 1]; the parameters kept in block l are alive_l (extra_l + sum
over its sites of w_i keep_i), alive and keep being products over the dimensions and extra_l the
parameters of the block outside its sites.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from graphlib import TopologicalSorter
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from unicuco.space import Axis
from unicuco.types import ModelProfile, ServedAs

if TYPE_CHECKING:
    from torch import nn


class Granularity(StrEnum):
    """One axis per block, or one per site."""

    BLOCK = "block"
    LAYER = "layer"


class Dimension(Protocol):
    """One way of compressing, as the space and the evaluator need it.

    ``must_follow`` names the dimensions that are applied before this one.
    """

    name: str
    served_as: ServedAs
    must_follow: frozenset[str]

    def axes(self, profile: ModelProfile, granularity: Granularity) -> list[Axis]:
        """Return the dimension's axes in order."""

    def factors(
        self, profile: ModelProfile, settings: Tensor, granularity: Granularity
    ) -> tuple[Tensor, Tensor]:
        """Return what ``b x d_own`` settings keep: ``b x i`` of sites and ``b x l`` of blocks."""

    def site_drops(
        self, profile: ModelProfile, values: Sequence[float], granularity: Granularity
    ) -> dict[str, int]:
        """Return how many weights each site loses to this dimension; sites not named lose none."""

    def removed_blocks(self, profile: ModelProfile, values: Sequence[float]) -> frozenset[int]:
        """Return the blocks that are gone as a whole."""

    def apply(self, model: nn.Module, profile: ModelProfile, values: Sequence[float]) -> None:
        """Bring structural changes onto a live model, whatever was applied before.

        Masks are cut by the evaluator.
        """


class ProductCost:
    """The cost model of several dimensions (`CostModel` of `unicuco.space`)."""

    def __init__(
        self, profile: ModelProfile, dimensions: Sequence[Dimension], granularity: Granularity
    ) -> None:
        self.profile = profile
        self.dimensions = tuple(dimensions)
        self.granularity = granularity
        self.total_params = profile.total_params
        self.num_site_weights = profile.num_site_weights
        counts = [len(dimension.axes(profile, granularity)) for dimension in dimensions]
        self._ends = [sum(counts[: k + 1]) for k in range(len(counts))]
        self._starts = [end - count for end, count in zip(self._ends, counts, strict=True)]
        self._weights = torch.tensor(
            [site.num_weights for site in profile.sites], dtype=torch.float64
        )
        self._block_of = torch.tensor([site.block for site in profile.sites])
        in_sites = torch.zeros(profile.num_blocks, dtype=torch.float64).index_add_(
            0, self._block_of, self._weights
        )
        params = torch.tensor(profile.block_params, dtype=torch.float64)
        self._extra = params - in_sites
        self._fixed = float(profile.total_params - int(params.sum()))

    def kept(self, settings: Tensor) -> Tensor:
        """Return the relaxed kept parameters, ``b`` float64, of ``b x d`` settings."""
        settings = settings.double()
        keep, alive = self._factors(settings)
        per_block = self._extra.expand(len(settings), -1).index_add(
            1, self._block_of, keep * self._weights
        )
        return self._fixed + (alive * per_block).sum(1)

    def site_drops(self, values: Sequence[float]) -> dict[str, int]:
        """Return the exact number of weights each site loses, all of them in a removed block."""
        removed = self.removed_blocks(values)
        drops = {site.path: 0 for site in self.profile.sites}
        for dimension, own in self._split(values):
            for path, count in dimension.site_drops(self.profile, own, self.granularity).items():
                drops[path] += count
        for site in self.profile.sites:
            if site.block in removed:
                drops[site.path] = site.num_weights
        return drops

    def removed_blocks(self, values: Sequence[float]) -> frozenset[int]:
        """Return the blocks that are gone as a whole."""
        return frozenset().union(
            *(part.removed_blocks(self.profile, own) for part, own in self._split(values))
        )

    def kept_params(self, values: Sequence[float]) -> int:
        """Return the exact kept parameters of the whole model."""
        removed = self.removed_blocks(values)
        gone = sum(self.profile.block_params[block] for block in removed)
        drops = self.site_drops(values)
        zeroed = sum(drops[site.path] for site in self.profile.sites if site.block not in removed)
        return self.profile.total_params - gone - zeroed

    def num_bytes(self, values: Sequence[float]) -> int:
        """Return the bytes stored: zeros are stored, removed blocks are not."""
        removed = self.removed_blocks(values)
        return self.profile.total_bytes - sum(self.profile.block_bytes[block] for block in removed)

    def apply(self, model: nn.Module, values: Sequence[float]) -> None:
        """Apply every dimension's structural part to a live model, after those it must follow."""
        own = {dimension.name: (dimension, part) for dimension, part in self._split(values)}
        follows = {name: dimension.must_follow & own.keys() for name, (dimension, _) in own.items()}
        for name in TopologicalSorter(follows).static_order():
            dimension, part = own[name]
            dimension.apply(model, self.profile, part)

    def _factors(self, settings: Tensor) -> tuple[Tensor, Tensor]:
        keep: Tensor | float = 1.0
        alive: Tensor | float = 1.0
        for dimension, start, end in zip(self.dimensions, self._starts, self._ends, strict=True):
            site, block = dimension.factors(self.profile, settings[:, start:end], self.granularity)
            keep, alive = keep * site, alive * block
        return torch.as_tensor(keep), torch.as_tensor(alive)

    def _split(self, values: Sequence[float]) -> list[tuple[Dimension, Sequence[float]]]:
        parts = zip(self.dimensions, self._starts, self._ends, strict=True)
        return [(dimension, values[start:end]) for dimension, start, end in parts]
