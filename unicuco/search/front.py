"""`FrontSearch`, the default preset: learn the whole front from values and derivatives.

Every round fits the surrogate to all visible evaluations, trains a fresh StratNet through it, and
asks what that network would answer to targets spread over the learned range. So evaluations are
spent where answers will come from, each tells the slope along every axis there, and the next
network walks down that slope: a descent of all targets together whose memory is the surrogate.
While fewer than two evaluations are visible, in the first two rounds at least, the first three ask
what the Fisher allocation answers and the next ones points between the uniform allocation and it.
Where another run is to help this one, its surrogate is the prior of this one's
(`unicuco.search.transfer`).

What it does not know: how evaluations are run, and when to stop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from unicuco.allocate import AllocationContext, AxisCurves, Fisher, Uniform
from unicuco.search.base import History, SearchConfig
from unicuco.search.screening import daring_points
from unicuco.space import StrategySpace
from unicuco.stratnet import NetKind, StratNet, target_features, train_on_sizes, train_on_tasks
from unicuco.stratnet.train import size_answers, task_answers
from unicuco.surrogate import GaussianProcess, Observations, Surrogate, TaskSurrogates
from unicuco.types import Ask, Evaluation, Outcome, Strategy

_ROUND: Final = 3
_GOLDEN: Final = 0.6180339887498949  # multiples modulo 1 spread evenly, however many there are
# (target as a share of the learned range, share of the way from uniform to Fisher) of the blind
# evaluations: first where answers come from as far as is known, then points that tell of others.
_WARM_UP: Final = ((0.3, 1.0), (0.9, 1.0), (0.6, 1.0), (0.25, 0.9), (0.75, 0.15), (0.55, 0.0))
_FROM: Final = 0.3  # share of the learned range where asking begins: below, all is nearly additive


class FrontSearch:
    """The default search (see the module's docstring)."""

    def __init__(self, config: SearchConfig) -> None:
        self.config = config
        self.round_size = config.round_size or _ROUND
        self._space = config.space()
        self._history = History()

    def ask(self, round: int) -> list[Ask]:
        """Return the strategies of a round."""
        first = round * self.round_size
        evaluations = self._history.visible(round)
        screening = self.config.screening
        if len({strategy.key for strategy, _ in evaluations}) < 2:
            strategies = self._blind(first)
        elif screening is not None:
            return screening.asks(round, self._alternatives(evaluations, round, first))
        else:
            (strategies,) = self._from_network(evaluations, round, first)
        derivatives = self.config.has_derivatives
        return [
            Ask(round=round, position=position, strategy=strategy, derivatives=derivatives)
            for position, strategy in enumerate(strategies)
        ]

    def tell(self, round: int, results: Sequence[tuple[Ask, Outcome]]) -> None:
        """Take a whole round in ask order."""
        self._history.tell(round, results)

    def _blind(self, first: int) -> list[Strategy]:
        """Return strategies between uniform and Fisher; at first, and while nothing succeeds."""
        low, high = self.config.sparsity_range
        places = [
            _WARM_UP[number] if number < len(_WARM_UP) else _spread(number)
            for number in range(first, first + self.round_size)
        ]
        targets = [low + share * (high - low) for share, _ in places]
        budgets = [self._space.kept_for_sparsity(target) for target in targets]
        context = AllocationContext(space=self._space, curves=self.config.axis_curves())
        uniform, fisher = Uniform(context), Fisher(context)
        mixes = torch.tensor([mix for _, mix in places], dtype=torch.float64)[:, None]
        start, end = (self._space.encode(one.allocate(targets)) for one in (uniform, fisher))
        return self._space.decode_exact(start + mixes * (end - start), budgets)

    def _alternatives(
        self, evaluations: list[tuple[Strategy, Evaluation]], round: int, first: int
    ) -> list[tuple[Strategy, ...]]:
        """Return the alternatives of every place of a round."""
        return list(zip(*self._from_network(evaluations, round, first), strict=True))

    def _from_network(
        self, evaluations: list[tuple[Strategy, Evaluation]], round: int, first: int
    ) -> list[list[Strategy]]:
        """Return a round's strategies: the network's, and where they are screened daring ones."""
        low, high = self.config.sparsity_range
        seed = self.config.seed * 100_003 + round
        surrogate, net = learn_front(self.config, evaluations, seed=seed)
        shares = (
            torch.arange(first, first + self.round_size, dtype=torch.float64) * _GOLDEN + 0.5
        ) % 1.0
        targets = low + (high - low) * (_FROM + (1 - _FROM) * shares)
        budgets = [self._space.kept_for_sparsity(target) for target in targets.tolist()]
        with torch.no_grad():
            if self.config.tasks:
                ways = [task_answers(net, self._space, targets, self._weightings(first))]
            else:
                ways = [size_answers(net, self._space, targets)]
        if self.config.screening is not None:
            assert isinstance(surrogate, GaussianProcess), "tasks are not screened"
            start = net.logits(target_features(net.kind, targets))
            kept = self._space.relaxed_budgets(targets)
            ways += daring_points(surrogate.posterior, self._space, start, kept)
        return [self._space.decode_exact(way, budgets) for way in ways]

    def _weightings(self, first: int) -> Tensor:
        """Return the ``round x k`` task weights that a round asks for: each task alone, then all.

        What lies between is between in the surrogates too.
        """
        k = len(self.config.tasks)
        choices = torch.cat([torch.eye(k), torch.full((1, k), 1 / k)]).double()
        return choices[torch.arange(first, first + self.round_size) % (k + 1)]


def _spread(number: int) -> tuple[float, float]:
    """Return the ``number``-th of points that fill the unit square evenly."""
    # The golden ratio's counterpart in two dimensions (Roberts 2018).
    return number * 0.7548776662466927 % 1.0, number * 0.5698402909980532 % 1.0


def learn_front(
    config: SearchConfig, evaluations: Sequence[tuple[Strategy, Evaluation]], *, seed: int
) -> tuple[Surrogate, StratNet]:
    """Fit the surrogate to evaluations and train a size network through it.

    With several tasks: one surrogate each, and a network that sees their weights.

    Raises:
        SurrogateError: too few evaluations succeeded.
    """
    if config.tasks:
        return _learn_tasks(config, evaluations, seed=seed)
    space = config.space()
    surrogate = GaussianProcess(
        config.surrogate,
        config.axis_curves() if config.surrogate.curves else None,
        config.prior,
    )
    surrogate.fit(observe(space, evaluations))
    net = StratNet(NetKind.SIZE, space.num_axes, seed=seed, hidden=config.training.hidden)

    def judge(points: Tensor) -> Tensor:
        mean, std = surrogate.posterior(points)
        return mean + config.training.caution * std

    train_on_sizes(net, space, judge, config.sparsity_range, config.training, seed=seed)
    return surrogate, net


def _learn_tasks(
    config: SearchConfig, evaluations: Sequence[tuple[Strategy, Evaluation]], *, seed: int
) -> tuple[TaskSurrogates, StratNet]:
    space = config.space()
    processes: dict[str, GaussianProcess] = {}
    for number, task in enumerate(config.tasks):
        curves = AxisCurves(config.task_curves[number]) if config.surrogate.curves else None
        processes[task] = GaussianProcess(config.surrogate, curves)
        own = [(strategy, _as_task(e, number)) for strategy, e in evaluations]
        processes[task].fit(observe(space, own))
    surrogates = TaskSurrogates(processes)
    net = StratNet(
        NetKind.SIZE,
        space.num_axes,
        seed=seed,
        num_tasks=len(processes),
        hidden=config.training.hidden,
    )

    def judge(points: Tensor, weights: Tensor) -> Tensor:
        mean, std = surrogates.weighted(points, weights)
        return mean + config.training.caution * std

    train_on_tasks(
        net, space, judge, config.sparsity_range, config.training,
        num_tasks=len(processes), seed=seed,
    )  # fmt: skip
    return surrogates, net


def _as_task(evaluation: Evaluation, number: int) -> Evaluation:
    value = evaluation.tasks[number]
    return replace(evaluation, kl=value.kl, gradient=value.gradient, tasks=())


def observe(
    space: StrategySpace, evaluations: Sequence[tuple[Strategy, Evaluation]]
) -> Observations:
    """Turn evaluations into the surrogate's observations in unit coordinates.

    Along a yes-or-no axis the derivative says little of what lies between, so it is left out.
    """
    choices = [axis.is_choice for axis in space.axes]
    return Observations.from_measurements(
        space.encode([strategy for strategy, _ in evaluations]),
        torch.tensor([evaluation.kl for _, evaluation in evaluations], dtype=torch.float64),
        [
            evaluation.gradient
            and [
                math.nan if is_choice else slope
                for is_choice, slope in zip(choices, evaluation.gradient, strict=True)
            ]
            for _, evaluation in evaluations
        ],
        space.span,
    )
