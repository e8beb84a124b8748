"""A Matérn-5/2 ARD kernel between values and directional derivatives of one function.

A row is (x, v, a): with a = 1 and v = 0 it is the value f(x), with a = 0 the derivative of f at x
along v. So any number of directions per evaluation is one matrix, and an evaluation of d axes costs
as many rows as it has directions, not d + 1.

Notation: delta = L (x - x') with L = diag(1 / lengthscale), r = |delta|, k = (1 + c r + c^2 r^2 /
3) exp(-c r), c = sqrt 5. Then the derivative of k along v at x is -(c^2 / 3) (1 + c r) exp(-c r)
delta . L v, and the mixed second derivative along v at x and w at x' is (c^2 / 3) exp(-c r) [(1 + c
r) L v . L w - c^2 (delta . L v) (delta . L w)].
"""

from __future__ import annotations

import math
from typing import Any

import gpytorch
import torch
from torch import Tensor

_C = math.sqrt(5.0)


def as_rows(points: Tensor, directions: Tensor | None = None) -> Tensor:
    """Encode ``n x d`` points as ``n x (2 d + 1)`` value rows, or derivatives along directions."""
    values = directions is None
    flag = torch.full((*points.shape[:-1], 1), float(values), dtype=points.dtype)
    return torch.cat(
        [points, torch.zeros_like(points) if directions is None else directions, flag], dim=-1
    )


def is_value(rows: Tensor) -> Tensor:
    """Return which of ``n`` rows are values; bool."""
    return rows[:, -1] > 0.5


class DirectionalMatern(gpytorch.kernels.Kernel):  # type: ignore[misc]  # gpytorch is untyped
    """Matérn-5/2 with a lengthscale per axis over rows made by `as_rows`."""

    has_lengthscale = True

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        """Return the ``n x m`` covariance of rows, or the ``n`` variances with ``diag``."""
        d = (x1.shape[-1] - 1) // 2
        lengthscale: Tensor = self.lengthscale[0]
        scale = 1.0 / lengthscale
        p1, p2 = x1[..., :d] * scale, x2[..., :d] * scale
        v1, v2 = x1[..., d:-1] * scale, x2[..., d:-1] * scale
        a1, a2 = x1[..., -1], x2[..., -1]
        if diag:
            return a1 * a2 + (_C**2 / 3) * (v1 * v2).sum(-1)
        # r, and delta . v for both sides, without the n x m x d difference tensor.
        squared = (
            p1.square().sum(-1)[..., :, None] + p2.square().sum(-1)[..., None, :] - 2 * p1 @ p2.mT
        ).clamp(min=0)
        # sqrt has no derivative at 0; the kernel does, and it is 0 there.
        r = torch.sqrt(squared + 1e-20)
        along1 = (p1 * v1).sum(-1)[..., :, None] - v1 @ p2.mT
        along2 = p1 @ v2.mT - (p2 * v2).sum(-1)[..., None, :]
        decay = torch.exp(-_C * r)
        slope = (_C**2 / 3) * (1 + _C * r) * decay
        value = (1 + _C * r + (_C**2 / 3) * squared) * decay
        mixed = slope * (v1 @ v2.mT) - (_C**4 / 3) * decay * along1 * along2
        return (
            a1[..., :, None] * a2[..., None, :] * value
            - a2[..., None, :] * slope * along1
            + a1[..., :, None] * slope * along2
            + mixed
        )

    def value_rows(self, points: Tensor, rows: Tensor) -> Tensor:
        """Return the ``q x n`` covariance of the values at ``q x d`` points with ``n`` rows.

        What `forward` gives for value rows on the left, without the parts that are then zero.
        """
        d = points.shape[-1]
        lengthscale: Tensor = self.lengthscale[0]
        scale = 1.0 / lengthscale
        p1, p2, v2, a2 = points * scale, rows[:, :d] * scale, rows[:, d:-1] * scale, rows[:, -1]
        along2 = p1 @ v2.mT - (p2 * v2).sum(-1)
        squared = (p1.square().sum(-1)[:, None] + p2.square().sum(-1) - 2 * p1 @ p2.mT).clamp(min=0)
        r = torch.sqrt(squared + 1e-20)
        decay = torch.exp(-_C * r)
        slope = (_C**2 / 3) * (1 + _C * r) * decay
        return a2 * (1 + _C * r + (_C**2 / 3) * squared) * decay + slope * along2
