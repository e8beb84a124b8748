"""OptSpa for one target: TPE over one sparsity per bin of sites (arXiv 2507.20613, its code).

Sites in model order make eight bins; a bin's sparsity is the target plus an offset in [-0.05, 0.05]
by steps of 0.025; fifty trials, proposed by Optuna's tree-structured Parzen estimator. Where the
published code throws away trials below the target and lets others exceed it, every trial here is
projected onto the target exactly. What differs otherwise: trials are judged by KL, as all methods
here are, and two are proposed at a time, so that two evaluators work.

A study is rebuilt from what was told before every round, so nothing but the record is needed to go
on. Optuna is imported when the first trial is proposed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from unicuco.calibration import Sampling
from unicuco.errors import RequestError
from unicuco.search.request import Record, RequestConfig, asks_of, kl_of
from unicuco.types import Ask, Outcome, Strategy

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution

NUM_BINS: Final = 8
REACH: Final = 0.05
STEP: Final = 0.025
NUM_TRIALS: Final = 50
_AT_ONCE: Final = 2
_TRIES: Final = 40  # proposals that fall onto a strategy that is there are proposed again
_SEEDS_PER_SEARCH: Final = 100_003
_FAILED_KL: Final = 1e6  # Optuna's estimator takes no infinity

Offsets = tuple[float, ...]


class OptSpa:
    """One search (see the module's docstring)."""

    lag = 1
    sampling = Sampling.EVEN
    round_size = _AT_ONCE

    def __init__(self, config: RequestConfig) -> None:
        self.config = config
        self._offsets: dict[str, Offsets] = {}  # of every strategy that was proposed
        self.record = Record(best=config.space.uniform(config.sparsity))

    @property
    def num_evaluations(self) -> int:
        """Trials: fifty, or as many as the units pay for."""
        return NUM_TRIALS if self.config.units is None else int(self.config.units)

    @property
    def best(self) -> Strategy:
        """The best trial so far."""
        return self.record.best

    def ask(self, round: int) -> list[Ask]:
        """Return the trials of a round; none when all are made, or no new one is found."""
        for earlier in range(round):  # what another process proposed is proposed again
            if any(ask.strategy.key not in self._offsets for ask, _ in self.record.told(earlier)):
                self._propose(earlier)
        return asks_of(round, self._propose(round))

    def tell(self, round: int, results: Sequence[tuple[Ask, Outcome]]) -> None:
        """Take a round of trials."""
        self.record.tell(round, results)

    def _propose(self, round: int) -> list[Strategy]:
        told = [pair for k in range(round) for pair in self.record.told(k)]
        wanted = min(_AT_ONCE, self.num_evaluations - _AT_ONCE * round)
        seen = self.record.seen(round)
        chosen: list[Strategy] = []
        with study_of(self.config.seed * _SEEDS_PER_SEARCH + round) as study:
            from optuna.trial import create_trial

            space = distributions()
            for ask, outcome in told:
                params = _named(self._offsets[ask.strategy.key])
                value = min(kl_of(outcome), _FAILED_KL)
                study.add_trial(create_trial(params=params, distributions=space, value=value))
            for _ in range(_TRIES):
                if len(chosen) >= wanted:
                    break
                params = study.ask(space).params
                offsets = tuple(params[name] for name in space)
                strategy = self.strategy(offsets)
                if strategy.key not in seen:
                    seen.add(strategy.key)
                    self._offsets[strategy.key] = offsets
                    chosen.append(strategy)
        return chosen

    def strategy(self, offsets: Offsets) -> Strategy:
        """Return the strategy exactly at the target that the bins' offsets stand for."""
        return bins_strategy(self.config, offsets)


def bins_strategy(config: RequestConfig, offsets: Offsets) -> Strategy:
    """Return the strategy exactly at a request's target that the bins' offsets stand for."""
    space = config.space
    bins = bin_of_axes(space.num_axes)
    low = torch.tensor([axis.low for axis in space.axes], dtype=torch.float64)
    values = config.sparsity + torch.tensor(offsets, dtype=torch.float64)[bins]
    unit = ((values - low) / space.span).clamp(0, 1)
    (strategy,) = space.decode_exact(unit[None], [space.kept_for_sparsity(config.sparsity)])
    return strategy


def bin_of_axes(num_axes: int) -> Tensor:
    """Return the bin of every axis: eight runs of neighbours, as even as can be."""
    return torch.arange(num_axes) * NUM_BINS // max(num_axes, NUM_BINS)


def distributions() -> dict[str, BaseDistribution]:
    """Return what Optuna draws a trial from: one stepped offset per bin."""
    from optuna.distributions import FloatDistribution

    return {f"bin{k}": FloatDistribution(-REACH, REACH, step=STEP) for k in range(NUM_BINS)}


@contextmanager
def study_of(seed: int) -> Iterator[Study]:
    """Make an empty study with a TPE sampler; Optuna says nothing on stderr meanwhile.

    Raises:
        RequestError: Optuna is not installed.
    """
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise RequestError("optspa needs the package optuna: pip install optuna") from error
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed % 2**32))
    finally:
        optuna.logging.set_verbosity(verbosity)


def _named(offsets: Offsets) -> dict[str, float]:
    assert all(map(math.isfinite, offsets)), "offsets are drawn from a bounded grid"
    return {f"bin{k}": value for k, value in enumerate(offsets)}
