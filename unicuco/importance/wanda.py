"""Wanda: |w| times the norm of the input it meets (Sun et al., arXiv 2306.11695, equation 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from unicuco.importance.base import SiteStats, StatKind


def wanda_scores(weight: Tensor, input_norm: Tensor) -> Tensor:
    """Score each weight of one site by |w| times its input's norm.

    Args:
        weight: ``o x i`` matrix, any float dtype.
        input_norm: ``i`` float32 >= 0, L2 norm over calibration tokens.

    Returns:
        ``o x i`` float32 scores; comparable within a row only.
    """
    return weight.float().abs() * input_norm.to(weight.device)


@dataclass(frozen=True, slots=True)
class Wanda:
    """|w| times the L2 norm of its input column over the calibration text."""

    name: ClassVar[str] = "wanda"
    needs: ClassVar[frozenset[StatKind]] = frozenset({StatKind.INPUT_NORM})

    def score(self, weight: Tensor, stats: SiteStats) -> Tensor:
        """Return ``o x i`` float32 scores.

        Raises:
            ValueError: ``stats.input_norm`` is missing or not of length ``i``.
        """
        norm = stats.input_norm
        if norm is None or norm.shape != weight.shape[1:]:
            got = "none" if norm is None else tuple(norm.shape)
            raise ValueError(f"wanda needs the norm of {weight.shape[1]} input columns, got {got}")
        return wanda_scores(weight, norm)
