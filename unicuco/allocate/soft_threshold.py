"""AdapMTL's parts: soft thresholds per component, and loss weights that adapt to the tasks.

A component (the shared backbone, or one task's head; in a language model a block) has one learnable
s; its weights enter the forward pass as sign(w) ReLU(|w| - σ(s)). Weight decay on s, part of the
gradient as in the released code, pushes the threshold up; the tasks' losses push back, harder where
a component matters. Once the wanted sparsity is reached, the thresholds stay (Xiang et al., ACM MM
2024, arXiv 2408.03913).

Tasks whose loss still moves get more weight: the mean of |L_before - L| / L over a window of steps,
scaled so that the weights sum to the number of tasks.

What it does not know: models. Notation: k components.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor, nn

from unicuco.allocate.learned import call_with_weights, check_finite

BETAS: Final = (0.5, 0.999)  # of Adam, published


def soft_threshold(weight: Tensor, s: Tensor) -> Tensor:
    """Return sign(w) ReLU(|w| - σ(s)) for one scalar s; differentiable in both."""
    return weight.sign() * torch.relu(weight.abs() - torch.sigmoid(s))


def num_zeroed(weight: Tensor, s: float | Tensor) -> int:
    """Return how many entries `soft_threshold` sets to zero."""
    return int((weight.abs() <= torch.sigmoid(torch.as_tensor(s))).sum())


class TaskWeights:
    """Loss weights of several tasks, by how fast their losses move.

    Args:
        tasks: their names.
        window: steps that are averaged over (published: 500).
        start: steps before the first loss counts (published: 5000 of 20,000).
    """

    def __init__(self, tasks: Sequence[str], *, window: int, start: int) -> None:
        self._start = start
        self._step = 0
        self._before: dict[str, float] = {}
        self._moves: dict[str, deque[float]] = {task: deque(maxlen=window) for task in tasks}
        self.values = dict.fromkeys(tasks, 1.0)

    def update(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Take one step's losses; return weights that sum to the number of tasks."""
        self._step += 1
        if self._step > self._start:
            for task, loss in losses.items():
                if task in self._before:
                    self._moves[task].append(abs(self._before[task] - loss) / max(loss, 1e-12))
                self._before[task] = loss
        means = {task: sum(moves) / len(moves) for task, moves in self._moves.items() if moves}
        total = sum(means.values())
        if len(means) == len(self.values) and total > 0:
            self.values = {task: len(means) * mean / total for task, mean in means.items()}
        return dict(self.values)


