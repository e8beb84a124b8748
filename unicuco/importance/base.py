"""What an importance metric is: scores for one matrix, compared within a row only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from torch import Tensor


class StatKind(StrEnum):
    """What a metric needs to know of a site beside its weights."""

    INPUT_NORM = "input_norm"


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteStats:
    """Statistics of one site.

    Attributes:
        input_norm: ``i`` float32 >= 0, L2 norm of each input column over the calibration tokens;
            or none where no metric asked for it.
    """

    input_norm: Tensor | None = None


class ImportanceMetric(Protocol):
    """Scores weights; a row's lowest are dropped first. Contract: `ImportanceMetricContract`."""

    @property
    def name(self) -> str:
        """The key in `METRICS` and on the command line."""

    @property
    def needs(self) -> frozenset[StatKind]:
        """The statistics that `score` reads."""

    def score(self, weight: Tensor, stats: SiteStats) -> Tensor:
        """Return ``o x i`` float32 scores, finite and >= 0, of a matrix of any float dtype."""
