"""Unstructured sparsity: the share of weights set to zero, per site or block. Served as a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from unicuco.dimensions.base import Granularity
from unicuco.space import Axis
from unicuco.types import ModelProfile, ServedAs, Site

if TYPE_CHECKING:
    from torch import nn

# A site without a single weight has no gradient worth the name and no variant wants one.
MAX_SITE_SPARSITY: Final = 0.98


class Sparsity:
    """Weights dropped in the order of the rank store. One axis per site, or one per block.

    A block's count is split over its sites in proportion to their weights, by largest remainder,
    earlier sites first among equals: so any whole number of dropped weights can be reached at both
    granularities.
    """

    name = "sparsity"
    served_as = ServedAs.MASK
    must_follow: frozenset[str] = frozenset({"depth"})

    def axes(self, profile: ModelProfile, granularity: Granularity) -> list[Axis]:
        """Return one axis per site in site order, or per block in block order, counting weights."""
        if granularity is Granularity.LAYER:
            parts = [(site.path, site.num_weights) for site in profile.sites]
        else:
            parts = [
                (f"block.{block}", sum(site.num_weights for site in _sites(profile, block)))
                for block in range(profile.num_blocks)
            ]
        return [
            Axis(name=f"{self.name}/{part}", low=0.0, high=MAX_SITE_SPARSITY, num_steps=count)
            for part, count in parts
        ]

    def factors(
        self, profile: ModelProfile, settings: Tensor, granularity: Granularity
    ) -> tuple[Tensor, Tensor]:
        """Return 1 - s per site, and 1 per block."""
        keep = 1.0 - settings
        if granularity is Granularity.BLOCK:
            keep = keep[:, [site.block for site in profile.sites]]
        return keep, torch.ones(len(settings), profile.num_blocks, dtype=settings.dtype)

    def site_drops(
        self, profile: ModelProfile, values: Sequence[float], granularity: Granularity
    ) -> dict[str, int]:
        """Return the exact dropped weights of every site."""
        if granularity is Granularity.LAYER:
            return {
                site.path: round(v * site.num_weights)
                for site, v in zip(profile.sites, values, strict=True)
            }
        drops: dict[str, int] = {}
        for block, value in enumerate(values):
            drops.update(_split_block(_sites(profile, block), value))
        return drops

    def removed_blocks(self, profile: ModelProfile, values: Sequence[float]) -> frozenset[int]:
        """Return no block: masks remove none."""
        return frozenset()

    def apply(self, model: nn.Module, profile: ModelProfile, values: Sequence[float]) -> None:
        """Do nothing: masks are cut from the rank store by whoever holds the weights."""


def _sites(profile: ModelProfile, block: int) -> list[Site]:
    return [site for site in profile.sites if site.block == block]


def _split_block(sites: list[Site], value: float) -> dict[str, int]:
    total = sum(site.num_weights for site in sites)
    dropped = round(value * total)
    drops = {site.path: dropped * site.num_weights // total for site in sites}
    by_remainder = sorted(sites, key=lambda site: -(dropped * site.num_weights % total))
    for site in by_remainder[: dropped - sum(drops.values())]:
        drops[site.path] += 1
    return drops
