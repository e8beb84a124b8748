"""What each axis alone is expected to cost: one curve per axis over its unit coordinate, tabulated.

For sparsity axes these are the Fisher curves; an axis without prior knowledge gets a power of
its setting. The curves say nothing of what axes do together; that is what is learned.

Notation: d axes, m knots, u in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from unicuco.dimensions import Granularity
from unicuco.space import StrategySpace
from unicuco.types import ModelProfile, Site

_NUM_KNOTS: Final = 257
_DEFAULT_COST: Final = 0.1  # nats at the end of an axis of which nothing is known


class AxisCurves:
    """Cost curves, a ``d x m`` table over equally spaced unit coordinates, linear in between."""

    def __init__(self, table: Tensor) -> None:
        if table.ndim != 2 or not bool(torch.isfinite(table).all()):
            raise ValueError(f"curves must be a finite d x m table, got shape {tuple(table.shape)}")
        self.table = table.double()

    @classmethod
    def from_fisher(
        cls,
        space: StrategySpace,
        profile: ModelProfile,
        granularity: Granularity,
        rank_sums: Mapping[str, Tensor],
    ) -> AxisCurves:
        """Read the curves of sparsity axes off per-rank Fisher sums (site path -> ``i``)."""
        knots = torch.linspace(0, 1, _NUM_KNOTS, dtype=torch.float64)
        parts = _axis_sites(profile, granularity)
        rows = []
        for axis in space.axes:
            sites = parts.get(axis.name, [])
            settings = axis.low + knots * (axis.high - axis.low)
            curves = [_at(rank_sums[site.path], settings) for site in sites]
            rows.append(
                torch.stack(curves).sum(0) if curves else _DEFAULT_COST * knots.pow(axis.power)
            )
        return cls(torch.stack(rows))

    def values(self, unit: Tensor) -> Tensor:
        """Return the ``b x d`` costs at ``b x d`` unit points."""
        index, offset = self._locate(unit)
        left, right = self._knots(index)
        return left + offset * (right - left)

    def slopes(self, unit: Tensor) -> Tensor:
        """Return the ``b x d`` derivatives of `values`."""
        left, right = self._knots(self._locate(unit)[0])
        return (right - left) * (self.table.shape[1] - 1)

    def _locate(self, unit: Tensor) -> tuple[Tensor, Tensor]:
        position = unit.clamp(0, 1) * (self.table.shape[1] - 1)
        index = position.detach().floor().long().clamp(max=self.table.shape[1] - 2)
        return index, position - index

    def _knots(self, index: Tensor) -> tuple[Tensor, Tensor]:
        axes = torch.arange(self.table.shape[0])
        return self.table[axes, index], self.table[axes, index + 1]


def _axis_sites(profile: ModelProfile, granularity: Granularity) -> dict[str, Sequence[Site]]:
    if granularity is Granularity.LAYER:
        return {f"sparsity/{site.path}": [site] for site in profile.sites}
    return {
        f"sparsity/block.{block}": [site for site in profile.sites if site.block == block]
        for block in range(profile.num_blocks)
    }


def _at(rank_sums: Tensor, sparsity: Tensor) -> Tensor:
    """Return the cost of dropping shares ``sparsity`` (``m``) of a site, linear within a rank."""
    curve = torch.cat([rank_sums.new_zeros(1), rank_sums.cumsum(0)]).double()
    position = sparsity * (len(curve) - 1)
    index = position.floor().long().clamp(max=len(curve) - 2)
    return curve[index] + (position - index) * (curve[index + 1] - curve[index])
