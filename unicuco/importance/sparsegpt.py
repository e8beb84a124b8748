"""SparseGPT: pruning with an update of what stays (Frantar & Alistarh, arXiv 2301.00774).

Columns are pruned from left to right; the error of every dropped weight is made up for by the
columns to its right, by the inverse Hessian of the layer's squared output error. Settings as
released: damping of 0.01, blocks of 128 columns, one threshold over all rows of a block. Counts are
met exactly (the released threshold overshoots at ties): a block's share of a site's count is what
rounding leaves, and among equal scores the earlier row and column go first.

Columns that never receive input are pruned first. What is not asked to be dropped of them stays as
it is (released: they are zeroed as a whole, and the sparsity exceeded).

Notation: W ``o x i``, H = 2/N X^T X ``i x i`` over N tokens, U the upper Cholesky factor of H^-1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from unicuco.errors import ModelError

DAMPING: Final = 0.01  # of the mean of H's diagonal
BLOCK_COLUMNS: Final = 128


@dataclass(frozen=True, slots=True)
class InverseFactor:
    """U of a site's damped Hessian, ``i x i`` float64, and which columns never receive input."""

    upper: Tensor
    dead: Tensor

    @classmethod
    def of(cls, hessian: Tensor, *, damping: float = DAMPING) -> InverseFactor:
        """Factor a Hessian.

        Args:
            hessian: ``i x i``, symmetric, >= 0.
            damping: of the diagonal's mean, > 0.

        Raises:
            ModelError: the Hessian is NaN, infinite or not positive even when damped.
        """
        h = hessian.double().clone()
        dead = h.diagonal() == 0
        h.diagonal()[dead] = 1.0
        h.diagonal().add_(damping * h.diagonal().mean())
        lower, failed = torch.linalg.cholesky_ex(h)
        if not bool(torch.isfinite(h).all()) or int(failed):
            raise ModelError("the calibration inputs of a site are NaN, infinite or too large")
        upper, _ = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        return cls(upper, dead)


def prune_with_update(
    weight: Tensor, factor: InverseFactor, num_dropped: int, *, block: int = BLOCK_COLUMNS
) -> Tensor:
    """Drop exactly ``num_dropped`` weights and update the others.

    Args:
        weight: ``o x i``, any float dtype.
        factor: of the site's Hessian.
        num_dropped: in [0, o · i].
        block: columns that share one threshold.

    Returns:
        ``o x i`` of the weight's dtype, zero where dropped.

    Raises:
        ValueError: ``num_dropped`` is negative or more than the matrix holds.
    """
    if not 0 <= num_dropped <= weight.numel():
        raise ValueError(f"num_dropped must be in [0, {weight.numel()}], got {num_dropped}")
    if num_dropped == 0:
        return weight.detach().clone()
    columns = weight.shape[1]

    def choose(part: Tensor, start: int, end: int) -> Tensor:
        # Rounding of the running total: blocks differ by one weight, and the sum is exact.
        quota = num_dropped * end // columns - num_dropped * start // columns
        order = _scores(part, factor, start, end).flatten().argsort(stable=True)[:quota]
        mask = torch.zeros(part.numel(), dtype=torch.bool, device=part.device)
        mask[order] = True
        return mask.view(part.shape)

    return _sweep(weight, factor, block, choose)


def prune_n_of_m(weight: Tensor, factor: InverseFactor, n: int, m: int) -> Tensor:
    """Keep ``n`` of every ``m`` consecutive weights of a row, chosen group by group, and update.

    Args:
        weight: ``o x i``; i is a multiple of m.
        factor: of the site's Hessian.
        n: kept.
        m: of so many.

    Raises:
        ValueError: not 0 <= n <= m, or the columns are no multiple of m.
    """
    _check_n_of_m(weight, n, m)

    def choose(part: Tensor, start: int, end: int) -> Tensor:
        return n_of_m_dropped(_scores(part, factor, start, end), n, m)

    return _sweep(weight, factor, m, choose)


def n_of_m_dropped(scores: Tensor, n: int, m: int) -> Tensor:
    """Return the ``o x i`` mask of what goes when n of every m are kept; True = dropped.

    Args:
        scores: ``o x i`` of any metric, Wanda's among them; equal ones by column.
        n: kept.
        m: of so many.

    Raises:
        ValueError: not 0 <= n <= m, or the columns are no multiple of m.
    """
    _check_n_of_m(scores, n, m)
    groups = scores.unflatten(1, (-1, m))  # (o, i / m, m)
    order = groups.argsort(dim=2, stable=True)[..., : m - n]
    dropped = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, order, True)
    return dropped.flatten(1)


def _check_n_of_m(matrix: Tensor, n: int, m: int) -> None:
    if not 0 <= n <= m or m < 1 or matrix.shape[1] % m:
        raise ValueError(f"can't keep {n} of every {m} of rows of {matrix.shape[1]} weights")


def _scores(part: Tensor, factor: InverseFactor, start: int, end: int) -> Tensor:
    """Return w² / U_jj² of the columns ``start`` to ``end``; below zero where no input comes."""
    scores = part.square() / factor.upper.diagonal()[start:end].square()
    return torch.where(factor.dead[start:end], scores.new_tensor(-1.0), scores)


def _sweep(
    weight: Tensor,
    factor: InverseFactor,
    width: int,
    choose: Callable[[Tensor, int, int], Tensor],
) -> Tensor:
    """Go through the columns; every ``width`` of them ``choose`` says what of them is dropped."""
    upper = factor.upper
    work = weight.detach().double().clone()
    columns = weight.shape[1]
    for start in range(0, columns, width):
        end = min(start + width, columns)
        part = work[:, start:end]  # a view: updates inside the block are seen at once
        dropped = choose(part, start, end)
        errors = torch.zeros_like(part)
        for k in range(end - start):
            column = start + k
            lost = torch.where(dropped[:, k], part[:, k], 0.0)
            errors[:, k] = lost / upper[column, column]
            part[:, k:] -= torch.outer(errors[:, k], upper[column, column:end])
            part[:, k][dropped[:, k]] = 0.0  # what rounding left
        work[:, end:] -= errors @ upper[start:end, end:]
    return work.to(weight.dtype)
