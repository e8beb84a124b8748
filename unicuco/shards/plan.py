"""Which blocks go together: contiguous ranges whose slowest is as fast as can be.

Embeddings stay with the first range, the final norm and the head with the last. Times are measured
(`measure_seconds`), or estimated from parameters: a token costs a block about as many products as
the block has weights, and the head as many as it has.

What it does not know: where the ranges run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from unicuco.errors import RequestError
from unicuco.types import ModelProfile

_RANK_BYTES = 2  # beside every weight of a site, in rows of up to 32,767 columns


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCosts:
    """What blocks cost: ``seconds`` (any unit) and ``num_bytes`` of each.

    ``first`` and ``last`` are (seconds, bytes) of what embeds tokens and what makes logits.
    """

    seconds: tuple[float, ...]
    num_bytes: tuple[int, ...]
    first: tuple[float, int] = (0.0, 0)
    last: tuple[float, int] = (0.0, 0)

    def of(self, blocks: range) -> tuple[float, int]:
        """Return the seconds and bytes of a range."""
        seconds = sum(self.seconds[block] for block in blocks)
        num_bytes = sum(self.num_bytes[block] for block in blocks)
        for is_there, own in (
            (blocks.start == 0, self.first),
            (blocks.stop == len(self.seconds), self.last),
        ):
            if is_there:
                seconds, num_bytes = seconds + own[0], num_bytes + own[1]
        return seconds, num_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlan:
    """Ranges of blocks in order; together they are all blocks."""

    stages: tuple[range, ...]

    def __post_init__(self) -> None:
        ends = [0, *(blocks.stop for blocks in self.stages)]
        if not self.stages or [blocks.start for blocks in self.stages] != ends[:-1]:
            raise ValueError(f"stages must follow one another from block 0, got {self.stages}")
        if any(len(blocks) == 0 for blocks in self.stages):
            raise ValueError(f"every stage must have a block, got {self.stages}")


def check_shards(num_shards: int, num_blocks: int) -> None:
    """Refuse more shards than there are blocks.

    Raises:
        RequestError: the line names both.
    """
    if num_shards > num_blocks:
        raise RequestError(
            f"--shards {num_shards} is more than the model has blocks; ask for at most {num_blocks}"
        )


def plan_shards(
    costs: StageCosts, num_shards: int, *, memory_bytes: int | None = None
) -> ShardPlan:
    """Split blocks into ranges so that the slowest is as fast as possible.

    Args:
        costs: of the blocks.
        num_shards: ranges, >= 1.
        memory_bytes: the most that a range may hold; none: any.

    Raises:
        RequestError: more shards than blocks, or no split in which every range fits.
    """
    num_blocks = len(costs.seconds)
    check_shards(num_shards, num_blocks)

    @cache
    def best(start: int, count: int) -> tuple[float, tuple[int, ...]]:
        """Return the slowest range and the ends of the best ``count`` ranges from ``start`` on."""
        if count == 1:
            return price(range(start, num_blocks)), (num_blocks,)
        found: tuple[float, tuple[int, ...]] = (math.inf, ())
        for end in range(start + 1, num_blocks - count + 2):
            rest, ends = best(end, count - 1)
            slowest = max(price(range(start, end)), rest)
            if slowest < found[0]:
                found = slowest, (end, *ends)
        return found

    def price(blocks: range) -> float:
        seconds, num_bytes = costs.of(blocks)
        fits = memory_bytes is None or num_bytes <= memory_bytes
        return seconds if fits else math.inf

    slowest, ends = best(0, num_shards)
    if math.isinf(slowest):
        largest = max(costs.of(range(block, block + 1))[1] for block in range(num_blocks))
        raise RequestError(
            f"no split into {num_shards} shards keeps each within {memory_bytes:,} bytes (a block "
            f"alone takes up to {largest:,}); ask for more shards"
        )
    starts = (0, *ends[:-1])
    return ShardPlan(stages=tuple(map(range, starts, ends)))


def estimated_costs(profile: ModelProfile) -> StageCosts:
    """Estimate from parameters: seconds as products per token, bytes with the drop order."""
    in_sites = [0] * profile.num_blocks
    for site in profile.sites:
        in_sites[site.block] += site.num_weights
    head = profile.vocabulary_size * hidden_size(profile)
    outside = profile.total_bytes - sum(profile.block_bytes)
    outside_params = profile.total_params - sum(profile.block_params)
    # Embeddings are as large as the head, be they the same tensor or another one.
    own = round(outside * min(1.0, head / max(1, outside_params)))
    return StageCosts(
        seconds=tuple(map(float, in_sites)),
        num_bytes=tuple(
            own + _RANK_BYTES * count
            for own, count in zip(profile.block_bytes, in_sites, strict=True)
        ),
        first=(0.0, own),
        last=(float(head), own),
    )


def hidden_size(profile: ModelProfile) -> int:
    """Return the width of the hidden states: a block's first matrix reads them."""
    return profile.sites[0].num_columns


def with_seconds(costs: StageCosts, seconds: Sequence[float], last: float) -> StageCosts:
    """Return costs with measured seconds in place of estimated ones."""
    return StageCosts(
        seconds=tuple(seconds),
        num_bytes=costs.num_bytes,
        first=costs.first,
        last=(last, costs.last[1]),
    )
