"""OWL: blocks with more outlying Wanda scores keep more (Yin et al., arXiv 2310.05175).

As the released code has it: one ratio per block, all sites of a block pooled. Scores are taken from
the dense model.

Notation: l blocks, D the share of a block's scores above M times their mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from unicuco.allocate.base import AllocationContext
from unicuco.allocate.blocks import block_strategies, block_weights, min_max, recentred
from unicuco.allocate.evidence import Evidence
from unicuco.types import Strategy

OUTLIER_FACTOR: Final = 5.0  # M, published for 7B models
LAMBDA: Final = 0.08  # half the width between the most and the least pruned block


class OWL:
    """Outlier-weighed layer-wise sparsity.

    Args:
        context: with evidence.
        outlier_factor: M, > 0.
        width: λ; keep ratios spread over 2λ.
    """

    name = "owl"

    def __init__(
        self,
        context: AllocationContext,
        outlier_factor: float = OUTLIER_FACTOR,
        width: float = LAMBDA,
    ) -> None:
        self._space = context.space
        self._evidence = context.require_evidence(self.name)
        self._width = width
        self.outliers = outlier_shares(self._evidence, outlier_factor)

    def allocate(self, sparsities: Sequence[float]) -> list[Strategy]:
        """Return one strategy per sparsity."""
        weights = block_weights(self._evidence.profile)
        blocks = recentred(min_max(self.outliers), weights, sparsities, 2 * self._width)
        return block_strategies(self._space, self._evidence, sparsities, blocks)

    def n_of_m(self, n: int, m: int) -> tuple[int, ...]:
        """Return how many of every m weights each block keeps, n on average over blocks.

        As released, ratios spread over λ instead of 2λ and become whole numbers; here by largest
        remainder, so that their sum is n for every block.
        """
        if not 0 < n < m:
            raise ValueError(f"n must be in (0, {m}), got {n}")
        level = min_max(self.outliers) * self._width
        exact = (n + m * (level - level.mean())).clamp(0, m)
        kept = exact.floor()
        order = (kept - exact).argsort(stable=True)
        kept[order[: n * len(kept) - int(kept.sum())]] += 1
        return tuple(int(count) for count in kept)


def outlier_shares(evidence: Evidence, factor: float) -> Tensor:
    """Return D, ``l`` float64: the share of a block's Wanda scores above factor · their mean."""
    shares = []
    for block in range(evidence.profile.num_blocks):
        scores = torch.cat(
            [
                evidence.scores(site).flatten()
                for site in evidence.profile.sites
                if site.block == block
            ]
        )
        above = scores > factor * scores.mean(dtype=torch.float64)
        shares.append(above.double().mean())
    return torch.stack(shares)
