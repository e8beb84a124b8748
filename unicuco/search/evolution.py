"""EvoPress for one target: evolution by level switches, judged in stages (arXiv 2410.14649).

The parent starts uniform. A level is the same number of weights on every axis, so moving one axis a
level up and another a level down keeps the budget exact: a switch. A child is the parent after
min(U{1..3}, U{1..3}) switches; children that are there already are drawn again. They are judged in
stages, few survivors going on to more tokens; the last stage sees the whole text, where the best of
survivors and parent becomes the parent (elitist, 1 + lambda).

Published defaults (400 generations of 64, survivors 8, 2 and 1, tokens 2,048, 16,384 and 65,536, 17
levels) are kept with the whole search text in place of the 65,536 tokens, and as many generations
as the units pay for. Two departures, both in its favour: the parent's value is known and not
measured again, and both survivors of the last stage are measured on all tokens.

What it does not know: any other target. Sixty-four requests cost sixty-four searches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from unicuco.calibration import Sampling
from unicuco.search.request import Record, RequestConfig, asks_of, kl_of, round_generator
from unicuco.types import Ask, Outcome, Strategy

if TYPE_CHECKING:
    from collections.abc import Sequence

# A million weights in layers of 29 million on average (Llama-2-7B's).
_LEVEL_OF_MEAN: Final = 1 / 29
_LEVEL_OF_SMALLEST: Final = 1 / 4  # a million of Llama-3's key and value matrices of 4 million
_MAX_SWITCHES: Final = 3
_TRIES_PER_CHILD: Final = 50  # a space of few levels runs out of new children
DEFAULT_UNITS: Final = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EvolutionOptions:
    """One generation, and how far it may go from uniform.

    ``survivors[k]`` children pass stage k, which judges on ``shares[k]`` of the search tokens; the
    last share is 1 and has no survivors of its own: the best stays. ``max_level`` bounds every
    axis' distance from its start in levels.
    """

    offspring: int = 64
    survivors: tuple[int, ...] = (8, 2)
    shares: tuple[float, ...] = (1 / 32, 1 / 4, 1.0)
    max_level: int = 8

    def __post_init__(self) -> None:
        falling = [self.offspring, *self.survivors]
        if (
            len(self.shares) != len(falling)
            or self.shares[-1] != 1
            or sorted(falling, reverse=True) != falling
            or min(falling) < 1
        ):
            raise ValueError(f"stages need falling counts and shares that end with 1, got {self}")

    @property
    def counts(self) -> tuple[int, ...]:
        """Children judged at every stage."""
        return (self.offspring, *self.survivors)

    def units_per_generation(self, tokens: int) -> float:
        """Forward passes over a text of ``tokens`` tokens that one generation costs."""
        shares = [max(1, round(share * tokens)) / tokens for share in self.shares]
        return sum(n * share for n, share in zip(self.counts, shares, strict=True))


class Evolution:
    """One search (see the module's docstring). Round 0 judges the start, then stage by stage."""

    lag = 1
    sampling = Sampling.EVEN

    def __init__(self, config: RequestConfig, options: EvolutionOptions | None = None) -> None:
        self.config = config
        self.options = options or EvolutionOptions()
        self.round_size = self.options.offspring
        axes = config.space.axes
        sizes = [axis.num_steps for axis in axes]
        mean = sum(sizes) / len(sizes)
        self._level = max(1, int(min(_LEVEL_OF_MEAN * mean, _LEVEL_OF_SMALLEST * min(sizes))))
        self._start = config.space.uniform(config.sparsity)
        first = self._steps(self._start)
        reach = self.options.max_level * self._level
        self._low = [max(0, step - reach) for step in first]
        self._high = [
            min(axis.max_step, step + reach) for step, axis in zip(first, axes, strict=True)
        ]
        self.record = Record(best=self._start)

    @property
    def generations(self) -> int:
        """Generations that the units pay for, the start's own evaluation taken off."""
        units = DEFAULT_UNITS if self.config.units is None else self.config.units
        return int((units - 1) / self.options.units_per_generation(self.config.tokens) + 1e-9)

    @property
    def num_evaluations(self) -> int:
        """The most asks in all."""
        return 1 + self.generations * sum(self.options.counts)

    @property
    def best(self) -> Strategy:
        """The parent."""
        return self.record.best

    def ask(self, round: int) -> list[Ask]:
        """Return the strategies of one stage; none when all generations are over."""
        if round == 0:
            return asks_of(0, [self._start])
        stages = len(self.options.counts)
        generation, stage = divmod(round - 1, stages)
        if generation >= self.generations:
            return []
        if stage == 0:
            chosen = self._children(round)
        else:
            told = self.record.told(round - 1)
            order = sorted(range(len(told)), key=lambda k: kl_of(told[k][1]))
            chosen = [told[k][0].strategy for k in order[: self.options.counts[stage]]]
        share = self.options.shares[stage]
        tokens = None if share == 1 else max(1, round_half(share * self.config.tokens))
        return asks_of(round, chosen, tokens=tokens)

    def tell(self, round: int, results: Sequence[tuple[Ask, Outcome]]) -> None:
        """Take a stage; on the whole text, the best so far is kept."""
        self.record.tell(round, results)

    def _children(self, round: int) -> list[Strategy]:
        """Return children of the parent, all different and new; fewer where there are none."""
        generator = round_generator(self.config.seed, round)
        seen = self.record.seen(round)
        children: list[Strategy] = []
        for _ in range(_TRIES_PER_CHILD * self.options.offspring):
            child = self._child(generator)
            if child.key not in seen:
                seen.add(child.key)
                children.append(child)
            if len(children) == self.options.offspring:
                break
        return children

    def _child(self, generator: torch.Generator) -> Strategy:
        axes, steps = self.config.space.axes, self._steps(self.best)
        draws = torch.randint(1, _MAX_SWITCHES + 1, (2,), generator=generator)
        for _ in range(int(draws.min())):
            self._switch(steps, generator)
        values = [count / axis.num_steps for count, axis in zip(steps, axes, strict=True)]
        return Strategy(settings=tuple(zip(self.config.space.names, values, strict=True)))

    def _switch(self, steps: list[int], generator: torch.Generator) -> None:
        axes = range(len(steps))
        more = _pick([a for a in axes if steps[a] + self._level <= self._high[a]], generator)
        less = _pick([a for a in axes if steps[a] - self._level >= self._low[a]], generator)
        if more is not None and less is not None:
            steps[more] += self._level
            steps[less] -= self._level

    def _steps(self, strategy: Strategy) -> list[int]:
        pairs = zip(strategy.values, self.config.space.axes, strict=True)
        return [round_half(value * axis.num_steps) for value, axis in pairs]


def round_half(value: float) -> int:
    """Return the nearest whole number (`round` is shadowed where rounds are counted)."""
    return int(value + 0.5)


def _pick(candidates: list[int], generator: torch.Generator) -> int | None:
    if not candidates:
        return None
    return candidates[int(torch.randint(len(candidates), (1,), generator=generator))]
