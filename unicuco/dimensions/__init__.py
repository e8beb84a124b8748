"""Compression dimensions: each declares its axes, what they cost and how they are applied.

Add one: write ``dimensions/x.py`` with a class that implements `Dimension`, and add one line to
`DIMENSIONS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from unicuco.dimensions.base import Dimension, Granularity, Kept, ProductCost, parts_of
from unicuco.dimensions.byte_cost import ByteCost
from unicuco.dimensions.depth import Depth
from unicuco.dimensions.kv_bits import KvBits
from unicuco.dimensions.low_rank import LowRank
from unicuco.dimensions.sparsity import Sparsity
from unicuco.dimensions.weight_bits import WeightBits
from unicuco.dimensions.width import Width
from unicuco.errors import RequestError
from unicuco.space import StrategySpace
from unicuco.types import ModelProfile, ServedAs

DIMENSIONS: Final[dict[str, Dimension]] = {
    "sparsity": Sparsity(),
    "depth": Depth(),
    "width": Width(),
    "low_rank": LowRank(),
    "weight_bits": WeightBits(),
    "kv_bits": KvBits(),
}


def build_space(
    profile: ModelProfile,
    dimensions: Sequence[str] = ("sparsity",),
    granularity: Granularity = Granularity.LAYER,
    *,
    level_step: int = 0,
    kv_tokens: int | None = None,
) -> StrategySpace:
    """Make the strategy space of some dimensions together.

    ``level_step`` is the number of weights between a site's levels, where there are levels (0:
    none). Axes of whole blocks know nothing of it, for a block's weights are split over its sites.
    ``kv_tokens`` as `ByteCost` takes them.

    Raises:
        RequestError: an unknown or repeated dimension, none, or some that don't go together.
    """
    cost = build_cost(profile, dimensions, granularity, kv_tokens=kv_tokens)
    axes = [axis for part in cost.dimensions for axis in part.axes(profile, granularity)]
    stride = level_step if granularity is Granularity.LAYER else 0
    return StrategySpace(axes, cost, stride=stride)


def build_cost(
    profile: ModelProfile,
    dimensions: Sequence[str],
    granularity: Granularity,
    *,
    kv_tokens: int | None = None,
) -> ProductCost:
    """Make the cost model of some dimensions together, which also applies them to a model.

    Raises:
        RequestError: an unknown or repeated dimension, none, or some that don't go together.
    """
    check_dimensions(dimensions)
    parts = [DIMENSIONS[name] for name in DIMENSIONS if name in dimensions]
    if any(part.served_as is ServedAs.QUANTISED for part in parts):
        return ByteCost(profile, parts, granularity, kv_tokens)
    return ProductCost(profile, parts, granularity)


def check_dimensions(dimensions: Sequence[str]) -> None:
    """Refuse dimensions that can't be learned together.

    Raises:
        RequestError: an unknown or repeated dimension, none, or some that don't go together.
    """
    unknown = [name for name in dimensions if name not in DIMENSIONS]
    if unknown or not dimensions or len(set(dimensions)) != len(dimensions):
        raise RequestError(
            f"dimensions must be different names out of {', '.join(DIMENSIONS)}; "
            f"got {', '.join(dimensions) or 'none'}"
        )
    kinds = {name: DIMENSIONS[name].served_as for name in dimensions}
    if {ServedAs.SHRINK, ServedAs.QUANTISED} <= set(kinds.values()):
        named = [name for name, kind in kinds.items() if kind is not ServedAs.MASK]
        raise RequestError(
            f"shapes and bits are not learned together in this version: {', '.join(named)}; "
            "leave shapes out, or the bits"
        )
    for name in dimensions:
        apart = sorted(DIMENSIONS[name].apart_from & set(dimensions))
        if apart:
            raise RequestError(
                f"{name} and {', '.join(apart)} are not learned together; leave one of them out"
            )


def any_narrows(dimensions: Sequence[str]) -> bool:
    """Say whether some of these dimensions ask which units of a part stay."""
    return any(DIMENSIONS[name].narrows for name in dimensions)


def follow_slopes(dimensions: Sequence[str]) -> bool:
    """Say whether a search of these dimensions asks for derivatives along their axes.

    What a part costs as a whole is no matter of slopes: where parts are removed too, thrice as many
    values serve better.
    """
    return "depth" not in dimensions and all(DIMENSIONS[name].has_slopes for name in dimensions)


def have_slopes(profile: ModelProfile, dimensions: Sequence[str]) -> bool:
    """Say whether the KL's derivative along every axis is known from one backward pass."""
    shrinks = any(DIMENSIONS[name].served_as is ServedAs.SHRINK for name in dimensions)
    known = all(DIMENSIONS[name].has_slopes for name in dimensions)
    return known and (bool(profile.parts) or not shrinks)


__all__ = [
    "DIMENSIONS",
    "ByteCost",
    "Dimension",
    "Granularity",
    "Kept",
    "ProductCost",
    "any_narrows",
    "build_cost",
    "build_space",
    "check_dimensions",
    "follow_slopes",
    "have_slopes",
    "parts_of",
]
