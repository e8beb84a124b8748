"""Matrices that hold some lines of the dense heads: attention around them sees whole heads.

What they hold is known when they are built and is no tensor of the model: an index is made where
and when a forward pass first needs it, for models are built on devices without memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class _Held(nn.Linear):
    """A linear layer some of whose lines are missing.

    Args:
        inputs: columns that are stored.
        outputs: rows that are stored.
        bias: whether there is one.
        lines: where the stored ones stand among the dense ones.
        num_lines: dense ones.
    """

    def __init__(
        self, inputs: int, outputs: int, bias: bool, *, lines: Sequence[int], num_lines: int
    ) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self._lines = tuple(lines)
        self._num_lines = num_lines
        self._index: Tensor | None = None

    def _index_on(self, device: torch.device) -> Tensor:
        if self._index is None or self._index.device != device:
            self._index = torch.tensor(self._lines, device=device)
        return self._index


class HeldRows(_Held):
    """Writes zeros where rows are missing."""

    def forward(self, input: Tensor) -> Tensor:
        """Return ``... x num_lines`` outputs."""
        held = super().forward(input)
        whole = held.new_zeros(*held.shape[:-1], self._num_lines)
        return whole.index_copy(-1, self._index_on(held.device), held)


class HeldColumns(_Held):
    """Passes over inputs whose columns are missing."""

    def forward(self, input: Tensor) -> Tensor:
        """Return outputs of ``... x num_lines`` inputs."""
        return super().forward(input.index_select(-1, self._index_on(input.device)))
