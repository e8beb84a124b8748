"""StratNet as an allocator: the same protocol as every one-shot method, batch-first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from unicuco.space import StrategySpace
from unicuco.stratnet.net import NetKind, StratNet, preference_features
from unicuco.stratnet.train import size_answers, task_answers
from unicuco.types import Strategy

_NUM_PREFERENCES: Final = 257


class StratNetAllocator:
    """Answers sparsity targets by one forward pass and the exact projection.

    A size network is asked for the target itself. A preference network is asked for the weighting
    whose own answer has the target's sparsity, found once on a grid.
    """

    name = "stratnet"

    def __init__(self, net: StratNet, space: StrategySpace) -> None:
        self._net = net.eval().requires_grad_(False)
        self._space = space
        self._grid = torch.linspace(0, 1, _NUM_PREFERENCES, dtype=torch.float64)
        self._own_sparsity = (
            self._sparsity_of_preferences() if net.kind is NetKind.PREFERENCE else None
        )

    def allocate(self, sparsities: Sequence[float]) -> list[Strategy]:
        """Return one strategy per sparsity over sites, each at exactly that budget."""
        budgets = [self._space.kept_for_sparsity(sparsity) for sparsity in sparsities]
        return self._space.decode_exact(
            self.units(torch.tensor(sparsities, dtype=torch.float64)), budgets
        )

    def units(self, sparsities: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the ``b x d`` relaxed answers to ``b`` sparsities, on their budgets.

        ``weights`` are ``b x k`` task weights where the network knows tasks; none: all equally.
        """
        tasks = self._net.num_tasks
        if tasks:
            even = torch.full((len(sparsities), tasks), 1 / tasks, dtype=torch.float64)
            return task_answers(
                self._net, self._space, sparsities, even if weights is None else weights
            )
        if self._own_sparsity is None:
            return size_answers(self._net, self._space, sparsities)
        index = torch.searchsorted(self._own_sparsity, sparsities).clamp(1, _NUM_PREFERENCES - 1)
        left, right = self._own_sparsity[index - 1], self._own_sparsity[index]
        share = ((sparsities - left) / (right - left).clamp(min=1e-12)).clamp(0, 1)
        preference = self._grid[index - 1] + share * (self._grid[index] - self._grid[index - 1])
        kept = self._space.relaxed_budgets(sparsities)
        return self._space.project(self._net(preference_features(preference)), kept)

    def _sparsity_of_preferences(self) -> Tensor:
        """Return the sparsity of the network's own answers on the grid, made rising."""
        answers = self._space.settings(self._net(preference_features(self._grid)))
        dropped = self._space.cost.total_size - self._space.cost.size(answers)
        return (dropped / self._space.cost.site_size).cummax(0).values
