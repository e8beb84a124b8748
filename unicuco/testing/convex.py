"""A convex problem of known influences: logistic regression, retrained without each item.

Notation: n training items, d parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

RIDGE: Final = 0.05
_TRAIN, _HELD_OUT, _PARAMETERS = 50, 30, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvexToy:
    """A fitted problem.

    Attributes:
        gradients: ``n x d`` of every training item's loss at the optimum.
        validation: ``d`` gradient of the held-out loss there.
        changes: ``n`` by how much the held-out loss rises when the item is left out and the model
            is trained again.
    """

    gradients: Tensor
    validation: Tensor
    changes: Tensor


def convex_toy(seed: int) -> ConvexToy:
    """Draw a problem, fit it, and fit it again without each of its items."""
    generator = torch.Generator().manual_seed(seed)
    total = _TRAIN + _HELD_OUT
    x = torch.randn(total, _PARAMETERS, generator=generator, dtype=torch.float64)
    truth = torch.randn(_PARAMETERS, generator=generator, dtype=torch.float64)
    chance = torch.rand(total, generator=generator, dtype=torch.float64)
    y = (torch.sigmoid(x @ truth) > chance).double()
    weights = _fit(x[:_TRAIN], y[:_TRAIN])
    own = x * (torch.sigmoid(x @ weights) - y)[:, None]
    before = _loss(x[_TRAIN:], y[_TRAIN:], weights)
    changes = []
    for item in range(_TRAIN):
        rest = [k for k in range(_TRAIN) if k != item]
        changes.append(_loss(x[_TRAIN:], y[_TRAIN:], _fit(x[rest], y[rest])) - before)
    return ConvexToy(
        gradients=own[:_TRAIN], validation=own[_TRAIN:].mean(0), changes=torch.stack(changes)
    )


def _fit(x: Tensor, y: Tensor) -> Tensor:
    """Minimise mean loss and ridge by Newton's method."""
    weights = torch.zeros(x.shape[1], dtype=torch.float64)
    for _ in range(30):
        p = torch.sigmoid(x @ weights)
        gradient = x.T @ (p - y) / len(y) + RIDGE * weights
        hessian = (x.T * (p * (1 - p))) @ x / len(y)
        hessian += RIDGE * torch.eye(len(weights), dtype=torch.float64)
        weights = weights - torch.linalg.solve(hessian, gradient)
    return weights


def _loss(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    return torch.nn.functional.binary_cross_entropy_with_logits(x @ weights, y)
