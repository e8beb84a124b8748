"""From one sparsity per block to strategies at exactly the budget: what block-wise rivals share.

OWL, AlphaPruning, DSA and LayerIF all decide one number per block and give it to every site of the
block. Their own recentring meets the budget on average; the space's projection then meets it to the
weight.

Notation: b requests, l blocks, d axes, p_l the weights of block l's sites, S the sparsity asked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unicuco.allocate.evidence import Evidence
from unicuco.dimensions import Granularity
from unicuco.space import StrategySpace
from unicuco.types import ModelProfile, Strategy


def block_weights(profile: ModelProfile) -> Tensor:
    """Return p, ``l`` float64: how many weights the sites of every block hold."""
    sizes = torch.tensor([site.num_weights for site in profile.sites], dtype=torch.float64)
    blocks = torch.tensor([site.block for site in profile.sites])
    return torch.zeros(profile.num_blocks, dtype=torch.float64).index_add_(0, blocks, sizes)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Return the mean of ``b x l`` values over blocks by their weights, ``b x 1``."""
    return (values * weights).sum(-1, keepdim=True) / weights.sum()


def min_max(values: Tensor) -> Tensor:
    """Map ``l`` values onto [0, 1]; equal ones, which say nothing, all onto one half."""
    low, high = values.min(), values.max()
    if float(high - low) <= 1e-12 * max(1.0, float(high.abs())):
        return torch.full_like(values, 0.5)
    return (values - low) / (high - low)


def recentred(
    importance: Tensor, weights: Tensor, sparsities: Sequence[float], width: float
) -> Tensor:
    """Spread keep ratios over ``width`` by importance, their mean at 1 - S (OWL's mapping).

    Args:
        importance: ``l`` in [0, 1]; more is kept more.
        weights: ``l``, p.
        sparsities: S of b requests.
        width: between the least and the most important block.

    Returns:
        ``b x l`` sparsities, which may leave [0, 1] at the ends.
    """
    keep = importance * width
    centred = keep - weighted_mean(keep, weights)
    return torch.tensor(sparsities, dtype=torch.float64)[:, None] - centred


def scaled(
    readiness: Tensor, weights: Tensor, sparsities: Sequence[float], epsilon: float
) -> Tensor:
    """Scale S by a factor per block between 1 - ε and 1 + ε (the mapping of AlphaPruning).

    Args:
        readiness: ``l`` in [0, 1]; more is pruned more.
        weights: ``l``, p.
        sparsities: S of b requests.
        epsilon: ε, >= 0.

    Returns:
        ``b x l`` sparsities of mean S by weight; the largest may exceed 1 at high S.
    """
    factors = 1 - epsilon + 2 * epsilon * readiness
    factors = factors / weighted_mean(factors, weights)
    return torch.tensor(sparsities, dtype=torch.float64)[:, None] * factors


def block_strategies(
    space: StrategySpace, evidence: Evidence, sparsities: Sequence[float], blocks: Tensor
) -> list[Strategy]:
    """Give every site its block's sparsity and project exactly onto the budgets.

    Args:
        space: axes of other dimensions stay at their low end.
        evidence: names the model and the granularity of the axes.
        sparsities: of b requests.
        blocks: ``b x l`` sparsities; what lies outside an axis is cut off there.

    Raises:
        InfeasibleRequestError: a sparsity beyond what the space reaches.
    """
    profile = evidence.profile
    if evidence.granularity is Granularity.LAYER:
        block_of = {f"sparsity/{site.path}": site.block for site in profile.sites}
    else:
        block_of = {f"sparsity/block.{block}": block for block in range(profile.num_blocks)}
    unit = torch.zeros(len(sparsities), space.num_axes, dtype=torch.float64)
    for index, axis in enumerate(space.axes):
        if axis.name in block_of:
            setting = blocks[:, block_of[axis.name]]
            unit[:, index] = (setting - axis.low) / (axis.high - axis.low)
    budgets = [space.kept_for_sparsity(sparsity) for sparsity in sparsities]
    return space.decode_exact(unit.clamp(0, 1), budgets)