class MultiTaskModel(Protocol):
    """A module with a shared part and heads, that can say the loss of every task."""

    def components(self) -> Mapping[str, Sequence[str]]:
        """Return which weight matrices, by parameter name, belong to which component."""

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        """Return every task's loss on a batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JointOptions:
    """How weights and thresholds are trained together.

    ``goal``: share of zeros over all components where thresholds stop. ``shared``: one threshold
    for all. ``initial``: s at the start (published: -20 or -30.5, of 20,000 steps).
    ``threshold_rate`` and ``weight_decay`` are those of s.
    """

    steps: int = 600
    goal: float = 0.9
    shared: bool = False
    initial: float = -8.0
    learning_rate: float = 3e-3
    threshold_rate: float = 0.03
    weight_decay: float = 1.0
    window: int = 40
    start: int = 100


@dataclass(frozen=True, kw_only=True, eq=False)
class JointResult:
    """What joint training came to.

    Attributes:
        thresholds: component -> s at the end.
        sparsity: component -> its share of zeros at the end.
        history: share of zeros over all components after every step.
        task_weights: task -> loss weight after every step.
        frozen_at: the step that reached the goal, or none.
    """

    thresholds: dict[str, float]
    sparsity: dict[str, float]
    history: list[float]
    task_weights: list[dict[str, float]]
    frozen_at: int | None

    @property
    def total_sparsity(self) -> float:
        """Share of zeros over all components at the end."""
        return self.history[-1]


class SparseModel:
    """A multi-task model seen through thresholds, one per component or one for all."""

    def __init__(self, model: nn.Module, *, shared: bool, initial: float) -> None:
        parts: Mapping[str, Sequence[str]] = model.components()  # type: ignore[operator]
        self.model = model
        self.component_of = {name: part for part, names in parts.items() for name in names}
        self._row = {part: 0 if shared else k for k, part in enumerate(parts)}
        self.parts = list(parts)
        count = 1 if shared else len(self.parts)
        self.s = torch.full((count,), initial).requires_grad_(True)

    def losses(self, batch: Tensor) -> dict[str, Tensor]:
        """Return every task's loss under the thresholds."""
        parameters = dict(self.model.named_parameters())
        weights = {
            name: soft_threshold(parameters[name], self.threshold(part))
            for name, part in self.component_of.items()
        }
        found: dict[str, Tensor] = call_with_weights(self.model, weights, batch)
        return found

    def threshold(self, part: str) -> Tensor:
        """Return a component's s."""
        return self.s[self._row[part]]

    @torch.no_grad()
    def zeros(self) -> dict[str, tuple[int, int]]:
        """Return per component how many of its weights are zero, and how many it has."""
        parameters = dict(self.model.named_parameters())
        counts = {part: (0, 0) for part in self.parts}
        for name, part in self.component_of.items():
            zero, whole = counts[part]
            weight = parameters[name]
            counts[part] = (
                zero + num_zeroed(weight, self.threshold(part)),
                whole + weight.numel(),
            )
        return counts


def train_jointly(
    model: nn.Module, batches: Iterator[Tensor], options: JointOptions
) -> tuple[SparseModel, JointResult]:
    """Train weights and thresholds of a `MultiTaskModel` together, in place.

    Adam without weight decay on the weights; on s with decay in the gradient, until the goal.

    Raises:
        AllocationError: a loss is not finite.
    """
    sparse = SparseModel(model, shared=options.shared, initial=options.initial)
    weights = torch.optim.Adam(model.parameters(), lr=options.learning_rate, betas=BETAS)
    thresholds = torch.optim.Adam(
        [sparse.s], lr=options.threshold_rate, betas=BETAS, weight_decay=options.weight_decay
    )
    tasks: TaskWeights | None = None
    history: list[float] = []
    task_history: list[dict[str, float]] = []
    frozen_at: int | None = None
    for step in range(options.steps):
        losses = sparse.losses(next(batches))
        tasks = tasks or TaskWeights(list(losses), window=options.window, start=options.start)
        shares = tasks.update({task: float(loss.detach()) for task, loss in losses.items()})
        task_history.append(shares)
        total = torch.stack([shares[task] * loss for task, loss in losses.items()]).sum()
        weights.zero_grad()
        thresholds.zero_grad()
        check_finite("adapmtl", total).backward()
        weights.step()
        if frozen_at is None:
            thresholds.step()
        history.append(_share(sparse.zeros()))
        if frozen_at is None and history[-1] >= options.goal:
            frozen_at = step
    zeros = sparse.zeros()
    return sparse, JointResult(
        thresholds={part: float(sparse.threshold(part).detach()) for part in sparse.parts},
        sparsity={part: zero / whole for part, (zero, whole) in zeros.items()},
        history=history,
        task_weights=task_history,
        frozen_at=frozen_at,
    )


def mean_relative_change(dense: Mapping[str, float], sparse: Mapping[str, float]) -> float:
    """Return Δ_T of losses: the mean relative change over tasks; negative is worse than dense."""
    return sum((dense[task] - sparse[task]) / dense[task] for task in dense) / len(dense)


def _share(zeros: Mapping[str, tuple[int, int]]) -> float:
    return sum(zero for zero, _ in zeros.values()) / sum(whole for _, whole in zeros.values())
