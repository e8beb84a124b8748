"""EvoPress' drop search for one target: evolution of what is removed (arXiv 2410.14649).

The first parent is the best of random patterns. A child swaps a removed part for one that is there
and as large, min(U{1..3}, U{1..3}) times, so that the size stays. Children are judged on few
tokens, the best of them on all, and the best so far is the next parent (elitist).

Published defaults are kept: 64 patterns at first, then 32 children, 2 of them judged on all tokens,
the others on a sixteenth; as many generations as the units pay for. In its favour here: where parts
differ in size, a random pattern is filled up to the budget and gives back what need not go.

What it does not know: any other target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from unicuco.calibration import Sampling
from unicuco.search.request import Record, RequestConfig, asks_of, kl_of, round_generator
from unicuco.types import Ask, Outcome, Strategy

_FIRST: Final = 64
_CHILDREN: Final = 32
_SURVIVORS: Final = 2
_SHARE: Final = 1 / 16
_MAX_SWAPS: Final = 3
_TRIES: Final = 8  # per child; small spaces run out of new ones
DEFAULT_UNITS: Final = 300.0


class DropSearch:
    """One search (see the module's docstring): even rounds judge on few tokens, odd ones on all."""

    lag = 1
    sampling = Sampling.EVEN
    round_size = _FIRST

    def __init__(self, config: RequestConfig) -> None:
        self.config = config
        self._budget = config.space.kept_for_sparsity(config.sparsity)
        self._sizes = [round(size) for size in config.space.axis_params.tolist()]
        (start,) = config.space.decode_exact(
            torch.rand(1, config.space.num_axes, generator=round_generator(config.seed, 0)),
            [self._budget],
        )
        self.record = Record(best=start)

    @property
    def num_evaluations(self) -> int:
        """The most asks in all, cheap ones included."""
        return _FIRST + _SURVIVORS + self.generations * (_CHILDREN + _SURVIVORS)

    @property
    def generations(self) -> int:
        """Generations after the first that the units pay for."""
        units = DEFAULT_UNITS if self.config.units is None else self.config.units
        left = units - _FIRST * _SHARE - _SURVIVORS
        return max(0, int(left / (_CHILDREN * _SHARE + _SURVIVORS) + 1e-9))

    @property
    def best(self) -> Strategy:
        """The parent."""
        return self.record.best

    def ask(self, round: int) -> list[Ask]:
        """Return the patterns of a stage; none when all generations are over."""
        generation, stage = divmod(round, 2)
        if generation > self.generations:
            return []
        if stage:
            told = sorted(self.record.told(round - 1), key=lambda pair: kl_of(pair[1]))
            return asks_of(round, [ask.strategy for ask, _ in told[:_SURVIVORS]])
        tokens = max(1, int(_SHARE * self.config.tokens + 0.5))
        return asks_of(round, self._patterns(round), tokens=tokens)

    def tell(self, round: int, results: Sequence[tuple[Ask, Outcome]]) -> None:
        """Take a stage; on the whole text, the best so far is kept."""
        self.record.tell(round, results)

    def _patterns(self, round: int) -> list[Strategy]:
        generator = round_generator(self.config.seed, round)
        count = _CHILDREN if round else _FIRST
        seen = self.record.seen(round)
        patterns: list[Strategy] = []
        for _ in range(_TRIES * count):
            pattern = self._child(generator) if round else self._random(generator)
            if pattern.key not in seen:
                seen.add(pattern.key)
                patterns.append(pattern)
            if len(patterns) == count:
                break
        return patterns

    def _random(self, generator: torch.Generator) -> Strategy:
        point = torch.rand(1, self.config.space.num_axes, generator=generator)
        return self.config.space.decode_exact(point, [self._budget])[0]

    def _child(self, generator: torch.Generator) -> Strategy:
        values = list(self.best.values)
        draws = torch.randint(1, _MAX_SWAPS + 1, (2,), generator=generator)
        for _ in range(int(draws.min())):
            pairs = [
                (a, b)
                for a, gone in enumerate(values)
                for b, other in enumerate(values)
                if gone and not other and self._sizes[a] == self._sizes[b]
            ]
            if pairs:
                back, away = pairs[int(torch.randint(len(pairs), (1,), generator=generator))]
                values[back], values[away] = 0.0, 1.0
        return Strategy(settings=tuple(zip(self.config.space.names, values, strict=True)))
