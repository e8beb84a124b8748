"""What an allocator is: sparsity targets in, strategies out, batch-first and deterministic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from unicuco.allocate.curves import AxisCurves
from unicuco.allocate.evidence import Evidence
from unicuco.errors import AllocationError
from unicuco.rows import RowRule
from unicuco.space import StrategySpace
from unicuco.types import Strategy


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationContext:
    """What one-shot allocators may look at.

    That is the space, what each axis alone should cost, and, where the model is at hand, evidence
    of it.
    """

    space: StrategySpace
    curves: AxisCurves
    evidence: Evidence | None = None

    def require_evidence(self, name: str) -> Evidence:
        """Return the evidence that the allocator ``name`` can't do without.

        Raises:
            AllocationError: there is none.
        """
        if self.evidence is None:
            raise AllocationError(
                f"{name} looks at the model's weights and calibration text, which are not at "
                "hand here; give the model, or take uniform or fisher"
            )
        return self.evidence


class Allocator(Protocol):
    """Turns targets into strategies; the constructor's seed, if any, decides all that is drawn."""

    name: str

    def allocate(self, sparsities: Sequence[float]) -> list[Strategy]:
        """Return one strategy per sparsity over sites, each at exactly that budget.

        Raises:
            InfeasibleRequestError: a sparsity beyond what the space reaches.
        """


@runtime_checkable
class RowAllocator(Allocator, Protocol):
    """An allocator that also decides how a site's dropped weights are spread over its rows."""

    def row_rule(self, strategy: Strategy) -> RowRule:
        """Return the rows of one of its own strategies."""
