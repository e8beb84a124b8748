"""Expert counts from block scores: LayerIF's second use, for mixtures of LoRA experts.

Scores are inverted (a block that is trained well, of low S, gets more experts), sharpened by a
power, and the experts are shared out in proportion: every block the whole part of its share and
one, the rest by largest remainder. Facts from arXiv 2505.23811: β = 3, floor + 1 + largest
remainder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from unicuco.allocate.blocks import min_max

BETA: Final = 3.0


def expert_counts(scores: Sequence[float], total: int, *, beta: float = BETA) -> tuple[int, ...]:
    """Share ``total`` experts out to the blocks.

    Args:
        scores: S of every block.
        total: experts in all, at least one per block.
        beta: how sharply scores tell blocks apart; 0: not at all.

    Returns:
        Experts per block, at least one each, ``total`` in all; more where S is lower, earlier
        blocks first among equals.

    Raises:
        ValueError: there are fewer experts than blocks.
    """
    spare = total - len(scores)
    if not scores or spare < 0:
        raise ValueError(f"{total} experts can't give each of {len(scores)} blocks one")
    level = (1 - min_max(torch.tensor(scores, dtype=torch.float64).abs())) ** beta
    weight = level if float(level.sum()) > 0 else torch.ones_like(level)
    share = spare * weight / weight.sum()
    counts = share.floor()
    order = (counts - share).argsort(stable=True)
    counts[order[: spare - int(counts.sum())]] += 1
    return tuple(1 + int(count) for count in counts)
