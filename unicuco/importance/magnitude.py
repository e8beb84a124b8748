"""Magnitude: the oldest criterion, |w| (Han et al., arXiv 1506.02626), compared within a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from unicuco.importance.base import SiteStats, StatKind


def magnitude_scores(weight: Tensor) -> Tensor:
    """Return |w| as ``o x i`` float32."""
    return weight.float().abs()


@dataclass(frozen=True, slots=True)
class Magnitude:
    """|w|; needs no text."""

    name: ClassVar[str] = "magnitude"
    needs: ClassVar[frozenset[StatKind]] = frozenset()

    def score(self, weight: Tensor, stats: SiteStats) -> Tensor:
        """Return ``o x i`` float32 scores."""
        return magnitude_scores(weight)
