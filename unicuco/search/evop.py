"""EvoP for one target: evolution of patterns with a constant number of members (arXiv 2502.14910).

Published, a pattern says which layers are removed; patterns evolve by what they cost on calibration
text that is drawn evenly from clusters (`unicuco.calibration.sampling`, `sampling` below asks for
it). Population, mutation and crossover are not published: here the best patterns are crossed by
pairs, repaired to their number of members, and one member is swapped for a stranger.

A request here is a sparsity over sites, not a number of layers, so a pattern is given a `depth` w:
of d axes about S d are members; members are pruned to S + w (1 - S), the others to S - w S, and the
projection meets the budget to the weight. At w = 1 that is the published method, whole members
removed and the rest filled exactly (up to the bound of an axis: nothing is removed to the last
weight); at w = 0 it is the uniform allocation. Removing whole sites costs
far more than thinning all of them out (on the reference model at 0.6, after 40 units: four times
uniform's KL, and 0.8 of it at w = 0.2), so the default w is small; it was chosen on validation text
(`benchmarks.rates`). A member is an axis: a site, or a block where axes are blocks.

What it does not know: that members could differ from one another: two settings are all an answer
has. And any other target: sixty-four requests cost sixty-four searches.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Final

import torch

from unicuco.calibration import Sampling
from unicuco.search.request import Record, RequestConfig, asks_of, kl_of
from unicuco.types import Ask, Outcome, Strategy

DEFAULT_UNITS: Final = 300.0  # not published: as many as EvoPress gets here
_SEEDS_PER_SEARCH: Final = 100_003
_TRIES_PER_CHILD: Final = 50

Pattern = frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvopOptions:
    """``population`` parents, ``offspring`` children a round, and ``depth`` w in (0, 1]."""

    population: int = 8
    offspring: int = 12
    depth: float = 0.2

    def __post_init__(self) -> None:
        if self.population < 2 or self.offspring < 1 or not 0 < self.depth <= 1:
            raise ValueError(
                f"need two parents or more, a child or more, a depth in (0, 1]: {self}"
            )


class Evop:
    """One search (see the module's docstring). Round 0 judges random patterns.

    Where all patterns are no more than the evaluations, all of them are judged, in order.
    """

    lag = 1
    sampling = Sampling.CLUSTERED

    def __init__(self, config: RequestConfig, options: EvopOptions | None = None) -> None:
        self.config = config
        self.options = options or EvopOptions()
        self.round_size = self.options.offspring
        self.num_members = popcount(config.space.num_axes, config.sparsity)
        self._patterns: dict[str, Pattern] = {}  # of the strategies that were made
        self.record = Record(best=config.space.uniform(config.sparsity))

    @property
    def num_evaluations(self) -> int:
        """As many as the units pay for."""
        units = DEFAULT_UNITS if self.config.units is None else self.config.units
        return int(units)

    @property
    def best(self) -> Strategy:
        """The best pattern's strategy so far."""
        return self.record.best

    def ask(self, round: int) -> list[Ask]:
        """Return the patterns of a round; none when all are made, or the units are spent."""
        left = self.num_evaluations - sum(len(self.record.told(k)) for k in range(round))
        if left <= 0:
            return []
        if self._num_patterns() <= self.num_evaluations:
            first = round * self.round_size
            every = combinations(range(self.config.space.num_axes), self.num_members)
            patterns = list(map(frozenset, islice(every, first, first + self.round_size)))
        else:
            self._recall(round)
            patterns = self._bred(round)
        strategies = [self.strategy(pattern) for pattern in patterns]
        return asks_of(round, strategies[:left])

    def tell(self, round: int, results: Sequence[tuple[Ask, Outcome]]) -> None:
        """Take a round of patterns."""
        self.record.tell(round, results)

    def strategy(self, pattern: Pattern) -> Strategy:
        """Return the strategy exactly at the target that prunes the pattern's members harder."""
        space, s, w = self.config.space, self.config.sparsity, self.options.depth
        member = torch.zeros(space.num_axes, dtype=torch.float64)
        member[sorted(pattern)] = 1.0
        values = s - w * s + w * member
        low = torch.tensor([axis.low for axis in space.axes], dtype=torch.float64)
        unit = ((values - low) / space.span).clamp(0, 1)
        (strategy,) = space.decode_exact(unit[None], [space.kept_for_sparsity(s)])
        self._patterns[strategy.key] = pattern
        return strategy

    def _num_patterns(self) -> int:
        return math.comb(self.config.space.num_axes, self.num_members)

    def _recall(self, round: int) -> None:
        """Make again what another process made, so that its patterns are known."""
        for earlier in range(round):
            if any(ask.strategy.key not in self._patterns for ask, _ in self.record.told(earlier)):
                for pattern in self._bred(earlier):
                    self.strategy(pattern)

    def _bred(self, round: int) -> list[Pattern]:
        """Return the new patterns of a round, all different; fewer where none are found."""
        draw = random.Random(self.config.seed * _SEEDS_PER_SEARCH + round)
        told = [pair for k in range(round) for pair in self.record.told(k)]
        ranked = sorted(told, key=lambda pair: kl_of(pair[1]))[: self.options.population]
        parents = [self._patterns[ask.strategy.key] for ask, _ in ranked]
        seen = {self._patterns[ask.strategy.key] for ask, _ in told}
        children: list[Pattern] = []
        for _ in range(_TRIES_PER_CHILD * self.round_size):
            child = self._child(draw, parents)
            if child not in seen:
                seen.add(child)
                children.append(child)
            if len(children) == self.round_size:
                break
        return children

    def _child(self, draw: random.Random, parents: list[Pattern]) -> Pattern:
        num_axes = self.config.space.num_axes
        if len(parents) < 2:
            return frozenset(draw.sample(range(num_axes), self.num_members))
        mother, father = draw.sample(parents, 2)
        return swapped(draw, crossed(draw, mother, father), num_axes)


def popcount(num_axes: int, sparsity: float) -> int:
    """Return how many of the axes a pattern has as members: about a share of the sparsity.

    At least one and not all, except where nothing is to be pruned or there is one axis only.
    """
    if sparsity <= 0 or num_axes < 2:
        return 0
    return min(max(round(sparsity * num_axes), 1), num_axes - 1)


def crossed(draw: random.Random, mother: Pattern, father: Pattern) -> Pattern:
    """Return a child with all that both have, and as many of the rest as a parent has."""
    common = mother & father
    return common | frozenset(draw.sample(sorted(mother ^ father), len(mother) - len(common)))


def swapped(draw: random.Random, pattern: Pattern, num_axes: int) -> Pattern:
    """Return the pattern with one member swapped for an axis that is none."""
    strangers = sorted(frozenset(range(num_axes)) - pattern)
    if not pattern or not strangers:
        return pattern
    return pattern - {draw.choice(sorted(pattern))} | {draw.choice(strangers)}


def one_at_a_time(search: Evop, judge: Callable[[Strategy], float]) -> Pattern:
    """Return the members that greedy removal takes: the axes whose own pruning costs least.

    Args:
        search: says how many members there are, and how hard they are pruned.
        judge: what a strategy costs; asked once per axis, all others left dense.
    """
    config, depth = search.config, search.options.depth
    axes = config.space.axes
    setting = config.sparsity + depth * (1 - config.sparsity)
    alone = []
    for position, axis in enumerate(axes):
        values = [0.0] * len(axes)
        values[position] = min(round(setting * axis.num_steps), axis.max_step) / axis.num_steps
        alone.append(judge(Strategy(settings=tuple(zip(config.space.names, values, strict=True)))))
    return frozenset(sorted(range(len(axes)), key=alone.__getitem__)[: search.num_members])
