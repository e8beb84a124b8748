"""Influence of training items on the loss of others, by DataInf (Kwon et al., arXiv 2310.00902).

Influence of item k on the validation loss, for the parameters of one part of a model:
I_k = -v^T H^-1 g_k. DataInf swaps the mean with the inverse: H^-1 is taken as the mean over items
of (g_i g_i^T + λ 1)^-1, each in closed form (Sherman-Morrison). All that is needed then are the
inner products of gradients, so parts of any size can be judged without a matrix of their size.

What it does not know: models, and where gradients come from.

Notation: n training items with gradients g_k, v the sum of the validation items' gradients,
G_ik = g_i · g_k (``n x n``), c_k = v · g_k (``n``), d parameters, λ damping.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

_DAMPING: Final = 0.1  # of the mean square of a gradient's entry, as published


def default_damping(gram: Tensor, num_parameters: int) -> float:
    """Return λ: a tenth of the mean squared entry of all gradients."""
    return _DAMPING * float(gram.diagonal().mean()) / num_parameters


def datainf(gram: Tensor, cross: Tensor, damping: float) -> Tensor:
    """Estimate the influence of every training item.

    Args:
        gram: ``n x n`` float64, G.
        cross: ``n`` float64, c.
        damping: λ > 0.

    Returns:
        ``n`` float64: how fast the validation loss grows with the item's weight; below zero for
        items that help.
    """
    along = cross / (damping + gram.diagonal())  # (n) of items i
    return -(cross - gram @ along / len(cross)) / damping


def positive_influence(influence: Tensor) -> Tensor:
    """Return the sum of what harms: S of LayerIF (arXiv 2505.23811)."""
    return influence.clamp(min=0).sum()


def gradient_products(inputs: Tensor, gradients: Tensor, num_train: int) -> tuple[Tensor, Tensor]:
    """Return what one matrix adds to G and c.

    Args:
        inputs: ``n+m x t x i`` inputs of a linear map, training items first.
        gradients: ``n+m x t x o`` gradients of each item's own loss to its outputs.
        num_train: n.

    Returns:
        ``n x n`` and ``n`` float64.
    """
    n = num_train
    gram = torch.zeros(n, n, dtype=torch.float64)
    cross = torch.zeros(n, dtype=torch.float64)
    step = max(1, _CHUNK // max(1, len(inputs) * inputs.shape[2]))
    for part in gradients.split(step, dim=2):  # rows of the matrix, a few at a time
        own = torch.bmm(part.transpose(1, 2), inputs).flatten(1)  # (n + m, o' i)
        gram += own[:n] @ own[:n].T  # a chunk in float32, their sum in float64
        cross += own[:n] @ own[n:].sum(0)
    return gram, cross


_CHUNK: Final = 1 << 24  # entries of gradients at a time: 64 MiB
