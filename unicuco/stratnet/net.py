"""The network: request features -> a point of the unit cube.

Three kinds. ``size`` (ours) sees a target sparsity and answers by offsets around the uniform
strategy of that sparsity, in logits, so an untrained network is the uniform allocation. ``shape``
(ours) is the same for answers that jump, as those of spaces with shapes do: it sees the target
through narrow windows, so that neighbouring targets can be answered quite differently.
``preference`` (the paper's) sees a weighting of size and quality and answers freely, as PSL-MOBO's
set model does (Lin et al. 2022; arXiv 2505.12216).

What it does not know: exact budgets; `StrategySpace.project` follows it.

Notation: b requests, r features, d axes.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

import torch
from torch import Tensor, nn

_SMALL_INIT: Final = (
    1e-2  # of the last layer of a size network: near uniform, yet the gradient reaches every layer
)


class NetKind(StrEnum):
    """What the network sees."""

    SIZE = "size"
    SHAPE = "shape"
    PREFERENCE = "preference"


_NUM_WINDOWS: Final = 48  # over sparsities from 0 to 1
_NUM_FEATURES: Final = {NetKind.SIZE: 3, NetKind.SHAPE: 3 + _NUM_WINDOWS, NetKind.PREFERENCE: 2}
# Logits between an axis and uniform, at most: from one half to 0.02 or 0.98, beyond which nothing
# measured speaks; shapes where a part goes and others hardly change lie twice as far apart.
_REACH: Final = {NetKind.SIZE: 4.0, NetKind.SHAPE: 8.0}
_FORMER_REACH: Final = 4.0  # of networks of both kinds that were kept without it
_HIDDEN: Final = {NetKind.SIZE: 64, NetKind.SHAPE: 64, NetKind.PREFERENCE: 256}


def size_features(sparsity: Tensor) -> Tensor:
    """Encode ``b`` sparsities in [0, 1) as ``b x 3`` features: s, s^2, log of what is kept."""
    s = sparsity.float().clamp(1e-3, 1 - 1e-3)
    return torch.stack([4 * s - 2, 4 * s.square() - 1.3, torch.log1p(-s) + 1], dim=-1)


def shape_features(sparsity: Tensor) -> Tensor:
    """Encode ``b`` sparsities as `size_features` and how near each is to the windows' centres."""
    centres = (torch.arange(_NUM_WINDOWS) + 0.5) / _NUM_WINDOWS
    distance = (sparsity.float()[:, None] - centres) * _NUM_WINDOWS
    return torch.cat([size_features(sparsity), 2 * torch.exp(-distance.square())], dim=-1)


def target_features(kind: NetKind, sparsity: Tensor) -> Tensor:
    """Encode ``b`` sparsities as a network of a kind that sees targets wants them."""
    return shape_features(sparsity) if kind is NetKind.SHAPE else size_features(sparsity)


def task_features(sparsity: Tensor, weights: Tensor) -> Tensor:
    """Encode ``b`` sparsities and their ``b x k`` task weights as ``b x (3 + k)`` features."""
    return torch.cat([size_features(sparsity), 2 * weights.float() - 1], dim=-1)


def preference_features(preference: Tensor) -> Tensor:
    """Encode ``b`` preferences for size in [0, 1] as the ``b x 2`` weights (size, quality)."""
    p = preference.float().clamp(0, 1)
    return torch.stack([p, 1 - p], dim=-1)


class StratNet(nn.Module):
    """A small multilayer perceptron of either kind.

    Args:
        kind: what it sees.
        num_axes: d.
        seed: of the initial weights.
        num_tasks: of a size network that also sees a weighting of several tasks; else 0.
        hidden: units of each hidden layer; none: as many as the kind usually has.
    """

    reach: Tensor

    def __init__(
        self,
        kind: NetKind,
        num_axes: int,
        *,
        seed: int,
        num_tasks: int = 0,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.num_tasks = num_tasks
        hidden = hidden or _HIDDEN[kind]
        self.layers = nn.Sequential(
            nn.Linear(_NUM_FEATURES[kind] + num_tasks, hidden), nn.SiLU(),
            nn.Linear(hidden, hidden), nn.SiLU(),
            nn.Linear(hidden, num_axes),
        )  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                bound = layer.in_features**-0.5
                nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
                nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
        if kind in _REACH:
            self.register_buffer("reach", torch.tensor(_REACH[kind]))
            last = self.layers[-1]
            assert isinstance(last, nn.Linear)
            nn.init.normal_(last.weight, std=_SMALL_INIT, generator=generator)
            nn.init.zeros_(last.bias)

    @classmethod
    def restore(
        cls, kind: NetKind, num_axes: int, state: Mapping[str, Tensor], *, num_tasks: int = 0
    ) -> StratNet:
        """Rebuild a network from its ``state_dict``; as for the class else."""
        hidden = len(state["layers.0.bias"])
        net = cls(kind, num_axes, seed=0, num_tasks=num_tasks, hidden=hidden)
        former = {"reach": torch.tensor(_FORMER_REACH)} if kind in _REACH else {}
        net.load_state_dict({**former, **state})
        return net

    def logits(self, features: Tensor) -> Tensor:
        """Return the ``b x d`` logits of `forward`.

        Where the network sees a target they are offsets around the uniform point, which projection
        finds.
        """
        output: Tensor = self.layers(features)
        if self.kind not in _REACH:
            return output
        return self.reach * torch.tanh(output / self.reach)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``b x r`` request features to ``b x d`` points in (0, 1)."""
        return torch.sigmoid(self.logits(features))
