"""Training a size network through any differentiable judge of points.

Every step answers a batch of targets spread over the learned range, projects the answers onto their
budgets and lowers the judge's mean; the gradient passes through projection and network. The judge
is the surrogate's posterior, plus a multiple of its deviation so that the network does not walk
where nothing is known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unicuco.space import StrategySpace
from unicuco.stratnet.net import StratNet, size_features

Judge = Callable[[Tensor], Tensor]  # ``b x d`` unit points -> ``b`` costs to lower


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """Adam for ``steps`` steps of ``batch`` targets, the rate falling to a tenth by cosine."""

    steps: int = 150
    batch: int = 16
    learning_rate: float = 0.02


def train_on_sizes(
    net: StratNet,
    space: StrategySpace,
    judge: Judge,
    sparsity_range: tuple[float, float],
    options: TrainOptions,
    *,
    seed: int,
) -> list[float]:
    """Train ``net`` in place and return the judge's mean at every step.

    Args:
        net: a size network.
        space: projects its answers.
        judge: what is lowered.
        sparsity_range: lowest and highest target.
        options: steps, batch and rate.
        seed: draws the targets.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=options.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, options.steps, options.learning_rate / 10
    )
    low, high = sparsity_range
    history: list[float] = []
    for _ in range(options.steps):
        spread = (
            torch.arange(options.batch) + torch.rand(options.batch, generator=generator)
        ) / options.batch
        points = size_answers(net, space, low + (high - low) * spread)
        loss = judge(points).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        history.append(float(loss.detach()))
    return history


def size_answers(net: StratNet, space: StrategySpace, sparsity: Tensor) -> Tensor:
    """Return a size network's ``b x d`` answers to ``b`` sparsities, projected; differentiable."""
    kept = space.cost.total_params - sparsity.double() * space.cost.num_site_weights
    return space.project_logits(net.logits(size_features(sparsity)), kept)
