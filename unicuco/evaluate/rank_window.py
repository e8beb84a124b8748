"""The derivative of the KL along a site's sparsity, from one backward pass.

Finding 2 of DESIGN.md, section 8.

Pruning is a staircase, but its slope is well estimated by first-order effects of the weights that
are next to go and those that went last. With G the gradient of the mean-token KL to the effective
weight, dropping a kept weight w changes the KL by -G w + F w^2 / 2, and giving a dropped one back
by G w + F w^2 / 2. Raising the sparsity by ds drops o i ds weights, taken rank by rank; so dKL/ds
is i times the mean over nearby ranks of the sums over rows. With as many ranks on both sides of the
threshold the second-order terms nearly cancel; what is left of them, and near the ends, where one
side is missing, all of them, comes from the Fisher diagonal. On a quadratic loss with that diagonal
the estimate is exact.

Notation: o rows, i columns (= ranks), n dropped weights.
"""

from __future__ import annotations

from typing import Final

from torch import Tensor

_WINDOW_FRACTION: Final = 0.06  # of a row, on each side; DESIGN.md section 8


def site_derivative(
    gradient: Tensor, weight: Tensor, rank: Tensor, num_dropped: int, fisher_sums: Tensor
) -> float:
    """Estimate dKL/ds of one site at its present threshold.

    Args:
        gradient: ``o x i`` gradient of the mean-token KL with respect to the effective (masked)
            weight.
        weight: ``o x i`` dense weight.
        rank: ``o x i`` drop order within each row.
        num_dropped: weights dropped at present.
        fisher_sums: ``i`` sums over rows of F w^2 / 2 at each rank.

    Returns:
        The derivative in nats per token and unit of sparsity.
    """
    num_rows, num_columns = weight.shape
    window = max(1, round(_WINDOW_FRACTION * num_columns))
    threshold = min(num_columns, round(num_dropped / num_rows))
    below, above = min(window, threshold), min(window, num_columns - threshold)
    if min(below, above) >= (window + 1) // 2:
        below = above = min(below, above)
    # Half the curvature of the kept minus that of the dropped: small between two full windows, for
    # the two nearly cancel, and all there is at the dense model.
    correction = float(
        fisher_sums[threshold : threshold + above].sum()
        - fisher_sums[threshold - below : threshold].sum()
    ) / (below + above)
    inside = (rank >= threshold - below) & (rank < threshold + above)
    first_order = float((gradient.float() * weight * inside).sum()) / (below + above)
    return num_columns * (correction - first_order)
