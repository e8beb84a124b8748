"""What an allocator is: sparsity targets in, strategies out, batch-first and deterministic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from unicuco.allocate.curves import AxisCurves
from unicuco.space import StrategySpace
from unicuco.types import Strategy


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationContext:
    """What one-shot allocators may look at: the space, and what each axis alone should cost."""

    space: StrategySpace
    curves: AxisCurves


class Allocator(Protocol):
    """Turns targets into strategies; the constructor's seed, if any, decides all that is drawn."""

    name: str

    def allocate(self, sparsities: Sequence[float]) -> list[Strategy]:
        """Return one strategy per sparsity over sites, each at exactly that budget.

        Raises:
            InfeasibleRequestError: a sparsity beyond what the space reaches.
        """
