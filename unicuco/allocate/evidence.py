"""What one-shot allocators may ask of the model: weights, drop order, calibration text, norms.

Nothing here evaluates a strategy. The test text is not within reach.

Notation: i input columns of a site.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from unicuco.calibration import TokenSet, collect_input_norms
from unicuco.dimensions import Granularity
from unicuco.importance import METRICS, SiteStats
from unicuco.models import read_site
from unicuco.ranks import RankStore
from unicuco.types import ModelProfile, Site

if TYPE_CHECKING:
    from unicuco.models import LoadedModel


class TextPart(StrEnum):
    """The texts that an allocator may read; they never overlap."""

    CALIBRATION = "calibration"
    SEARCH = "search"


class TextSource(Protocol):
    """More windows, or windows of another length, of the same texts."""

    def windows(self, part: TextPart, *, tokens: int, context: int) -> TokenSet:
        """Return full windows of ``context`` tokens, ``tokens`` in all.

        Raises:
            TextError: the text has fewer tokens.
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """The dense model with what was measured of it.

    Attributes:
        loaded: the dense model; leave its weights and hooks as they were.
        ranks: the run's drop order.
        granularity: of the space's sparsity axes.
        calibration: the run's calibration windows.
        texts: where other windows come from.
        seed: decides whatever an allocator draws.
    """

    loaded: LoadedModel
    ranks: RankStore
    granularity: Granularity
    calibration: TokenSet
    texts: TextSource
    seed: int

    @property
    def profile(self) -> ModelProfile:
        """The model's profile."""
        return self.loaded.profile

    @cached_property
    def input_norms(self) -> Mapping[str, Tensor]:
        """Site path to ``i`` float32: L2 norm of every input column over the calibration text.

        Collected by one forward pass, once.
        """
        return collect_input_norms(self.loaded.model, self.profile, self.calibration)

    def weight(self, site: Site) -> Tensor:
        """Return a site's dense ``o x i`` matrix."""
        return read_site(self.loaded.model, site)

    def scores(self, site: Site, metric: str = "wanda") -> Tensor:
        """Return a site's ``o x i`` float32 importance scores by a metric of `METRICS`."""
        kind = METRICS[metric]
        norm = self.input_norms[site.path] if kind.needs else None
        return kind.score(self.weight(site), SiteStats(input_norm=norm))
