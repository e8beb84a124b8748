"""MoDeGPT's three decompositions of a block's matrices (arXiv 2408.09632): which lines stay.

- MLP (Nyström): channels in the order of their ridge leverage; the last matrix is then fitted to
  the dense outputs (`unicuco.importance.units.fit_columns`, the method's closed form).
- Queries and keys (CR): within every head, the coordinates of the largest products of norms stay,
  the same ones in both. Rotary embedding turns coordinates j and j + d/2 into each other, the
  halves that Llama and Qwen2 pair, so they stay or go together; a turn changes no norm, so those
  before it count. Ours leaves out of the keys' what is common to all of them after the turn.
- Values and outputs (SVD): within every head, the best factors of rank r of outputs times values,
  weighted by what attention reads. They come as a change of basis: in the new one the first r
  coordinates of a head are the best r, for every r.

Query heads that share a key and value head (grouped-query attention) are one problem: their rows,
stacked, stand where one head's would. With one query head per group this is the published method.
Biases of queries, keys and values count as one more column, whose input is always 1: attention
sums to 1 over positions, so a value's bias passes through like any other input.

CR bounds the error of scores, not of attention, and is not always better than the norms of weights:
not where a quarter of four pairs went from a tiny model, four times better on the reference model.

What it does not know: attention whose queries and keys are normalised per head (Qwen3), rotary
embedding of neighbours (GPT-J) or of a part of a head (GPT-NeoX).

Notation: g groups, m query heads of each, d coordinates of a head, i inputs (with the constant).
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVERAGE_RIDGE = 1e-2  # of the mean diagonal; as the method's public reading has it
_VALUE_RIDGE = 1e-4  # likewise


def damped(moment: Tensor, share: float) -> Tensor:
    """Return ``i x i`` second moments in float64 with a share of their mean diagonal added to it.

    What is never active gets 1, so that it can be inverted.
    """
    moment = moment.double()
    added = share * float(moment.diagonal().mean()) or 1.0
    return moment + added * torch.eye(len(moment), dtype=torch.float64, device=moment.device)


def leverage_order(moment: Tensor) -> Tensor:
    """Return the ``u`` channels of an MLP, those of the least ridge leverage first.

    Args:
        moment: ``u x u`` second moments C of what enters the last matrix.

    Returns:
        ``u`` numbers; the leverage of a channel is its entry of diag(C (C + λ I)^-1).
    """
    ridged = damped(moment, LEVERAGE_RIDGE)
    scores: Tensor = torch.linalg.solve(ridged, moment.double()).diagonal()
    return scores.argsort(stable=True)


def pair_order(
    query: Tensor, key: Tensor, moment: Tensor, num_groups: int, *, still: Tensor | None = None
) -> Tensor:
    """Return every group's pairs of coordinates, those that matter least to its scores first.

    Args:
        query: ``g m d x i`` matrix of the queries.
        key: ``g d x i`` matrix of the keys.
        moment: ``i x i`` second moments of their inputs, of which the last is always 1.
        num_groups: g.
        still: ``d/2`` of `stillness`: so much of the mean key's energy is not counted, for
            attention does not see what all keys have in common; none: all counts, as published.

    Returns:
        ``g x d/2`` pair numbers; pair p is the coordinates p and p + d/2.
    """
    half = len(key) // num_groups // 2

    def by_pair(energies: Tensor) -> Tensor:
        return energies.view(num_groups, -1, 2, half).sum((1, 2))  # (g, d/2)

    of_keys = by_pair(_energies(key, moment))
    if still is not None:
        mean = key.double() @ moment[:, -1].double()
        of_keys = of_keys - still * by_pair(mean.square())
    return (by_pair(_energies(query, moment)) * of_keys).argsort(dim=1, stable=True)


def stillness(frequencies: Tensor, num_positions: int) -> Tensor:
    """Return how much of a constant key rotary embedding leaves constant, ``d/2`` in [0, 1].

    It is |mean over positions s of exp(i ω s)|²: the energy of the mean turned key, per energy.

    Args:
        frequencies: ``d/2``, ω in radians per position.
        num_positions: of a window.
    """
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * frequencies.double()
    return torch.polar(torch.ones_like(angles), angles).mean(0).abs().square()


def value_bases(value: Tensor, output: Tensor, moment: Tensor, num_groups: int) -> Tensor:
    """Return the change of basis in which the first coordinates of every head are its best.

    With V a group's values and O the outputs of its query heads, one above the other, the best
    factors of rank r of O V are U O and R V, cut to r: R and U come from the left singular vectors
    of O V C^1/2, so nothing is inverted.

    Args:
        value: ``g d x i`` matrix of the values.
        output: ``o x g m d`` matrix of the outputs.
        moment: ``i x i`` second moments C of what the values are of.
        num_groups: g.

    Returns:
        ``2 x g x d x d`` float64: by ``[0, g]`` values are multiplied from the left, by ``[1, g]``
        every head's columns of the outputs from the right.
    """
    size = len(value) // num_groups
    ridged = damped(moment, _VALUE_RIDGE)
    bases = torch.zeros(2, num_groups, size, size, dtype=torch.float64)
    for group in range(num_groups):
        v = value[group * size : (group + 1) * size].double()
        heads = output.double().chunk(num_groups, dim=1)[group].split(size, dim=1)
        stacked = torch.cat(heads)  # (m o, d)
        root = _root(v @ ridged @ v.T)
        left, values, right = torch.linalg.svd(stacked @ root, full_matrices=False)
        bases[0, group, : len(values)] = left.T @ stacked
        # left = stacked · this, where there is anything; a coordinate without energy stays empty.
        there = values > values[0] * torch.finfo(values.dtype).eps * size
        bases[1, group, :, : len(values)] = root @ right.T / torch.where(there, values, torch.inf)
    return bases


def _energies(matrix: Tensor, moment: Tensor) -> Tensor:
    """Return the mean square of every row's outputs."""
    matrix = matrix.double()
    return ((matrix @ moment.double()) * matrix).sum(1)


def _root(moment: Tensor) -> Tensor:
    """Return the symmetric square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(moment)
    root: Tensor = vectors * values.clamp(min=0).sqrt() @ vectors.T
    return root
