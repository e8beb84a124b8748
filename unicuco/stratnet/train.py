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
from unicuco.stratnet.net import StratNet, target_features, task_features

Judge = Callable[[Tensor], Tensor]  # ``b x d`` unit points -> ``b`` costs to lower
# ``b x d`` unit points, ``b x k`` task weights -> ``b`` costs to lower
WeightedJudge = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """Adam for ``steps`` steps of ``batch`` targets, the rate falling to a tenth by cosine.

    ``hidden`` are the units of each hidden layer of the network (none: as usual); ``caution`` is
    how many deviations of the surrogate are added to its mean, so that answers stay near what was
    measured.
    """

    steps: int = 100
    batch: int = 16
    learning_rate: float = 0.02
    hidden: int | None = None
    caution: float = 1.0


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
    return _train(
        net,
        sparsity_range,
        options,
        lambda targets, _: judge(size_answers(net, space, targets)).mean(),
        seed=seed,
    )


def train_on_tasks(
    net: StratNet,
    space: StrategySpace,
    judge: WeightedJudge,
    sparsity_range: tuple[float, float],
    options: TrainOptions,
    *,
    num_tasks: int,
    seed: int,
) -> list[float]:
    """Do what `train_on_sizes` does for a network of several tasks, on random weightings.

    Weightings are even on the simplex; every fourth is a single task's.
    """

    def loss(targets: Tensor, generator: torch.Generator) -> Tensor:
        weights = draw_weightings(len(targets), num_tasks, generator)
        return judge(task_answers(net, space, targets, weights), weights).mean()

    return _train(net, sparsity_range, options, loss, seed=seed)


def draw_weightings(count: int, num_tasks: int, generator: torch.Generator) -> Tensor:
    """Return ``count x k`` float64 weightings, every fourth a corner, the rest evenly drawn."""
    # Exponential draws over their sum are Dirichlet(1, ..., 1), even on the simplex.
    draws = (
        -torch.rand(count, num_tasks, generator=generator, dtype=torch.float64)
        .clamp(min=1e-12)
        .log()
    )
    corners = torch.randint(num_tasks, (count,), generator=generator)
    single = torch.nn.functional.one_hot(corners, num_tasks).double()
    is_single = (torch.arange(count) % 4 == 0)[:, None]
    return torch.where(is_single, single, draws / draws.sum(1, keepdim=True))


def _train(
    net: StratNet,
    sparsity_range: tuple[float, float],
    options: TrainOptions,
    loss_of: Callable[[Tensor, torch.Generator], Tensor],
    *,
    seed: int,
) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=options.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, options.steps, options.learning_rate / 10
    )
    low, high = sparsity_range
    history: list[float] = []
    for _ in range(options.steps):
        spread = (
            torch.arange(options.batch) + torch.rand(options.batch, generator=generator)
        ) / options.batch
        loss = loss_of(low + (high - low) * spread, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        history.append(float(loss.detach()))
    return history


def size_answers(net: StratNet, space: StrategySpace, sparsity: Tensor) -> Tensor:
    """Return a network's ``b x d`` answers to ``b`` sparsities, projected; differentiable."""
    kept = space.relaxed_budgets(sparsity)
    return space.project_logits(net.logits(target_features(net.kind, sparsity)), kept)


def task_answers(net: StratNet, space: StrategySpace, sparsity: Tensor, weights: Tensor) -> Tensor:
    """Return a network's ``b x d`` answers to ``b`` sparsities under ``b x k`` task weights."""
    kept = space.relaxed_budgets(sparsity)
    return space.project_logits(net.logits(task_features(sparsity, weights)), kept)
