"""Which strategies to measure so that a latency model can be fitted to few of them.

Axes that change the same features are one group, whatever dimension they are of: a candidate draws
a level per group and its axes around it, so that candidates reach into every corner of the
features. After the dense model those are taken, one by one, that raise the determinant of the
information matrix most (a greedy D-optimal design): they lie in corners. The last third are taken
as they come, from between the corners, where requests lie.

What it does not know: which features there are, and how strategies are measured.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from unicuco.objectives import latency_features
from unicuco.space import StrategySpace
from unicuco.types import Strategy

_CANDIDATES: Final = 512
_LEVELS: Final = (0.0, 0.25, 0.5, 0.75, 1.0)
_RIDGE: Final = 1e-6  # of the dense model's features, which are 1: what nothing is known of yet


def design(space: StrategySpace, count: int, *, seed: int) -> list[Strategy]:
    """Return at most ``count`` strategies of different features, the dense one first."""
    dense = space.decode(torch.zeros(1, space.num_axes))
    candidates = [*dense, *random_strategies(space, _CANDIDATES, seed=seed)]
    features = latency_features(space.cost, candidates)
    scaled = features / features[0].clamp(min=1e-12)
    chosen = [0]
    inverse = torch.eye(scaled.shape[1], dtype=torch.float64) / _RIDGE
    for place in range(1, count):
        last = scaled[chosen[-1]]
        moved = inverse @ last
        inverse = inverse - torch.outer(moved, moved) / (1 + last @ moved)  # Sherman-Morrison
        new = (scaled[:, None] != scaled[chosen]).any(2).all(1)
        if not bool(new.any()):
            break
        gain = ((scaled @ inverse) * scaled).sum(1)
        if place >= count - count // 3:
            gain = torch.ones_like(gain)
        chosen.append(int(torch.where(new, gain, -1.0).argmax()))
    return [candidates[k] for k in chosen]


def random_strategies(space: StrategySpace, count: int, *, seed: int) -> list[Strategy]:
    """Return strategies of many sizes, none of which loses all parts of one kind."""
    generator = torch.Generator().manual_seed(seed)
    groups = _groups(space)
    is_choice = torch.tensor([axis.is_choice for axis in space.axes])
    levels = torch.tensor(_LEVELS, dtype=torch.float64)
    rows = []
    for _ in range(count):
        picks = torch.randint(len(levels), (int(groups.max()) + 1,), generator=generator)
        level = torch.where(groups < 0, 0.0, levels[picks][groups])
        drawn = torch.rand(space.num_axes, generator=generator, dtype=torch.float64)
        around = (level + (drawn - 0.5) / 2).clamp(0, 1)
        choice = (drawn < level).double()
        rows.append(torch.where(is_choice, choice, torch.where(level > 0, around, 0.0)))
    strategies = space.decode(torch.stack(rows))
    alive = (latency_features(space.cost, strategies)[:, 1::2] > 0).all(1).tolist()
    return [strategy for strategy, lives in zip(strategies, alive, strict=True) if lives]


def _groups(space: StrategySpace) -> Tensor:
    """Return every axis' group, ``d``: by the features that it changes alone; none: -1."""
    alone = space.decode(torch.eye(space.num_axes, dtype=torch.float64))
    dense = space.decode(torch.zeros(1, space.num_axes))
    features = latency_features(space.cost, [*dense, *alone])
    changed = (features[1:] != features[:1]).tolist()
    names: dict[tuple[bool, ...], int] = {}
    numbers = [names.setdefault(tuple(row), len(names)) if any(row) else -1 for row in changed]
    return torch.tensor(numbers)
