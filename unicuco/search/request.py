"""What a search of one request is: an ask/tell loop that ends by itself with its best strategy.

The rivals of StratNet search anew for every request. Each is a pure function of its configuration
and of what it was told: ``ask(k)`` may use rounds up to k - `lag`, draws from a generator seeded by
(seed, round), and gives the same when asked again, so a search resumes from its record alone.
What this module does not know: how evaluations are run and recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Final, Protocol

import torch

from unicuco.allocate import AxisCurves
from unicuco.calibration import Sampling
from unicuco.dimensions import Granularity
from unicuco.search.base import Search
from unicuco.space import StrategySpace
from unicuco.types import Ask, Evaluation, ModelProfile, Outcome, Strategy

_SEEDS_PER_SEARCH: Final = 100_003  # rounds of a search; as the searches of runs count them


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestConfig:
    """All that decides what a search of one request asks; picklable.

    Attributes:
        space: of sparsity axes.
        curves: what every axis alone should cost.
        blocks: the block of every axis, ``d`` numbers from 0.
        sparsity: the request.
        tokens: of the search text: what fidelities are shares of.
        seed: decides every draw.
        units: forward passes over the search text to spend at most; none: the method's own number.
    """

    space: StrategySpace
    curves: AxisCurves
    blocks: tuple[int, ...]
    sparsity: float
    tokens: int
    seed: int
    units: float | None = None


class RequestSearch(Search, Protocol):
    """A search for one request; ends by asking nothing more."""

    lag: int
    sampling: Sampling  # of the windows of the search text that judge it

    @property
    def num_evaluations(self) -> int:
        """The most asks that it makes in all, cheap ones included."""

    @property
    def best(self) -> Strategy:
        """The best strategy so far, exactly at the budget; before any result, where it starts."""

    @property
    def record(self) -> Record:
        """What it was told so far."""


@dataclass(slots=True)
class Record:
    """What a search was told: the best on the whole text, units spent, and the curve of both.

    ``curve`` holds (units spent, best KL) after every round that improved the best.
    """

    best: Strategy
    best_kl: float = math.inf
    units: float = 0.0
    evaluations: int = 0
    rounds: dict[int, list[tuple[Ask, Outcome]]] = field(default_factory=dict)
    curve: list[tuple[float, float]] = field(default_factory=list)

    def tell(self, round: int, results: Sequence[tuple[Ask, Outcome]]) -> None:
        """Take a round; results on part of the text cost units but are no candidates."""
        self.rounds[round] = list(results)
        before = self.best_kl
        for ask, outcome in results:
            self.evaluations += 1
            if isinstance(outcome, Evaluation):
                self.units += outcome.cost_units
                if ask.tokens is None and outcome.kl < self.best_kl:
                    self.best, self.best_kl = ask.strategy, outcome.kl
        if self.best_kl < before:
            self.curve.append((self.units, self.best_kl))

    def told(self, round: int) -> list[tuple[Ask, Outcome]]:
        """Return a round's results in ask order; none of a round that was not told."""
        return self.rounds.get(round, [])

    def seen(self, num_rounds: int) -> set[str]:
        """Return the keys of all strategies asked in the first ``num_rounds`` rounds."""
        return {ask.strategy.key for k in range(num_rounds) for ask, _ in self.told(k)}


def kl_of(outcome: Outcome) -> float:
    """Return an outcome's KL; what failed is infinitely bad."""
    return outcome.kl if isinstance(outcome, Evaluation) else math.inf


def round_generator(seed: int, round: int) -> torch.Generator:
    """Return the generator of one round's draws."""
    return torch.Generator().manual_seed(seed * _SEEDS_PER_SEARCH + round)


def asks_of(
    round: int,
    strategies: Sequence[Strategy],
    *,
    tokens: int | None = None,
    derivatives: bool = False,
) -> list[Ask]:
    """Number the strategies of a round."""
    return [
        Ask(round=round, position=k, strategy=strategy, derivatives=derivatives, tokens=tokens)
        for k, strategy in enumerate(strategies)
    ]


def axis_blocks(profile: ModelProfile, granularity: Granularity) -> tuple[int, ...]:
    """Return the block of every sparsity axis."""
    if granularity is Granularity.BLOCK:
        return tuple(range(profile.num_blocks))
    return tuple(site.block for site in profile.sites)


def run_request(search: RequestSearch, evaluate: Callable[[Ask], Outcome]) -> None:
    """Run a search to its end in this process, recording nothing."""
    for round_ in count():
        asks = search.ask(round_)
        if not asks:
            return
        search.tell(round_, [(ask, evaluate(ask)) for ask in asks])


class SearchAllocator:
    """Any search of one request as an allocator: one whole search per target.

    Args:
        name: of the search.
        make: makes the search of a configuration.
        config: everything but the request; its sparsity is replaced.
        run: runs a search to its end: in this process, or over a pool with a store.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[RequestConfig], RequestSearch],
        config: RequestConfig,
        run: Callable[[RequestSearch], None],
    ) -> None:
        self.name = name
        self._make = make
        self._config = config
        self._run = run

    def allocate(self, sparsities: Sequence[float]) -> list[Strategy]:
        """Return one strategy per sparsity, each the best that its search found.

        Raises:
            InfeasibleRequestError: a sparsity beyond what the space reaches; found before any
                search begins.
        """
        searches = [self._make(replace(self._config, sparsity=value)) for value in sparsities]
        for search in searches:
            self._run(search)
        return [search.best for search in searches]
