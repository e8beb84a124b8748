"""AlphaPruning: blocks with a heavier spectral tail keep more (Lu et al., arXiv 2410.10912).

The tail exponent α of the eigenvalues of W^T W measures how well a matrix was trained: heavy tails
(small α) carry structure. Per block the mean of its sites' α is mapped linearly onto factors
between 1 - ε and 1 + ε of the sparsity asked. Needs no text.

Notation: l blocks, λ_1 <= ... <= λ_N eigenvalues, x the smallest one that counts to the tail.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from unicuco.allocate.base import AllocationContext
from unicuco.allocate.blocks import block_strategies, block_weights, min_max, scaled
from unicuco.allocate.evidence import Evidence
from unicuco.types import Strategy

EPSILON: Final = 0.3
_BINS: Final = 100
_PEAK_WINDOW: Final = (0.95, 1.5)  # where x is searched, in multiples of the histogram's peak
_MAX_EXPONENT: Final = 100.0
_ZERO: Final = 1e-5  # relative to the largest eigenvalue: below, rounding is all there is


class AlphaPruning:
    """Sparsity by the spectral tail exponent.

    Args:
        context: with evidence.
        epsilon: ε, half the width of the factors; published 0.3 (Wanda), 0.5 (magnitude) at 70 %.
    """

    name = "alphapruning"

    def __init__(self, context: AllocationContext, epsilon: float = EPSILON) -> None:
        self._space = context.space
        self._evidence = context.require_evidence(self.name)
        self._epsilon = epsilon
        self.exponents = block_exponents(self._evidence)

    def allocate(self, sparsities: Sequence[float]) -> list[Strategy]:
        """Return one strategy per sparsity."""
        weights = block_weights(self._evidence.profile)
        blocks = scaled(min_max(self.exponents), weights, sparsities, self._epsilon)
        return block_strategies(self._space, self._evidence, sparsities, blocks)


def block_exponents(evidence: Evidence) -> Tensor:
    """Return the mean α of every block's sites, ``l`` float64."""
    profile = evidence.profile
    sums = torch.zeros(profile.num_blocks, dtype=torch.float64)
    counts = torch.zeros(profile.num_blocks, dtype=torch.float64)
    for site in profile.sites:
        singular = torch.linalg.svdvals(evidence.weight(site).double())
        sums[site.block] += tail_exponent(singular.square())
        counts[site.block] += 1
    return sums / counts


def tail_exponent(eigenvalues: Tensor) -> float:
    """Estimate α of a power-law tail, p(λ) ~ λ^-α for λ >= x (Hill; Clauset et al. for x).

    x is the eigenvalue near the peak of the log histogram whose tail fits best by the
    Kolmogorov-Smirnov distance.

    Args:
        eigenvalues: ``n`` float64 >= 0 in any order.

    Returns:
        α in (1, 100]; equal values have no tail and get the largest.
    """
    values = eigenvalues[eigenvalues > _ZERO * eigenvalues.max()].sort().values
    if len(values) < 2:
        return _MAX_EXPONENT
    logs = values.log()
    low, high = _search_window(logs)
    n = len(values)
    candidates = [k for k in range(n - 1) if low <= float(values[k]) <= high]
    peak = int((values - low / _PEAK_WINDOW[0]).abs()[: n - 1].argmin())
    best, alpha = float("inf"), _MAX_EXPONENT
    for k in candidates or [peak]:
        spread = float(logs[k:].sum() - (n - k) * logs[k])
        exponent = min(_MAX_EXPONENT, 1 + (n - k) / max(spread, 1e-12))
        fitted = 1 - (values[k:] / values[k]) ** (1 - exponent)
        observed = torch.arange(n - k, dtype=torch.float64) / (n - k)
        distance = float((fitted - observed).abs().max())
        if distance < best:
            best, alpha = distance, exponent
    return alpha


def _search_window(logs: Tensor) -> tuple[float, float]:
    low, high = float(logs[0]), float(logs[-1])
    counts = torch.histc(logs, bins=_BINS, min=low, max=high)
    peak = torch.tensor(low + int(counts.argmax()) * (high - low) / _BINS).exp()
    return _PEAK_WINDOW[0] * float(peak), _PEAK_WINDOW[1] * float(peak)
