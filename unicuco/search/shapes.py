"""`ShapeSearch`: the default preset where variants have smaller shapes.

A shape has few values, so neighbours of what was measured are judged by the surrogate. First every
part alone: removed, or narrowed by half (of very many parts, some; the others are taken to cost
what their neighbours do), and parts narrowed alike. Where there are derivatives, these tell what
the steps of a narrowed part cost, and only what has a few steps is asked alone. The curves that
this gives are the process' mean function: what parts cost alone. Then, for targets spread over the
learned range, the strategy that a local search (`unicuco.search.neighbours`) finds best by the
surrogate's optimistic bound, and that was not asked before.

Learning a network from that: for targets over the whole range the same local search by the cautious
bound, from the best measured strategies and the answers to neighbouring targets, gives examples,
and StratNet is trained to relax to them: a removed part is then a decision that the network made.

What it does not know: how evaluations are run, and when to stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy

from unicuco.allocate import AllocationContext, AxisCurves, Fisher
from unicuco.search.base import History, SearchConfig
from unicuco.search.front import observe
from unicuco.search.neighbours import Judge, Neighbourhood
from unicuco.space import Axis, StrategySpace
from unicuco.stratnet import NetKind, StratNet, target_features
from unicuco.surrogate import GaussianProcess, SurrogateOptions
from unicuco.types import Ask, Evaluation, Outcome, Strategy

_GOLDEN: Final = 0.6180339887498949  # multiples modulo 1 spread evenly, however many there are
_SHIFT: Final = 0.7548776662466927  # between seeds; unrelated to the former (Roberts 2018)
_MAX_ALONE: Final = 40  # parts that are judged alone
_MAX_COARSE: Final = 8  # of them that are judged alone, where the others have derivatives
_COARSE: Final = 4  # steps of an axis whose derivatives say little of the next one
_ALIKE: Final = (0.06, 0.2, 0.4)  # of the learned range: where parts are narrowed alike
_HALF: Final = 0.5  # how far a part is narrowed for that
_HARD: Final = 0.9  # how far everything else is narrowed before a part is removed, in one start
_DARING: Final = 1.0  # standard deviations taken off the mean while asking
_CAUTION: Final = 0.5  # and added to it while teaching
_CHOICES: Final = 16  # strategies per target, of which the first new one is asked
_STARTS: Final = 4  # measured strategies that a local search starts from
# As near to an end of an axis as an answer has to come. Where all the way counts, parts that stay
# whole push all others to the network's reach, and it can't tell these from each other any more.
_NEAR_ENOUGH: Final = 0.02
_LESSONS: Final = 48  # targets that the network is taught
_TRAINING_STEPS: Final = 800
_LEARNING_RATE: Final = 0.02


class ShapeSearch:
    """The search (see the module's docstring)."""

    round_size = 4

    def __init__(self, config: SearchConfig) -> None:
        self.config = config
        self._space = config.space()
        self._alone = first_strategies(
            self._space, config.sparsity_range, has_derivatives=config.has_derivatives
        )
        self._history = History()
        self._told: dict[int, set[str]] = {}
        self._asked: dict[tuple[int, int], list[Strategy]] = {}

    def ask(self, round: int) -> list[Ask]:
        """Return the strategies of a round; parts alone for their values only."""
        alone = {strategy.key for strategy in self._alone if len(_active(strategy)) == 1}
        derivatives = self.config.has_derivatives
        return [
            Ask(
                round=round,
                position=position,
                strategy=strategy,
                derivatives=derivatives and strategy.key not in alone,
            )
            for position, strategy in enumerate(self._strategies(round))
        ]

    def tell(self, round: int, results: Sequence[tuple[Ask, Outcome]]) -> None:
        """Take a whole round in ask order."""
        self._history.tell(round, results)
        self._told[round] = {ask.strategy.key for ask, _ in results}

    def _strategies(self, round: int) -> list[Strategy]:
        evaluations = self._history.visible(round)
        memo = (round, len(evaluations))
        if memo not in self._asked:
            self._asked[memo] = self._chosen(round, evaluations)
        return self._asked[memo]

    def _chosen(self, round: int, evaluations: list[tuple[Strategy, Evaluation]]) -> list[Strategy]:
        first = round * self.round_size
        alone = self._alone[first : first + self.round_size]
        missing = self.round_size - len(alone)
        # What rounds before asked; the last one may not be told yet, and is asked again here.
        seen = {s.key for s in self._alone}
        seen |= {key for k in range(round - 1) for key in self._told.get(k, ())}
        if round:
            seen |= {s.key for s in self._strategies(round - 1)}
        seed = self.config.seed * 100_003 + round
        generator = torch.Generator().manual_seed(seed)
        shares = torch.arange(first, first + missing, dtype=torch.float64) * _GOLDEN
        shares = (shares + 0.5 + self.config.seed * _SHIFT) % 1.0
        chosen: list[Strategy] = []
        if missing and len({strategy.key for strategy, _ in evaluations}) >= 2:
            teacher = _Teacher(self.config, self._space, evaluations)
            for share in shares.tolist():
                for strategy in teacher.best(share, -_DARING, generator, num_best=_CHOICES):
                    if strategy.key not in seen:
                        seen.add(strategy.key)
                        chosen.append(strategy)
                        break
        while len(alone) + len(chosen) < self.round_size:
            drawn = self._drawn(generator, seen)
            if drawn is None:
                break
            seen.add(drawn.key)
            chosen.append(drawn)
        return [*alone, *chosen]

    def _drawn(self, generator: torch.Generator, seen: set[str]) -> Strategy | None:
        """Return a random strategy that was not asked: while nothing succeeds, or all is known."""
        low, high = self.config.sparsity_range
        for _ in range(50):
            target = low + (high - low) * float(torch.rand((), generator=generator))
            point = torch.rand(1, self._space.num_axes, generator=generator)
            (strategy,) = self._space.decode_exact(point, [self._space.kept_for_sparsity(target)])
            if strategy.key not in seen:
                return strategy
        return None


class _Teacher:
    """Finds strategies for targets by what was measured."""

    def __init__(
        self,
        config: SearchConfig,
        space: StrategySpace,
        evaluations: Sequence[tuple[Strategy, Evaluation]],
    ) -> None:
        self._config = config
        self._space = space
        curves = curves_of(config, space, evaluations)
        options = config.surrogate if config.has_derivatives else SurrogateOptions(directions=0)
        self.surrogate = GaussianProcess(options, curves)
        self.surrogate.fit(observe(space, evaluations))
        self._alone = Fisher(AllocationContext(space=space, curves=curves))
        middle = sum(config.sparsity_range) / 2
        rest = self._alone.units([middle])[0].clamp(0.02, 0.98)
        self._neighbourhood = Neighbourhood(space, rest)
        narrow = [_HARD * (not axis.is_choice) for axis in space.axes]
        self._narrow = torch.tensor([narrow], dtype=torch.float64)
        self._measured = sorted(
            ((e.kl, space.cost.size_of(s.values), s) for s, e in evaluations),
            key=lambda item: item[0],
        )

    def target(self, share: float) -> float:
        """Return the sparsity at a share of the learned range."""
        low, high = self._config.sparsity_range
        return low + (high - low) * share

    def best(
        self,
        share: float,
        deviations: float,
        generator: torch.Generator,
        *,
        num_best: int = 1,
        starts: Sequence[Strategy] = (),
    ) -> list[Strategy]:
        """Return the best strategies for the target at a share of the range, best first.

        Args:
            share: of the learned range.
            deviations: that are added to the surrogate's mean.
            generator: draws moves.
            num_best: how many.
            starts: further strategies to start from, within the target's budget.
        """
        target = self.target(share)
        budget = self._space.kept_for_sparsity(target)
        within = [s for _, kept, s in self._measured if kept <= budget][:_STARTS]
        (alone,) = self._alone.allocate([target])
        narrow = self._space.decode_exact(self._narrow, [budget])  # removes nothing if it can
        judge = self._judge(deviations)
        return self._neighbourhood.improve(
            [alone, self._space.uniform(target), *narrow, *within, *starts],
            budget,
            judge,
            generator,
            num_best=num_best,
        )

    def _judge(self, deviations: float) -> Judge:
        @torch.no_grad()
        def judge(points: Tensor) -> Tensor:
            mean, std = self.surrogate.posterior(points)
            return mean + deviations * std

        return judge


def learn_shapes(
    config: SearchConfig, evaluations: Sequence[tuple[Strategy, Evaluation]], *, seed: int
) -> tuple[GaussianProcess, StratNet]:
    """Fit the surrogate to evaluations and teach a network what it finds best.

    Raises:
        SurrogateError: too few evaluations succeeded.
    """
    space = config.space()
    teacher = _Teacher(config, space, evaluations)
    generator = torch.Generator().manual_seed(seed)
    shares = torch.linspace(0, 1, _LESSONS, dtype=torch.float64)
    lessons: list[Strategy] = []
    for share in reversed(shares.tolist()):  # what a smaller budget found is within a larger one
        lessons += teacher.best(share, _CAUTION, generator, starts=lessons[-1:])
    lessons.reverse()
    net = StratNet(NetKind.SHAPE, space.num_axes, seed=seed)
    targets = torch.tensor([teacher.target(s) for s in shares.tolist()], dtype=torch.float64)
    teach(net, space, targets, lessons)
    return teacher.surrogate, net


def teach(
    net: StratNet, space: StrategySpace, targets: Tensor, lessons: Sequence[Strategy]
) -> None:
    """Train a network so that its answers, projected to the lessons' sizes, lie near the lessons.

    Those are no larger than the targets, for shapes meet a budget to a step.
    """
    points = space.encode(lessons).clamp(0, 1)
    kept = space.cost.size(space.settings(points))
    ends = (_NEAR_ENOUGH, 1 - _NEAR_ENOUGH)
    points = points.clamp(*ends)
    features = target_features(net.kind, targets)
    optimizer = torch.optim.Adam(net.parameters(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, _TRAINING_STEPS, _LEARNING_RATE / 20
    )
    for _ in range(_TRAINING_STEPS):
        answers = space.project_logits(net.logits(features), kept)
        loss = binary_cross_entropy(answers.clamp(*ends), points)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def first_strategies(
    space: StrategySpace, sparsity_range: tuple[float, float], *, has_derivatives: bool
) -> list[Strategy]:
    """Return what is asked first: every part alone, then all narrowed alike, where they can be.

    Derivatives of the latter tell what the steps of fine axes cost, so those are not asked alone.
    """
    alone = alone_strategies(space, coarse_only=has_derivatives)
    if all(axis.is_choice or not axis.is_shape for axis in space.axes):
        return alone
    low, high = sparsity_range
    return alone + [space.uniform(low + share * (high - low)) for share in _ALIKE]


def _active(strategy: Strategy) -> list[str]:
    return [name for name, value in strategy.settings if value > 0]


def alone_strategies(space: StrategySpace, *, coarse_only: bool = False) -> list[Strategy]:
    """Return the strategies that remove or narrow one part, of very many parts some.

    Args:
        space: of the strategies.
        coarse_only: leave out axes of more than a few steps.
    """
    shapes = [
        a
        for a, axis in enumerate(space.axes)
        if axis.is_shape and not (coarse_only and axis.num_steps > _COARSE)
    ]
    stride = max(1, -(-len(shapes) // (_MAX_COARSE if coarse_only else _MAX_ALONE)))
    values = [_alone_value(space.axes[a]) for a in shapes[::stride]]
    rows = [
        [value if a == axis else 0.0 for a in range(space.num_axes)]
        for axis, value in zip(shapes[::stride], values, strict=True)
    ]
    return [Strategy(settings=tuple(zip(space.names, row, strict=True))) for row in rows]


def _alone_value(axis: Axis) -> float:
    if axis.power > 2:  # so steep that only its end shows
        return axis.max_step / axis.num_steps
    return max(1, min(round(_HALF * axis.num_steps), axis.max_step)) / axis.num_steps


def curves_of(
    config: SearchConfig, space: StrategySpace, evaluations: Sequence[tuple[Strategy, Evaluation]]
) -> AxisCurves:
    """Return the axis curves with those of shapes as powers through what parts cost alone."""
    table = config.curves.double().clone()
    knots = torch.linspace(0, 1, table.shape[1], dtype=torch.float64)
    units = space.encode([strategy for strategy, _ in evaluations])
    heights: dict[int, float] = {}
    for unit, (_, evaluation) in zip(units, evaluations, strict=True):
        active = (unit > 0).nonzero()[:, 0].tolist()
        if len(active) == 1 and space.axes[active[0]].is_shape:
            a = active[0]
            heights[a] = max(evaluation.kl, 1e-5) / float(unit[a]) ** space.axes[a].power
    for a, axis in enumerate(space.axes):
        if not axis.is_shape or not heights:
            continue
        kind = [k for k in heights if _kind(space.axes[k]) == _kind(axis)] or [*heights]
        nearest = min(kind, key=lambda k: abs(k - a))
        table[a] = heights.get(a, heights[nearest]) * knots.pow(axis.power)
    return AxisCurves(table)


def _kind(axis: Axis) -> tuple[str, int]:
    """Return what axes have in common whose costs are alike."""
    return axis.name.split("/")[0], axis.num_steps
