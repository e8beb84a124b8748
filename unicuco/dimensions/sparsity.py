"""Unstructured sparsity: the share of weights set to zero, per site or block. Served as a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from torch import Tensor

from unicuco.dimensions.base import Dimension, Granularity, Kept
from unicuco.space import Axis
from unicuco.types import ModelProfile, ServedAs, Site

# A site without a single weight has no gradient worth the name and no variant wants one.
MAX_SITE_SPARSITY: Final = 0.98


class Sparsity(Dimension):
    """Weights dropped in the order of the rank store. One axis per site, or one per block.

    A block's count is split over its sites in proportion to their weights, by largest remainder,
    earlier sites first among equals: so any whole number of dropped weights can be reached at both
    granularities.
    """

    name = "sparsity"
    served_as = ServedAs.MASK
    must_follow: frozenset[str] = frozenset({"depth", "width"})
    has_slopes = True

    def axes(self, profile: ModelProfile, granularity: Granularity) -> list[Axis]:
        """Return one axis per site in site order, or per block in block order, counting weights."""
        if granularity is Granularity.LAYER:
            parts = [(site.path, site.num_weights) for site in profile.sites]
        else:
            parts = [
                (
                    f"block.{block}",
                    sum(site.num_weights for site in profile.sites if site.block == block),
                )
                for block in range(profile.num_blocks)
            ]
        return [
            Axis(name=f"{self.name}/{part}", low=0.0, high=MAX_SITE_SPARSITY, num_steps=count)
            for part, count in parts
        ]

    def kept(self, profile: ModelProfile, settings: Tensor, granularity: Granularity) -> Kept:
        """Return 1 - s per site."""
        weights = 1.0 - settings
        if granularity is Granularity.BLOCK:
            weights = weights[:, [site.block for site in profile.sites]]
        return Kept(weights=weights)

    def zeroed(
        self,
        sites: Sequence[Site],
        sizes: Sequence[int],
        values: Sequence[float],
        granularity: Granularity,
    ) -> list[int]:
        """Return the exact dropped weights of every site."""
        if granularity is Granularity.LAYER:
            return [round(v * size) for v, size in zip(values, sizes, strict=True)]
        drops = [0] * len(sizes)
        for block, value in enumerate(values):
            own = [k for k, site in enumerate(sites) if site.block == block]
            for k, count in zip(own, _split_block([sizes[k] for k in own], value), strict=True):
                drops[k] = count
        return drops


def _split_block(sizes: Sequence[int], value: float) -> list[int]:
    total = sum(sizes)
    if not total:
        return [0] * len(sizes)
    dropped = round(value * total)
    drops = [dropped * size // total for size in sizes]
    order = sorted(range(len(sizes)), key=lambda k: -(dropped * sizes[k] % total))
    for k in order[: dropped - sum(drops)]:
        drops[k] += 1
    return drops
