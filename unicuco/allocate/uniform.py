"""Equal settings on every axis: the default of Wanda and SparseGPT, and everyone's yardstick."""

from __future__ import annotations

from collections.abc import Sequence

from unicuco.allocate.base import AllocationContext
from unicuco.types import Strategy


class Uniform:
    """The same sparsity everywhere."""

    name = "uniform"

    def __init__(self, context: AllocationContext) -> None:
        self._space = context.space

    def allocate(self, sparsities: Sequence[float]) -> list[Strategy]:
        """Return one strategy per sparsity, all axes equal to within one weight."""
        return self._space.uniforms(sparsities)
