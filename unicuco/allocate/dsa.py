"""DSA: a block's sparsity from a discovered expression of its scores (NeurIPS 2024).

Importance by the expression, min-max scaled, keep ratios spread over 2 Λ, the mean at the budget.
As released, a *higher* value of the expression keeps less. Scores are Wanda's, of the dense model.
The search for expressions is `unicuco.allocate.dsa_search`; a found one transfers to other models.

Notation: l blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from unicuco.allocate.base import AllocationContext
from unicuco.allocate.blocks import block_strategies, block_weights, min_max, recentred
from unicuco.allocate.evidence import Evidence
from unicuco.allocate.expressions import PUBLISHED, Expression
from unicuco.types import Strategy

LAMBDA: Final = 0.08


class DSA:
    """Sparsity by an expression.

    Args:
        context: with evidence.
        expression: of a block's scores; none: the published one.
        width: Λ; keep ratios spread over 2 Λ.
    """

    name = "dsa"

    def __init__(
        self,
        context: AllocationContext,
        expression: Expression = PUBLISHED,
        width: float = LAMBDA,
    ) -> None:
        self._space = context.space
        self._evidence = context.require_evidence(self.name)
        self._width = width
        self.importance = block_importance(self._evidence, expression)

    def allocate(self, sparsities: Sequence[float]) -> list[Strategy]:
        """Return one strategy per sparsity."""
        keep = 1 - min_max(self.importance)
        weights = block_weights(self._evidence.profile)
        blocks = recentred(keep, weights, sparsities, 2 * self._width)
        return block_strategies(self._space, self._evidence, sparsities, blocks)


def block_importance(evidence: Evidence, expression: Expression) -> Tensor:
    """Return the expression's value for every block, ``l`` float64."""
    sites = evidence.profile.sites
    values = [
        expression.evaluate([evidence.scores(site) for site in sites if site.block == block])
        for block in range(evidence.profile.num_blocks)
    ]
    return torch.tensor(values, dtype=torch.float64)
