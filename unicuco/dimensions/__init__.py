"""Compression dimensions: each declares its axes, what they cost and how they are applied.

Add one: write ``dimensions/x.py`` with a class that implements `Dimension`, and add one line to
`DIMENSIONS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from unicuco.dimensions.base import Dimension, Granularity, Kept, ProductCost, parts_of
from unicuco.dimensions.depth import Depth
from unicuco.dimensions.sparsity import Sparsity
from unicuco.dimensions.width import Width
from unicuco.errors import RequestError
from unicuco.space import StrategySpace
from unicuco.types import ModelProfile

DIMENSIONS: Final[dict[str, Dimension]] = {
    "sparsity": Sparsity(),
    "depth": Depth(),
    "width": Width(),
}


def build_space(
    profile: ModelProfile,
    dimensions: Sequence[str] = ("sparsity",),
    granularity: Granularity = Granularity.LAYER,
    *,
    level_step: int = 0,
) -> StrategySpace:
    """Make the strategy space of some dimensions together.

    ``level_step`` is the number of weights between a site's levels, where there are levels (0:
    none). Axes of whole blocks know nothing of it, for a block's weights are split over its sites.

    Raises:
        RequestError: an unknown or repeated dimension, or none.
    """
    cost = build_cost(profile, dimensions, granularity)
    axes = [axis for part in cost.dimensions for axis in part.axes(profile, granularity)]
    stride = level_step if granularity is Granularity.LAYER else 0
    return StrategySpace(axes, cost, stride=stride)


def build_cost(
    profile: ModelProfile, dimensions: Sequence[str], granularity: Granularity
) -> ProductCost:
    """Make the cost model of some dimensions together, which also applies them to a model.

    Raises:
        RequestError: an unknown or repeated dimension, or none.
    """
    unknown = [name for name in dimensions if name not in DIMENSIONS]
    if unknown or not dimensions or len(set(dimensions)) != len(dimensions):
        raise RequestError(
            f"dimensions must be different names out of {', '.join(DIMENSIONS)}; "
            f"got {', '.join(dimensions) or 'none'}"
        )
    parts = [DIMENSIONS[name] for name in DIMENSIONS if name in dimensions]
    return ProductCost(profile, parts, granularity)


__all__ = [
    "DIMENSIONS",
    "Dimension",
    "Granularity",
    "Kept",
    "ProductCost",
    "build_cost",
    "build_space",
    "parts_of",
]
