"""MoDeGPT's allocation (arXiv 2408.09632): how much every block is narrowed, by its influence.

A block's influence s is 1 - the mean cosine between the stream before and after it, as ShortGPT's.
The shares φ that minimise Σ s φ with an entropy of weight ε that spreads them have the closed form

    φ = L φ_avg softmax(-s / ε),

cut off where a block would lose too much; the space's projection then meets the budget. All of a
block's modules (feed-forward channels, rotary pairs, value ranks) lose the same share; no head goes
as a whole.

What it does not know: how blocks act together, and which channels, pairs and ranks go.

Notation: b requests, l blocks (L of them), d axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from unicuco.allocate.depth import DepthEvidence, measure_streams
from unicuco.dimensions import Granularity
from unicuco.types import ModelProfile, Strategy

EPSILON: Final = 0.15  # as the method's public reading has it; so is the most a block loses
_MOST: Final = 0.8


class MoDeGpt:
    """Narrows blocks of little influence more.

    Args:
        evidence: with a space of width and low rank.
        epsilon: ε, > 0; infinite: all blocks lose the same.
    """

    name = "modegpt"

    def __init__(self, evidence: DepthEvidence, epsilon: float = EPSILON) -> None:
        self._space = evidence.space
        self._epsilon = epsilon
        by_block = replace(evidence, granularity=Granularity.BLOCK)
        self.influence = 1.0 - measure_streams(by_block).cosine.diagonal(1)
        self._blocks = _axis_blocks(evidence.loaded.profile)

    def allocate(self, sparsities: Sequence[float]) -> list[Strategy]:
        """Return one strategy per sparsity over sites, within its budget."""
        shares = block_shares(self.influence, sparsities, self._epsilon)
        unit = torch.zeros(len(sparsities), self._space.num_axes, dtype=torch.float64)
        for a, axis in enumerate(self._space.axes):
            if axis.name in self._blocks:
                share = shares[:, self._blocks[axis.name]]
                unit[:, a] = ((share - axis.low) / (axis.high - axis.low)).clamp(0, 1)
        budgets = [self._space.kept_for_sparsity(sparsity) for sparsity in sparsities]
        return self._space.decode_exact(unit, budgets)


def block_shares(influence: Tensor, sparsities: Sequence[float], epsilon: float) -> Tensor:
    """Return what every block loses, ``b x l`` in [0, 0.8].

    Args:
        influence: ``l``, s.
        sparsities: φ_avg of b requests.
        epsilon: ε, > 0.
    """
    average = torch.tensor(sparsities, dtype=torch.float64)[:, None]
    spread = torch.softmax(-influence.double() / epsilon, dim=0)
    return (len(influence) * average * spread).clamp(max=_MOST)


def _axis_blocks(profile: ModelProfile) -> dict[str, int]:
    """Return the block of every axis of the three modules."""
    blocks: dict[str, int] = {}
    for part in profile.parts:
        kinds = ("pairs", "ranks") if part.head_size else ()
        blocks |= {f"low_rank/{part.path}.{kind}": part.block for kind in kinds}
        if not part.head_size:
            blocks[f"width/{part.path}"] = part.block
    return blocks
