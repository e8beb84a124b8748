"""Hypervolume of two minimised objectives, and the batch that adds most to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from unicuco.surrogate import EPSILON

WORST_KL: Final = 3.0  # nats per token: the corner that strategies' hypervolume is counted up to


def quality_volume(points: Sequence[tuple[float, float]]) -> float:
    """Return the area that strategies dominate: kept fraction by log KL.

    Args:
        points: kept fraction and KL in nats per token of each; counted up to the dense size and 3
            nats, beyond which nothing adds to it.
    """
    logs = [(kept, math.log(kl + EPSILON)) for kept, kl in points]
    corner = torch.tensor([1.0, math.log(WORST_KL + EPSILON)], dtype=torch.float64)
    return hypervolume(torch.tensor(logs, dtype=torch.float64).reshape(-1, 2), corner)


def hypervolume(points: Tensor, reference: Tensor) -> float:
    """Return the area that ``n x 2`` points, both minimised, dominate up to ``reference`` (2)."""
    inside = points[(points < reference).all(1)]
    area, ceiling = 0.0, float(reference[1])
    for x, y in sorted(inside.tolist()):
        if y < ceiling:
            area += (float(reference[0]) - x) * (ceiling - y)
            ceiling = y
    return area


def greedy_batch(measured: Tensor, candidates: Tensor, size: int) -> list[int]:
    """Pick ``size`` different candidates one by one, each adding most hypervolume.

    Args:
        measured: ``n x 2`` values known.
        candidates: ``q x 2`` values to choose from.
        size: how many.
    """
    reference = torch.cat([measured, candidates]).max(0).values + 1e-9
    front = _non_dominated(measured)
    chosen: list[int] = []
    for _ in range(size):
        gains = _gains(front, candidates, reference)
        gains[chosen] = -1.0  # a second evaluation of the same strategy tells nothing
        best = int(gains.argmax())
        chosen.append(best)
        front = _non_dominated(torch.cat([front, candidates[best : best + 1]]))
    return chosen


def _non_dominated(points: Tensor) -> Tensor:
    kept: list[list[float]] = []
    for x, y in sorted(points.tolist()):
        if not kept or y < kept[-1][1]:
            kept.append([x, y])
    return torch.tensor(kept, dtype=points.dtype)


def _gains(front: Tensor, candidates: Tensor, reference: Tensor) -> Tensor:
    """Return the area each candidate adds to a sorted front, by the stripes between its points."""
    left = torch.cat([front[:, 0], reference[:1]])
    stripes = torch.cat(
        [front.new_full((1,), -torch.inf), left]
    )  # stripe k: from stripes[k] to stripes[k + 1]
    ceilings = torch.cat([reference[1:], front[:, 1]])
    start = torch.maximum(candidates[:, :1], stripes[:-1])
    width = (stripes[1:] - start).clamp(min=0)
    height = (ceilings - candidates[:, 1:]).clamp(min=0)
    return (width * height).sum(1)
