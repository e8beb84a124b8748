"""Width: fewer feed-forward channels, fewer key and value heads with their query heads.

An axis is a part that is made of equal units. Channels go by 64, which hardware likes, or by less
where a part has too few of them for eight steps; heads go one by one. The last step stays: a part
is narrowed here and removed by depth. Served as smaller shapes.

What it does not know: which units go, and what the others make up for
(`unicuco.importance.units`); the evaluator and the export ask that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from unicuco.dimensions.base import Dimension, Granularity, Kept, grid_axis
from unicuco.errors import RequestError
from unicuco.space import Axis, Narrowing
from unicuco.types import ModelProfile, Part, ServedAs

_UNITS_PER_STEP: Final = 64
_MIN_STEPS: Final = 8
_FEW_UNITS: Final = 32  # heads, or a tiny model's channels: one by one


class Width(Dimension):
    """One axis per part: the share of its units that go, on a grid."""

    name = "width"
    served_as = ServedAs.SHRINK
    must_follow: frozenset[str] = frozenset({"depth"})
    has_slopes = True
    narrows = True

    def axes(self, profile: ModelProfile, granularity: Granularity) -> list[Axis]:
        """Return one axis per part that can be narrowed, at either granularity.

        Raises:
            RequestError: no part can be.
        """
        steps = [(profile.parts[p], num_steps(profile.parts[p])) for p in _narrowed(profile)]
        if not steps:
            raise RequestError(
                f"{profile.architecture} can't be narrowed (Llama and Qwen2 models can); "
                "leave width out of --dimensions; masks go with every family "
                "(--dimensions sparsity)"
            )
        return [grid_axis(f"{self.name}/{part.path}", count) for part, count in steps]

    def kept(self, profile: ModelProfile, settings: Tensor, granularity: Granularity) -> Kept:
        """Return 1 - setting of the units of the parts that have an axis."""
        width = torch.ones(len(settings), len(profile.parts), dtype=settings.dtype)
        index = torch.tensor(_narrowed(profile))
        return Kept(width=width.index_copy(1, index, 1.0 - settings))

    def narrowed(
        self, profile: ModelProfile, values: Sequence[float], granularity: Granularity
    ) -> dict[int, Narrowing]:
        """Return whole steps of units."""
        lost = {}
        for p, value in zip(_narrowed(profile), values, strict=True):
            count = num_steps(profile.parts[p])
            each = profile.parts[p].num_units // count
            lost[p] = Narrowing(units=round(value * count) * each)
        return lost


def num_steps(part: Part) -> int:
    """Return how many steps a part's axis has: its units over those that go at once."""
    if part.num_units <= _FEW_UNITS:
        return part.num_units
    each = math.gcd(part.num_units, _UNITS_PER_STEP)
    while each > 1 and part.num_units // each < _MIN_STEPS:
        each = math.gcd(part.num_units, each // 2)
    return part.num_units // each


def _narrowed(profile: ModelProfile) -> list[int]:
    return [p for p, part in enumerate(profile.parts) if num_steps(part) > 1]
